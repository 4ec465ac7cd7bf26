"""The report of a bundle: a self-contained HTML page.

``rows`` are the values that it is made of, ``page`` writes it, ``charts`` draws its curves and bars, ``images``
its pictures.
"""

from fewstep.report.charts import CurveChart, CurveSeries
from fewstep.report.page import Verdict, render, verdict, worst_first, write_report
from fewstep.report.rows import CheckRow, LatencyRow, PictureRow, ReportData, ScheduleTable, Section, SizeRow

__all__ = [
    "CheckRow",
    "CurveChart",
    "CurveSeries",
    "LatencyRow",
    "PictureRow",
    "ReportData",
    "ScheduleTable",
    "Section",
    "SizeRow",
    "Verdict",
    "render",
    "verdict",
    "worst_first",
    "write_report",
]

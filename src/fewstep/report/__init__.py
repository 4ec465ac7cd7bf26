"""The report of a bundle: a self-contained HTML page.

``page`` holds the values it is made of and writes it, ``charts`` draws its curves and bars, ``images`` its pictures.
"""

from fewstep.report.charts import CurveChart, CurveSeries
from fewstep.report.page import (
    CheckRow,
    LatencyRow,
    PictureRow,
    ReportData,
    ScheduleTable,
    Section,
    SizeRow,
    Verdict,
    render,
    verdict,
    worst_first,
    write_report,
)

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

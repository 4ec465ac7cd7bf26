"""Reports to render, and a page as a browser reads it."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import numpy as np
import numpy.typing as npt

from fewstep.report import (
    CheckRow,
    CurveChart,
    CurveSeries,
    LatencyRow,
    PictureRow,
    ReportData,
    ScheduleTable,
    Section,
    SizeRow,
)

HOSTILE = "</style></svg><script>alert(1)</script>\"'><img src=http://x.invalid/y onerror=alert(1)>\x00\x1b\ud800\u202e"

PASSED = CheckRow("lowering", "component", "denoiser", 1, None, "SQNR", 120.0, 100.0, True)


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside of style and title."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "head" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def picture(value: float = 0.0, size: int = 8) -> npt.NDArray[np.float32]:
    return np.full((size, size, 3), value, np.float32)


def empty_report() -> ReportData:
    return ReportData(title="stickers", subtitle="fp32", created="2026-01-01", checks=(), caveats=())


def full_report(text: str = "a red heart") -> ReportData:
    facts = (Section(text, text),)
    return ReportData(
        title=text, subtitle=text, created=text, caveats=[text], precision_notes=[text], latency_note=text,
        checks=(PASSED, CheckRow(text, text, text, 0, text, text, 120.0, 100.0, True)),
        pictures=(PictureRow(text, picture(), picture(0.5), 12.0), PictureRow(text, picture(), picture(), math.inf)),
        curves=(CurveChart(text, (CurveSeries(text, (50.0, 40.0)),), 30.0),
                CurveChart(text, tuple(CurveSeries(text, (50.0 + i, math.inf)) for i in range(9)), 30.0)),
        sizes=(SizeRow(text, text, 12_345_678_901, 40_000_000_000), SizeRow("tokenizer", text, 9)),
        latencies=(LatencyRow(text, 1, 1.0, 0.9, 1.2), LatencyRow("denoiser", 4, 70.0, 60.0, 90.0)),
        whole_latency=LatencyRow("One picture", 1, 300.0, 290.0, 350.0), peak_memory_bytes=1_234_567_890,
        contract=facts, schedules=(ScheduleTable(text, ("k", text), ((0, 0.5), (1, None))),),
        environment=facts, licences=(*facts, Section("Weights", "https://example.org/licence")),
    )  # fmt: skip

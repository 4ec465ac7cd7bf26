"""Charts of the report, as inline SVG: error curves over the steps, and bars.

Colours, fonts and line widths come from the page's style sheet through classes, so that one drawing serves light, dark
and print. ``s0`` ... ``s5`` are the colours of series. Everything is built as a tree, never by pasting text, so that a
label cannot break out of it.
"""

from __future__ import annotations

import math
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SERIES_COLOURS = 6
"""With more series than this a chart shows their median and range, over thin lines."""

_CONTROLS = (*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0))
_DIRECTION_OVERRIDES = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_NOT_CHARACTERS = (*range(0xD800, 0xE000), 0xFFFE, 0xFFFF)
_UNPRINTABLE = dict.fromkeys((*_CONTROLS, *_DIRECTION_OVERRIDES, *_NOT_CHARACTERS), "\N{REPLACEMENT CHARACTER}")
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class CurveSeries:
    """One line of a chart: a label (a sample's prompt, a precision) and its error at each step, in dB.

    ``inf`` is an exact match and is drawn on a row of its own, as is NaN.
    """

    label: str
    values_db: tuple[float, ...]


@dataclass(frozen=True)
class CurveChart:
    """One chart of error over steps: what is compared with what, its lines, and the limit they must stay above."""

    title: str
    series: tuple[CurveSeries, ...]
    limit_db: float | None = None

    @property
    def steps(self) -> int:
        """The number of steps of the longest series."""
        return max((len(series.values_db) for series in self.series), default=0)

    @property
    def is_summary(self) -> bool:
        """Whether there are too many series for a colour each."""
        return len(self.series) > SERIES_COLOURS


@dataclass(frozen=True)
class Part:
    """One part of a whole: its names from the longest to the shortest (the longest that fits is written on it)."""

    labels: tuple[str, ...]
    value: float
    colour: int
    tooltip: str


def printable(text: str) -> str:
    """Returns text in which U+FFFD stands for what XML cannot hold or a reader must not be fooled by.

    Control characters (but tab and newline), lone surrogates, and overrides of the writing direction.
    """
    return text.translate(_UNPRINTABLE)


def decibels(value: float, digits: int = 1) -> str:
    """Returns ``51.3 dB``, ``identical`` for infinity and ``NaN`` for not a number."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "identical" if value > 0 else f"{_MINUS}inf dB"
    return f"{value:,.{digits}f} dB".replace("-", _MINUS)


def megabytes(size_bytes: int) -> str:
    """Returns ``1,234.5 MB`` (a megabyte is a million bytes)."""
    return "< 0.1 MB" if 0 < size_bytes < 50_000 else f"{size_bytes / 1e6:,.1f} MB"


def milliseconds(time_ms: float) -> str:
    """Returns a time with three digits or more: ``4.21 ms``, ``42.1 ms``, ``4,210 ms``."""
    digits = 0 if time_ms >= 99.95 else 1 if time_ms >= 9.995 else 2
    return "NaN" if math.isnan(time_ms) else f"{time_ms:,.{digits}f} ms"


def number(value: float | int | str | None) -> str:
    """Returns a number of a table: grouped if it is whole, with six decimals (or six digits, if tiny) if not."""
    if value is None or isinstance(value, str):
        return "\N{EN DASH}" if value is None else value
    if math.isfinite(value) and value == int(value):
        return f"{int(value):,}".replace("-", _MINUS)
    text = f"{value:,.6f}" if abs(value) >= 1e-4 else f"{value:.6g}"
    return {"nan": "NaN"}.get(text, text.replace("-", _MINUS))


def line_chart(chart: CurveChart, *, width: int, height: int) -> str:
    """Returns the SVG of a chart: error in dB (upwards is better) over the step k.

    Up to six series have a line each; more are drawn thin, under their median and over the band from the lowest to
    the highest. Points that are not finite break the line and are marked on rows of their own.
    """
    frame = _Frame.around(chart, width, height)
    svg = ElementTree.Element(
        "svg", {"class": "chart", "viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": _spoken(chart)}
    )
    _draw_axes(svg, frame, chart)
    if chart.is_summary:
        _draw_band(svg, frame, chart)
    for index, series in enumerate(chart.series):
        style = "line thin" if chart.is_summary else f"line s{index}"
        _draw_line(svg, frame, series, style, dots=not chart.is_summary)
    if chart.is_summary:
        _draw_line(svg, frame, CurveSeries("median", medians_db(chart)), "line s0 median", dots=True)
    if chart.limit_db is not None and math.isfinite(chart.limit_db):
        _draw_limit(svg, frame, chart.limit_db)
    return _text_of(svg)


def bar(value: float, longest: float, *, colour: int = 0, before: float | None = None,
        spread: tuple[float, float] | None = None) -> str:  # fmt: skip
    """Returns the SVG of one horizontal bar, as wide as its container.

    Args:
        value: The length of the bar, in any unit.
        longest: The value that fills the container; bars to be compared share it.
        colour: The number of the series colour.
        before: A longer (or shorter) bar drawn faintly behind it, e.g. the size before compression.
        spread: The two ends of a thin line over the bar's end, e.g. the lowest and highest time.
    """
    svg = ElementTree.Element("svg", {"class": "bar", "width": "100%", "height": "14", "aria-hidden": "true"})
    if before is not None:
        _add(svg, "rect", {"class": "before", "width": _percent(before, longest), "height": 14, "rx": 2})
    _add(svg, "rect", {"class": f"fill s{colour}", "width": _percent(value, longest), "height": 14, "rx": 2})
    if spread is not None:
        low, high = (_percent(end, longest) for end in spread)
        _add(svg, "line", {"class": "spread", "x1": low, "x2": high, "y1": 7, "y2": 7})
        for end in (low, high):
            _add(svg, "line", {"class": "spread", "x1": end, "x2": end, "y1": 3, "y2": 11})
    return _text_of(svg)


def strip(parts: Sequence[Part], label: str) -> str:
    """Returns the SVG of one bar, as wide as its container, cut into parts in proportion to their values.

    Args:
        parts: In the order in which they are drawn. Negative values and NaN count as nothing.
        label: What a screen reader says of the picture.
    """
    svg = ElementTree.Element(
        "svg", {"class": "strip", "width": "100%", "height": "40", "role": "img", "aria-label": printable(label)}
    )
    total = sum(_positive(part.value) for part in parts)
    start = 0.0
    for part in parts:
        share = _positive(part.value) / total if total else 0.0
        box = _add(svg, "svg", {"x": _percent(start, 1.0), "width": _percent(share, 1.0), "height": 40})
        _add(box, "title", {}, part.tooltip)
        _add(box, "rect", {"class": f"fill part s{part.colour}", "width": "100%", "height": 40})
        for style, container in (("wide", 880), ("narrow", 310)):
            if fitting := next((name for name in part.labels if len(name) * 7 + 8 <= share * container), None):
                place: dict[str, str | float] = {"class": f"on-fill {style}", "x": "50%", "y": 25}
                _add(box, "text", place | {"text-anchor": "middle"}, fitting)
        start += share
    return _text_of(svg)


def medians_db(chart: CurveChart) -> tuple[float, ...]:
    """Returns the median error at each step over the series that have it; NaN where one of them is NaN."""
    return tuple(_median(_at_step(chart, step)) for step in range(chart.steps))


def _median(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else statistics.median(values)


def _at_step(chart: CurveChart, step: int) -> list[float]:
    return [series.values_db[step] for series in chart.series if step < len(series.values_db)]


@dataclass(frozen=True)
class _Frame:
    """Where things are in a chart: its box in pixels, its range in dB, and the rows of values without a number."""

    left: float
    right: float
    top: float
    bottom: float
    ticks: tuple[float, ...]
    steps: int
    exact_y: float | None
    broken_y: float | None

    @classmethod
    def around(cls, chart: CurveChart, width: int, height: int) -> _Frame:
        """Returns the frame that holds every value of a chart and its limit."""
        values = [value for series in chart.series for value in series.values_db]
        finite = [value for value in values if math.isfinite(value)]
        if chart.limit_db is not None and math.isfinite(chart.limit_db):
            finite.append(chart.limit_db)
        top, bottom = 14.0, height - 44.0
        exact_y = broken_y = None
        if math.inf in values:
            exact_y, top = top, top + 28.0
        if any(math.isnan(value) or value == -math.inf for value in values):
            broken_y, bottom = bottom, bottom - 28.0
        left = 64.0 if exact_y is not None or broken_y is not None else 44.0
        return cls(left, width - 12.0, top, bottom, _ticks(finite or [0.0]), chart.steps, exact_y, broken_y)

    def x(self, step: int) -> float:
        """Returns the place of a step, in pixels from the left."""
        inset = 22.0
        if self.steps <= 1:
            return (self.left + self.right) / 2
        return self.left + inset + step * (self.right - self.left - 2 * inset) / (self.steps - 1)

    def y(self, value_db: float) -> float:
        """Returns the place of a finite value, in pixels from the top."""
        low, high = self.ticks[0], self.ticks[-1]
        return self.bottom - (value_db - low) / (high - low) * (self.bottom - self.top)


def _ticks(values: Sequence[float]) -> tuple[float, ...]:
    """Returns round numbers, evenly spaced, from at or below the smallest value to at or above the largest."""
    low, high = min(values), max(values)
    rough = max((high - low) / 4, 0.25, abs(high) * 1e-6)
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / spacing), math.ceil(high / spacing)
    if first == last:
        first, last = first - 1, last + 1
    return tuple(index * spacing for index in range(first, last + 1))


def _draw_axes(svg: ElementTree.Element, frame: _Frame, chart: CurveChart) -> None:
    right_of_label = frame.left - 8
    for tick in frame.ticks:
        y = frame.y(tick)
        _add(svg, "line", {"class": "grid", "x1": frame.left, "x2": frame.right, "y1": y, "y2": y})
        label = f"{tick:,.6g}".replace("-", _MINUS)
        _add(svg, "text", {"class": "tick", "x": right_of_label, "y": y + 4, "text-anchor": "end"}, label)
    broken = "NaN" if any(math.isnan(v) for series in chart.series for v in series.values_db) else f"{_MINUS}inf"
    for row_y, label in ((frame.exact_y, "identical"), (frame.broken_y, broken)):
        if row_y is not None:
            _add(svg, "line", {"class": "grid row", "x1": frame.left, "x2": frame.right, "y1": row_y, "y2": row_y})
            _add(svg, "text", {"class": "tick", "x": right_of_label, "y": row_y + 4, "text-anchor": "end"}, label)
    floor = frame.bottom if frame.broken_y is None else frame.broken_y
    for step in range(frame.steps):
        x = frame.x(step)
        _add(svg, "line", {"class": "axis", "x1": x, "x2": x, "y1": floor, "y2": floor + 5})
        _add(svg, "text", {"class": "tick", "x": x, "y": floor + 19, "text-anchor": "middle"}, str(step))
    middle = (frame.left + frame.right) / 2
    _add(svg, "text", {"class": "tick", "x": middle, "y": floor + 38, "text-anchor": "middle"}, "step k")


def _draw_band(svg: ElementTree.Element, frame: _Frame, chart: CurveChart) -> None:
    """Adds the band from the lowest to the highest finite value, over each run of steps that have one."""
    columns = [[v for v in _at_step(chart, step) if math.isfinite(v)] for step in range(chart.steps)]
    for run in _runs([bool(column) for column in columns]):
        upper = [(frame.x(step), frame.y(max(columns[step]))) for step in run]
        lower = [(frame.x(step), frame.y(min(columns[step]))) for step in reversed(run)]
        _add(svg, "polygon", {"class": "band s0", "points": _points(upper + lower)})


def _draw_line(svg: ElementTree.Element, frame: _Frame, series: CurveSeries, style: str, *, dots: bool) -> None:
    group = _add(svg, "g", {"class": style})
    spoken = ", ".join(decibels(value) for value in series.values_db)
    _add(group, "title", {}, f"{series.label}: {spoken}")
    for run in _runs([math.isfinite(value) for value in series.values_db]):
        points = [(frame.x(step), frame.y(series.values_db[step])) for step in run]
        _add(group, "polyline", {"points": _points(points)})
    for step, value in enumerate(series.values_db):
        _draw_point(group, frame, step, value, dot=dots)


def _draw_point(group: ElementTree.Element, frame: _Frame, step: int, value: float, *, dot: bool) -> None:
    x = frame.x(step)
    if math.isfinite(value):
        if dot:
            _add(group, "circle", {"cx": x, "cy": frame.y(value), "r": 3.5})
    elif value == math.inf and frame.exact_y is not None:
        _add(group, "circle", {"class": "exact", "cx": x, "cy": frame.exact_y, "r": 4})
    elif frame.broken_y is not None:
        y = frame.broken_y
        _add(group, "path", {"class": "broken", "d": f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"})


def _draw_limit(svg: ElementTree.Element, frame: _Frame, limit_db: float) -> None:
    y = frame.y(limit_db)
    _add(svg, "line", {"class": "limit", "x1": frame.left, "x2": frame.right, "y1": y, "y2": y})
    label_y = y - 7 if y - frame.top > 20 else y + 17
    place: dict[str, str | float] = {"class": "limit-label", "x": frame.right - 2, "y": label_y, "text-anchor": "end"}
    _add(svg, "text", place, f"limit {limit_db:,.6g} dB".replace("-", _MINUS))


def _runs(present: Sequence[bool]) -> list[list[int]]:
    """Returns the indices of each unbroken run of True."""
    runs: list[list[int]] = []
    for index, is_present in enumerate(present):
        if is_present and index > 0 and present[index - 1]:
            runs[-1].append(index)
        elif is_present:
            runs.append([index])
    return runs


def _spoken(chart: CurveChart) -> str:
    """Returns what a screen reader says of a chart; the numbers themselves are in the table below it."""
    medians = medians_db(chart)
    values = [value for series in chart.series for value in series.values_db if not math.isnan(value)]
    text = f"{chart.title}. {len(chart.series)} series over {chart.steps} steps"
    if medians and values:
        text += f". Median {decibels(medians[0])} at step 0 and {decibels(medians[-1])} at the last; "
        text += f"lowest {decibels(min(values))}"
    if chart.limit_db is not None:
        text += f"; limit {decibels(chart.limit_db)}"
    return printable(text)


def _add(
    parent: ElementTree.Element, tag: str, attributes: Mapping[str, str | float], text: str | None = None
) -> ElementTree.Element:
    written = {name: value if isinstance(value, str) else f"{value:.6g}" for name, value in attributes.items()}
    element = ElementTree.SubElement(parent, tag, written)
    element.text = None if text is None else printable(text)
    return element


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _percent(value: float, whole: float) -> str:
    share = _positive(value) / whole if whole > 0 else 0.0
    return f"{min(share, 1.0) * 100:.3f}%"


def _positive(value: float) -> float:
    return value if value > 0 and math.isfinite(value) else 0.0


def _text_of(svg: ElementTree.Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode")

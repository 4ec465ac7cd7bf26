"""The report of a bundle: one self-contained HTML page that says what was checked, how it came out, and what was not.

``ReportData`` is made of plain values, so that it can be filled from a build, from a ``parity.json`` or by hand.
The page loads nothing, runs no script, and follows the reader's light or dark setting.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
from markupsafe import Markup

from fewstep.report import images
from fewstep.report.charts import (
    SERIES_COLOURS,
    CurveChart,
    Part,
    bar,
    decibels,
    line_chart,
    medians_db,
    megabytes,
    milliseconds,
    number,
    printable,
    strip,
)
from fewstep.report.rows import CheckRow, PictureRow, ReportData

VISIBLE_CHECKS = 20
"""Rows of the table of checks that are shown at once; the rest unfolds."""

LONGEST_EDGE = 384
"""Pictures with a longer edge, in pixels, are shown at 1/2, 1/3, ... of their size, to keep the page small."""

ERRORS = ("lowering", "compression")
LEVELS = ("component", "trajectory", "picture", "call")

_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Verdict:
    """What the checks say together; ``verified`` takes one check with a limit, no failed check, and no NaN anywhere."""

    state: Literal["verified", "failed", "not verified"]
    total: int
    failed: int
    worst: CheckRow | None
    broken: int = 0
    """NaN among the values that the page shows beside the checks: a picture's PSNR, a point of a curve."""


@dataclass(frozen=True)
class _Spread:
    """The lowest, median and highest of some values, and how many were NaN."""

    lowest: float
    median: float
    highest: float
    broken: int


@dataclass(frozen=True)
class _Shown:
    """One picture row as the page shows it."""

    caption: str
    psnr_db: float
    reference: str
    bundle: str
    difference: str
    width: int
    height: int
    is_worst: bool
    original: str | None


def verdict(
    checks: Sequence[CheckRow], pictures: Sequence[PictureRow] = (), curves: Sequence[CurveChart] = ()
) -> Verdict:
    """Returns the verdict: failed if a check failed or a picture or curve is NaN, not verified without a limit kept."""
    counted = worst_first([check for check in checks if check.counts])
    failed = sum(not check.holds for check in counted)
    shown_db = [row.psnr_db for row in pictures]
    shown_db += [value for chart in curves for series in chart.series for value in series.values_db]
    broken = sum(math.isnan(value) for value in shown_db)
    state: Literal["verified", "failed", "not verified"] = "verified" if counted else "not verified"
    worst = counted[0] if counted else None
    return Verdict("failed" if failed or broken else state, len(counted), failed, worst, broken)


def worst_first(checks: Sequence[CheckRow]) -> list[CheckRow]:
    """Returns checks with the failed ones first, then by what is left of their headroom."""
    return sorted(checks, key=lambda check: (check.holds, check.headroom))


def overview(checks: Sequence[CheckRow]) -> dict[str, dict[str, Verdict]]:
    """Returns the verdict of each error at each level; of no checks where there were none."""
    errors = dict.fromkeys([*ERRORS, *(check.error for check in checks)])
    levels = dict.fromkeys([*LEVELS, *(check.level for check in checks)])
    return {
        error: {level: verdict([c for c in checks if (c.error, c.level) == (error, level)]) for level in levels}
        for error in errors
    }


def render(data: ReportData) -> str:
    """Returns the page as HTML."""
    shown, amplification, factor = _shown_pictures(data.pictures)
    ordered = worst_first(data.checks)
    longest_ms = max((max(row.median_ms, row.high_ms) for row in data.latencies), default=0.0)
    return _template().render(
        data=data,
        verdict=verdict(data.checks, data.pictures, data.curves),
        overview=overview(data.checks),
        checks=ordered[:VISIBLE_CHECKS],
        more_checks=ordered[VISIBLE_CHECKS:],
        shown=shown,
        amplification=amplification,
        white_levels=round(255 / amplification, 0 if amplification <= 64 else 1),
        factor=factor,
        psnrs=_spread([row.psnr_db for row in data.pictures]),
        charts=[(chart, [Markup(line_chart(chart, width=w, height=h)) for w, h in ((880, 320), (340, 280))])
                for chart in data.curves],
        total_bytes=sum(row.bytes for row in data.sizes),
        largest_bytes=max((max(row.bytes, row.original_bytes or 0) for row in data.sizes), default=0),
        longest_ms=longest_ms if math.isfinite(longest_ms) else 0.0,
        parts=latency_parts(data),
        picture_ms=_picture_ms(data),
    )  # fmt: skip


def write_report(data: ReportData, folder: Path) -> Path:
    """Returns the path of the page, ``folder/index.html``, after writing it; makes the folder if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(render(data), encoding="utf-8", newline="\n")
    return path


def latency_parts(data: ReportData) -> list[Part]:
    """Returns where the time of one picture goes: each call of each component, and what the whole takes beyond them."""
    parts = []
    for index, row in enumerate(data.latencies):
        colour = index % SERIES_COLOURS
        if row.calls == 1 or row.calls > 16:
            tooltip = f"{row.component}: {milliseconds(row.median_ms * row.calls)}"
            parts.append(Part((row.component, row.component[:4]), row.median_ms * row.calls, colour, tooltip))
            continue
        for call in range(row.calls):
            tooltip = f"{row.component}, call {call}: {milliseconds(row.median_ms)}"
            parts.append(Part((f"{row.component} {call}", str(call)), row.median_ms, colour, tooltip))
    total = sum(part.value for part in parts)
    if parts and data.whole_latency is not None and data.whole_latency.median_ms > total:
        rest = data.whole_latency.median_ms - total
        tooltip = f"everything else (noise, sampler, copies): {milliseconds(rest)}"
        parts.append(Part(("other", ""), rest, SERIES_COLOURS - 1, tooltip))
    return parts


def check_value(check: CheckRow) -> str:
    """Returns the value of a check, with enough digits to tell it from its limit."""
    return _measure(check.value, check.unit, _digits(check))


def check_limit(check: CheckRow) -> str:
    """Returns the limit of a check with its direction."""
    if check.limit is None:
        return "none"
    text = "identical" if check.limit == math.inf else _with_unit(f"{check.limit:,.6g}", check.unit)
    return f"{'≥' if check.at_least else '≤'} {text}".replace("-", _MINUS)


def check_margin(check: CheckRow) -> str:
    """Returns the margin of a check with its sign, or a dash where it has none."""
    if not math.isfinite(check.margin):
        return "\N{EN DASH}"
    sign = "+" if check.margin >= 0 else _MINUS
    return sign + _measure(abs(check.margin), check.unit, _digits(check))


def _digits(check: CheckRow) -> int:
    fewest = {"dB": 2, "levels": 0}.get(check.unit, 4 if check.unit == "" else 3)
    gap = abs(check.margin)
    if not math.isfinite(gap) or gap == 0:
        return fewest
    return max(fewest, min(9, math.ceil(-math.log10(gap))))


def _measure(value: float, unit: str, digits: int) -> str:
    if unit == "dB":
        return decibels(value, digits)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value}".replace("-", _MINUS)
    return _with_unit(f"{value:,.{digits}f}".replace("-", _MINUS), unit)


def _with_unit(text: str, unit: str) -> str:
    if unit == "levels" and text == "1":
        return "1 level"
    return f"{text} {unit}" if unit else text


def _spread(values: Sequence[float]) -> _Spread | None:
    """Returns the spread of the values that are numbers, and how many are not; None of nothing."""
    if not values:
        return None
    known = [value for value in values if not math.isnan(value)] or [math.nan]
    return _Spread(min(known), statistics.median(known), max(known), sum(math.isnan(value) for value in values))


def _picture_ms(data: ReportData) -> float | None:
    """Returns the time of one picture: as measured, or else as the sum of its calls; None if neither is known."""
    if data.whole_latency is not None:
        return data.whole_latency.median_ms
    return sum(row.median_ms * row.calls for row in data.latencies) if data.latencies else None


def _shown_pictures(rows: Sequence[PictureRow]) -> tuple[list[_Shown], int, int]:
    """Returns the rows as the page shows them, their common amplification, and how many times smaller they are."""
    amplification = min((images.amplification(row.reference_HWC, row.bundle_HWC) for row in rows), default=1)
    factor = -(-max((max(row.reference_HWC.shape) for row in rows), default=1) // LONGEST_EDGE)
    worst = min(rows, key=lambda row: -math.inf if math.isnan(row.psnr_db) else row.psnr_db, default=None)
    shown = []
    for row in rows:
        difference, _ = images.difference(row.reference_HWC, row.bundle_HWC, amplification)
        pictures = [images.reduce_mean(images.to_uint8(p), factor) for p in (row.reference_HWC, row.bundle_HWC)]
        uris = [images.data_uri(images.png_bytes(p)) for p in (*pictures, images.reduce_max(difference, factor))]
        height, width, _ = pictures[0].shape
        is_worst = row is worst and len(rows) > 1 and math.isfinite(row.psnr_db)
        original = None
        if row.original_HWC is not None:
            small_HWC = images.reduce_mean(images.to_uint8(row.original_HWC), factor)
            original = images.data_uri(images.png_bytes(small_HWC))
        shown.append(_Shown(row.caption, row.psnr_db, uris[0], uris[1], uris[2], width, height, is_worst, original))
    return shown, amplification, factor


def _printable_markup(value: object) -> object:
    if isinstance(value, Markup):
        return Markup(printable(str(value)))
    return printable(value) if isinstance(value, str) else value


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable_markup,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "decibels": decibels, "megabytes": megabytes, "milliseconds": milliseconds, "number": number,
        "check_value": check_value, "check_limit": check_limit, "check_margin": check_margin,
    }  # fmt: skip
    environment.globals |= {
        "bar": lambda *args, **options: Markup(bar(*args, **options)),
        "strip": lambda parts, label: Markup(strip(parts, label)),
        "medians_db": medians_db, "colours": SERIES_COLOURS,
    }  # fmt: skip
    return environment.get_template("template.html.jinja")

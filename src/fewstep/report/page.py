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
from fewstep.report.bought import Bought
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

VISIBLE_CHECKS = 20
"""Rows of the table of checks that are shown at once; the rest unfolds."""

LONGEST_EDGE = 384
"""Pictures with a longer edge, in pixels, are shown at 1/2, 1/3, ... of their size, to keep the page small."""

ERRORS = ("lowering", "compression")
LEVELS = ("component", "trajectory", "picture")

_MINUS = "\N{MINUS SIGN}"
_IDEAL = {"%": 100.0, "": 1.0}
"""The far end of a bounded scale, by unit: a share in percent; SSIM, a cosine, a spread."""


@dataclass(frozen=True)
class CheckRow:
    """One parity check: where it was made, what was measured, the limit, and whether it passed."""

    error: str
    """``lowering`` (artifact against optimized PyTorch) or ``compression`` (optimized against original PyTorch)."""
    level: str
    """``component``, ``trajectory`` or ``picture``; others (``operator``) are shown after these."""
    component: str
    step: int | None
    """The step k, from 0, or None where the check is not of one step."""
    sample: str | None
    metric: str
    value: float
    limit: float | None
    """None where the value only informs: it is shown, but verifies nothing, and fails only if it is NaN."""
    passed: bool
    unit: str = "dB"
    """``dB``, ``%``, ``levels`` (whole quantization levels), or "" for a number between 0 and 1, such as SSIM."""
    at_least: bool = True
    """Whether the value must not be below the limit; otherwise it must not be above."""

    @property
    def holds(self) -> bool:
        """Whether the caller says that it passed and the numbers agree; NaN, or a limit nothing exceeds, never does."""
        if self.limit is None:
            return self.passed and not math.isnan(self.value)
        if self.at_least:
            return self.passed and self.limit > -math.inf and self.value >= self.limit
        return self.passed and self.limit < math.inf and self.value <= self.limit

    @property
    def counts(self) -> bool:
        """Whether the verdict depends on it: it has a limit, or has failed without one."""
        return self.limit is not None or not self.holds

    @property
    def margin(self) -> float:
        """How far the value is on the right side of its limit, in its unit; NaN where it has none."""
        if self.limit is None or self.value == self.limit:
            return 0.0 if self.limit is not None else math.nan
        return self.value - self.limit if self.at_least else self.limit - self.value

    @property
    def headroom(self) -> float:
        """The margin in a form that orders checks of different units: 1 is 20 dB, or the way to an end of the scale.

        Whole levels are counted to the next one: a difference of 1 within a limit of 1 has half its headroom left.
        """
        if self.limit is None or math.isnan(self.margin):
            return math.inf if self.holds else -math.inf
        if self.unit == "dB" or not math.isfinite(self.margin):
            return self.margin / 20.0
        if self.unit == "levels":
            return (self.margin + 1.0) / (abs(self.limit) + 1.0)
        room = min(abs(self.limit), abs(_IDEAL[self.unit] - self.limit) if self.unit in _IDEAL else math.inf)
        return self.margin / (room or 1.0)


@dataclass(frozen=True)
class PictureRow:
    """One sample: its prompt, the two float32 [H, W, 3] pictures in [-1, 1], and the PSNR of the second in dB."""

    caption: str
    reference_HWC: images.FloatPicture
    bundle_HWC: images.FloatPicture
    psnr_db: float
    original_HWC: images.FloatPicture | None = None
    """The picture of the original network, where the reference is a compressed one."""


@dataclass(frozen=True)
class SizeRow:
    """The artifact of one component; ``original_bytes`` is what the same component weighed before."""

    component: str
    precision: str
    bytes: int
    original_bytes: int | None = None


@dataclass(frozen=True)
class LatencyRow:
    """The time of one call of a component, and how often one picture calls it; rows are in the order of the calls."""

    component: str
    calls: int
    median_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class ScheduleTable:
    """One schedule: the names of its columns and one row of values per step k."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[float | int | str | None, ...], ...]


@dataclass(frozen=True)
class Section:
    """One line of a list of facts; a value may have several lines."""

    key: str
    value: str


@dataclass(frozen=True)
class PlanRow:
    """What quantization makes of one component: how many weights at which bits, and how many tensors on grids."""

    component: str
    weights: str
    granularity: str
    activations: int
    computes: int
    """Operations that multiply whole numbers; the others dequantize their weight and compute in float."""
    floats: int
    """Weights that stay in float."""


@dataclass(frozen=True)
class ReasonRow:
    """Why tensors of a kind stay in float: how many, and the name of the first."""

    component: str
    kind: str
    count: int
    example: str
    reason: str


@dataclass(frozen=True)
class CoverageRow:
    """Calibration calls of one component at one step in one branch of guidance."""

    component: str
    step: int | None
    branch: str
    count: int
    prompts: int
    seeds: int
    timesteps: tuple[float, ...]


@dataclass(frozen=True)
class QuantizationFacts:
    """How a bundle was quantized."""

    methods: Sequence[Section]
    plans: Sequence[PlanRow]
    reasons: Sequence[ReasonRow]
    coverage: Sequence[CoverageRow]


@dataclass(frozen=True)
class ReportData:
    """All that the page shows. What is left empty is shown as not checked or not measured, never left out."""

    title: str
    subtitle: str
    created: str
    checks: Sequence[CheckRow]
    caveats: Sequence[str]
    """What this report does not prove, one sentence each."""
    pictures: Sequence[PictureRow] = ()
    curves: Sequence[CurveChart] = ()
    sizes: Sequence[SizeRow] = ()
    latencies: Sequence[LatencyRow] = ()
    whole_latency: LatencyRow | None = None
    """One picture from prompt to pixels, measured as a whole (``calls`` is 1)."""
    latency_note: str = ""
    """Where and how it was measured: the device, threads, number of runs, and what the spread is."""
    peak_memory_bytes: int | None = None
    precision_notes: Sequence[str] = ()
    """What precision really runs, one sentence each."""
    contract: Sequence[Section] = ()
    schedules: Sequence[ScheduleTable] = ()
    bought: Bought | None = None
    environment: Sequence[Section] = ()
    licences: Sequence[Section] = ()
    quantization: QuantizationFacts | None = None
    """None where nothing is quantized: the page then has no such section."""


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

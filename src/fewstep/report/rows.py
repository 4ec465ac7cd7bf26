"""What a report says, as plain values: rows of its tables, and all of it together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.report import images
from fewstep.report.bought import Account
from fewstep.report.charts import CurveChart

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
    removed: Account | None = None
    """What static steps took out of the loop; None where the networks are told the time."""
    bought: Account | None = None
    environment: Sequence[Section] = ()
    licences: Sequence[Section] = ()
    quantization: QuantizationFacts | None = None
    """None where nothing is quantized: the page then has no such section."""

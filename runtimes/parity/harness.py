"""The one harness that compares results: levels, two errors, and nothing compared is a failure.

*Compression* is the optimized PyTorch network against the original; *lowering* is the artifact against the optimized
PyTorch network that it was compiled from. They are never mixed in one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep.bundle.samples import Sample
from fewstep.bundle.schedule import Schedule
from fewstep.numerics.metrics import psnr_db, sqnr_db, ssim
from fewstep.recipe.recipe import Limits
from fewstep.runtimes.base import Session

Array = npt.NDArray[Any]

LOWERING = "lowering"
LOWERING_FP16 = "lowering, fp16"
COMPRESSION = "compression"
# Rounding each result to fp16 costs 2^-11 of it, 70 dB; what dozens of layers make of that is 60 to 65 dB, and 50 is a
# defect. In a picture 45 dB is 1.4 levels of 255.
FP16_LIMITS = Limits(component_sqnr_db=50.0, picture_psnr_db=45.0)
# Half an 8-bit level: a picture whose values spread less than this is one flat colour on every screen.
FLAT = 0.5 / 255
# What rounding to float32 changes at most, relative to the number. Measured for Euler's scheduler from sigma 4096, both
# sides together are at 0.6 of it.
_HALF_ULP = 2.0**-24


@dataclass(frozen=True)
class Check:
    """One comparison. ``passed`` needs ``value >= limit``; NaN never passes, and no limit means it only informs."""

    error: str
    level: str
    component: str
    step: int | None
    sample: str | None
    tensor: str | None
    metric: str
    value: float
    limit: float | None
    runtime: str | None = None
    """Whose artifacts were compared, where there are several targets."""

    @property
    def passed(self) -> bool:
        """Whether the value keeps its limit."""
        return not math.isnan(self.value) and (self.limit is None or self.value >= self.limit)

    @property
    def where(self) -> str:
        """Where the comparison was made, for people."""
        parts = [self.component] if self.runtime is None else [f"{self.component} ({self.runtime})"]
        parts += [f"step {self.step}"] if self.step is not None else []
        parts += [str(part) for part in (self.tensor, self.sample) if part]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Returns the check as JSON-ready values; infinities and NaN as text."""
        value: float | str = self.value if math.isfinite(self.value) else str(self.value)
        return {**self.__dict__, "value": value, "passed": self.passed}


@dataclass(frozen=True)
class Agreement:
    """What several comparisons came to, in dB: enough to tell whether others come to less."""

    median_db: float
    spread_db: float
    """The standard deviation of normal values, from the median distance to the median."""
    count: int


@dataclass(frozen=True)
class Floor:
    """What two executions of a quantized reference agree to: the outputs of each component, and the pictures."""

    components: Mapping[str, Agreement]
    picture: Agreement

    def to_json(self) -> dict[str, Any]:
        """Returns the floor as JSON-ready values."""
        return {"components": {name: asdict(a) for name, a in self.components.items()}, "picture": asdict(self.picture)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Floor:
        """Returns the floor of what `to_json` gave."""
        components = {name: Agreement(**agreement) for name, agreement in values["components"].items()}
        return cls(components, Agreement(**values["picture"]))


@dataclass(frozen=True)
class ParityReport:
    """All checks of one verification. True only if at least one gating check ran and all passed."""

    checks: tuple[Check, ...]
    reference: str
    executor: str
    floor: Floor | None = None
    """What two executions of the reference agree to, where it computes with whole numbers."""

    def __bool__(self) -> bool:
        """Whether the artifact is verified."""
        return any(check.limit is not None for check in self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def worst(self, error: str, level: str) -> Check | None:
        """Returns the check that decides a level: a failed one if any, else the one in dB with the least margin."""
        gating = [c for c in self.checks if (c.error, c.level) == (error, level) and c.limit is not None]

        def order(check: Check) -> tuple[bool, bool, float]:
            margin = -math.inf if math.isnan(check.value) else check.value - (check.limit or 0.0)
            return check.passed, not check.metric.endswith("dB"), margin

        return min(gating, key=order, default=None)

    def summary(self) -> dict[str, Any]:
        """Returns the verdict and the worst value of every level, JSON-ready."""
        levels = sorted({(c.error, c.level) for c in self.checks if c.limit is not None})
        worst = {f"{error}.{level}": check.to_json() for error, level in levels if (check := self.worst(error, level))}
        return {
            "passed": bool(self),
            "checks": len(self.checks),
            "failed": len(self.failures),
            "reference": self.reference,
            "executor": self.executor,
            "worst": worst,
            "floor": None if self.floor is None else self.floor.to_json(),
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the summary and every check."""
        return {**self.summary(), "all": [check.to_json() for check in self.checks]}


def fold(reports: Mapping[str, ParityReport]) -> ParityReport:
    """Returns one report of the reports of several runtimes, by name: true only if each of them is.

    Compression is an error of the network and not of a runtime: it is told once.
    """
    if len(reports) == 1:
        return next(iter(reports.values()))
    checks: list[Check] = []
    for name, report in reports.items():
        found = [check if check.error == COMPRESSION else replace(check, runtime=name) for check in report.checks]
        checks += [check for check in found if check.error != COMPRESSION or check not in checks]
        gating = sum(check.limit is not None and check.error != COMPRESSION for check in report.checks)
        if gating == 0:
            checks.append(Check(LOWERING, "component", "bundle", None, None, None, "checks made", 0.0, 1.0, name))
    first = next(iter(reports.values()))
    executors = "; ".join(report.executor for report in reports.values())
    floor = next((report.floor for report in reports.values() if report.floor is not None), None)
    return ParityReport(tuple(checks), first.reference, executors, floor)


def compare_components(
    samples: Iterable[Sample],
    session: Callable[[str], Session],
    limit_db: Callable[[str], float | None],
    *,
    error: str = LOWERING,
) -> list[Check]:
    """Returns the SQNR of every output of every recorded network call, each fed with the reference's own inputs.

    ``limit_db`` gives the limit of a component; None only informs.
    """
    checks = []
    for sample in samples:
        for feed in sample.feeds:
            outputs = session(feed.component).run(feed.inputs)
            for name, reference in feed.outputs.items():
                value = sqnr_db(reference, outputs[name]) if name in outputs else float("nan")
                checks.append(
                    Check(
                        error,
                        "component",
                        feed.component,
                        feed.step,
                        label(sample),
                        name if feed.branch == "cond" else f"{name} ({feed.branch})",
                        "SQNR dB",
                        value,
                        limit_db(feed.component),
                    )
                )
    return checks


def trajectory_limits(limit: float | None, latents: Sequence[Array], start: float) -> list[float | None]:
    """Returns the limit of the latent after each step: the given one, or what float32 lets the reference itself keep.

    A step that makes a latent of one that is thousands of times larger (schedulers that start at sigma 4096, where
    nothing is left of the picture) subtracts nearly equal numbers: the float32 in which the reference holds the larger
    one rounds the smaller one by 2^-24 of the larger. The error relative to the latent stays as latents shrink.

    Args:
        limit: in dB; None for none.
        latents: of the reference, after each step.
        start: how large the first latent's noise is.
    """
    found: list[float | None] = []
    before, squared = abs(start), 0.0
    for latent in latents:
        size = math.sqrt(float(np.mean(np.square(latent, dtype=np.float64))))
        squared += (_HALF_ULP * before / size) ** 2 if size else 0.0
        floor = -10 * math.log10(squared) if squared else math.inf
        found.append(None if limit is None else min(limit, floor))
        before = size
    return found


def compare_samples(
    references: Sequence[Sample],
    results: Sequence[Sample],
    limit: float | None,
    *,
    error: str = LOWERING,
    schedules: Mapping[int, Schedule] | None = None,
) -> list[Check]:
    """Returns the checks of free-running samples: the latent after each step, the picture, and that it is a picture.

    Lowering is checked sample by sample. Compression moves some samples further than others (a few steps can turn to
    another picture altogether), so the limit is one of their mean.
    """
    checks = []
    each = limit if error != COMPRESSION else None
    for reference, result in zip(references, results, strict=True):
        where = label(reference)
        # A latent is a picture's worth of one decoder call away from the picture, so it shares the picture's limit.
        if error != COMPRESSION:
            start = 1.0 if schedules is None else schedules[reference.steps].init_scale
            limits = trajectory_limits(each, reference.latents, start)
            for k, (x_reference, x) in enumerate(zip(reference.latents, result.latents, strict=True)):
                value = sqnr_db(x_reference, x)
                checks.append(Check(error, "trajectory", "denoiser", k, where, "latent", "SQNR dB", value, limits[k]))
        checks.append(_outputs(error, reference, result, each))
        if reference.kind == "picture":
            value = ssim(reference.output, result.output)
            checks.append(Check(error, "picture", "picture", None, where, None, "SSIM", value, None))
        checks.append(_not_flat(error, where, result.picture_HWC))
        if error == LOWERING and each is not None:
            checks += largest_check(reference, result, each)
    if error == COMPRESSION:
        mean = mean_db(agreement_db(a, b) for a, b in zip(references, results, strict=True))
        metric = "mean PSNR dB" if references[0].kind == "picture" else "mean SQNR dB"
        checks.append(Check(error, "picture", references[0].kind, None, None, None, metric, mean, limit))
    return checks


def label(sample: Sample) -> str:
    """Returns what checks call a sample."""
    return f"{sample.label}, {sample.steps} steps"


def agreement_db(reference: Sample, result: Sample) -> float:
    """Returns the PSNR of pictures; of other outputs, which have no peak that all share, the SQNR."""
    metric = psnr_db if reference.kind == "picture" else sqnr_db
    return metric(reference.output, result.output)


def mean_db(values: Iterable[float]) -> float:
    """Returns the mean of decibels; equal arrays (infinity) count as 150 dB, beyond float32."""
    found = [min(value, 150.0) for value in values]
    return math.fsum(found) / len(found) if found else math.nan


def _outputs(error: str, reference: Sample, result: Sample, limit: float | None) -> Check:
    metric = "PSNR dB" if reference.kind == "picture" else "SQNR dB"
    value = agreement_db(reference, result)
    return Check(error, "picture", reference.kind, None, label(reference), None, metric, value, limit)


# A mean over a picture hides one value that is wrong. Errors of rounding are spread as normal ones are: of a million,
# the largest is 5 times the root of the mean square. Half a level of 8 bits is the least that is asked for.
_LARGEST, _HALF_LEVEL = 8.0, 0.5 / 255
LARGEST = "largest difference in levels, negated"


def largest_check(reference: Sample, result: Sample, limit_db: float, *, level: str = "picture") -> list[Check]:
    """Returns the check of the largest difference of two pictures' values, in levels of 255; none of other outputs."""
    if reference.kind != "picture":
        return []
    value = -float(np.max(np.abs(reference.output - result.output))) * 255
    return [Check(LOWERING, level, "picture", None, label(reference), None, LARGEST, value, -most_levels(limit_db))]


def most_levels(limit_db: float) -> float:
    """Returns the largest difference of a picture's values that a limit of its PSNR allows, in levels of 255."""
    return 255 * max(_HALF_LEVEL, _LARGEST * 10 ** (-limit_db / 20))


def _not_flat(error: str, label: str, picture_HWC: Array) -> Check:
    """Two black pictures agree perfectly; this check is what refuses them."""
    return Check(error, "picture", "picture", None, label, None, "spread (std)", float(np.std(picture_HWC)), FLAT)

"""Parity of artifacts that compute with whole numbers, where decibels between two executions say little.

Roundings that fall the other way grow through a network until two correct executions differ as much as quantization
itself does. So lowering is checked in three ways: operation by operation in whole numbers; end to end against the
noise floor, which is the same graph under another kernel of PyTorch; and in the mean distance from the original.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fewstep.feeds import Sample
from fewstep.recipe import Limits
from fewstep.runtimes.base import PointResult
from fewstep.runtimes.parity import LOWERING, Check, Floor, agreement_db, label, mean_db

# Two kernels sum in another order, about 1e-7 of a value apart: one value in 10^4 lies that close to the middle between
# two integers. A wrong zero point, scale or weight moves most of them.
EQUAL_SHARE = 0.999
# An integer may fall to the other side, never further.
LARGEST_DIFFERENCE = 1
# How far below the noise floor an artifact may be: the floor is itself known to about this from some samples.
BELOW_FLOOR_DB = 1.0
# How much worse than the quantized reference an artifact may be, in its mean distance from the original.
MEAN_DB = 0.5


def operation_checks(component: str, sample: Sample, step: int | None, points: Iterable[PointResult]) -> list[Check]:
    """Returns two checks for each quantized tensor of a call: the share of equal values, and the largest difference."""
    checks = []
    for point in points:
        tensor = f"{point.module_path} ({point.tensor})"
        where = (LOWERING, "operation", component, step, label(sample), tensor)
        checks.append(Check(*where, "equal integers", point.equal, EQUAL_SHARE))
        checks.append(Check(*where, "largest difference, negated", -point.largest, -LARGEST_DIFFERENCE))
    return checks


def floor_checks(
    floor: Floor,
    limits: Limits,
    components: Mapping[str, Sequence[float]],
    references: Sequence[Sample],
    results: Sequence[Sample],
) -> list[Check]:
    """Returns the checks of every component's mean SQNR and of the pictures' mean PSNR against the noise floor.

    A floor above what is asked of float arithmetic asks for no more than that.

    Args:
        floor: what two executions of the reference agree to.
        limits: of float arithmetic.
        components: SQNR of each call, by component; those that compute with whole numbers.
        references: samples of the reference.
        results: the same samples of the artifact.
    """
    checks = []
    for component, values in components.items():
        limit = min(floor.components[component] - BELOW_FLOOR_DB, limits.component_sqnr_db)
        checks.append(_mean("component", component, "mean SQNR dB", mean_db(values), limit))
    value = mean_db(agreement_db(a, b) for a, b in zip(references, results, strict=True))
    limit = min(floor.picture - BELOW_FLOOR_DB, limits.picture_psnr_db)
    checks.append(_mean("picture", references[0].kind, "mean dB to the reference", value, limit))
    return checks


def mean_check(originals: Sequence[Sample], references: Sequence[Sample], results: Sequence[Sample]) -> Check:
    """Returns the check that the artifact is as near to the original as the quantized reference is."""
    reference = mean_db(agreement_db(a, b) for a, b in zip(originals, references, strict=True))
    result = mean_db(agreement_db(a, b) for a, b in zip(originals, results, strict=True))
    return _mean("picture", originals[0].kind, "mean dB to the original", result, reference - MEAN_DB)


def _mean(level: str, component: str, metric: str, value: float, limit: float) -> Check:
    return Check(LOWERING, level, component, None, None, None, metric, value, limit)

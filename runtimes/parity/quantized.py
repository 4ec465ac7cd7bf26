"""Parity of artifacts that compute with whole numbers, where decibels between two executions say little.

Roundings that fall the other way grow through a network until two correct executions differ as much as quantization
itself does. So lowering is checked in three ways: operation by operation in whole numbers; end to end against the
noise floor, which is the same graph under another kernel of PyTorch; and in the mean distance from the original.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from fewstep.bundle.samples import Sample
from fewstep.recipe.recipe import Limits
from fewstep.runtimes.base import PointResult
from fewstep.runtimes.parity.harness import LOWERING, Agreement, Check, Floor, agreement_db, label, mean_db

# Two kernels sum in another order, about 1e-7 of a value apart: one value in 10^4 lies that close to the middle between
# two integers. What grids inside of a kernel do is only seen in a sum of many: this share of them may fall otherwise.
EQUAL_SHARE = 0.999
# An output that is computed in float from the reference's own integers: the limit of weight-only components. What is
# multiplied in whole numbers is exact until it is scaled, what is not is a few operations deep.
OUTPUT_SQNR_DB = 80.0
# Integers inside of a kernel show in what it makes of them. One that falls to the other side is a whole step off, which
# has 12 times the power that rounding has in the mean: where a share of 1 - EQUAL_SHARE does, the result is so much
# nearer to the reference's than that is to the product without grids.
_ABOVE_NOISE_DB = -10 * math.log10(12 * (1 - EQUAL_SHARE))
# How far below the noise floor an artifact may be, beyond what the samples leave unsure.
BELOW_FLOOR_DB = 1.0
# How much worse than the quantized reference an artifact may be, in its mean distance from the original.
MEAN_DB = 0.5
# The standard error of the median of normal values, in those of their mean: sqrt(pi / 2).
_MEDIAN_TO_MEAN = 1.2533
# What equal arrays count as: beyond float32.
_EQUAL_DB = 150.0


def operation_checks(component: str, sample: Sample, step: int | None, points: Iterable[PointResult]) -> list[Check]:
    """Returns two checks for each quantized tensor of a call: integers that no rounding explains, and the equal ones.

    None may be unexplained; how many fell to the other side of a rounding only informs. Outputs in float, which no
    quantized tensor would show an error of, have one of their SQNR.
    """
    checks = []
    for point in points:
        tensor = f"{point.module_path} ({point.tensor})"
        where = (LOWERING, "operation", component, step, label(sample), tensor)
        if point.sqnr_db is not None:
            hidden = math.inf if point.noise_db is None else point.noise_db + _ABOVE_NOISE_DB
            checks.append(Check(*where, "SQNR dB", point.sqnr_db, min(hidden, OUTPUT_SQNR_DB)))
            continue
        checks.append(Check(*where, "unexplained integers, negated", -float(point.unexplained), 0.0))
        checks.append(Check(*where, "equal integers", point.equal, None))
    return checks


def floor_checks(
    floor: Floor,
    limits: Limits,
    components: Mapping[str, Sequence[float]],
    references: Sequence[Sample],
    results: Sequence[Sample],
) -> list[Check]:
    """Returns the checks of every component's SQNR and of the pictures' PSNR against the noise floor.

    Medians of both are compared: now and then no rounding of a call falls the other way, and it agrees to 100 dB among
    others at 30. Above the limit of float pictures (60 dB, beyond 8 bits of colour) a handful of roundings decide, of
    which one more is several dB: no more than that is asked.

    Args:
        floor: what two executions of the reference agree to, see `floor_of`.
        limits: of float arithmetic.
        components: SQNR of each call, by component; those that compute with whole numbers.
        references: samples of the reference.
        results: the same samples of the artifact.
    """
    agreements = [agreement_db(a, b) for a, b in zip(references, results, strict=True)]
    return floor_checks_of(floor, limits, components, agreements, references[0].kind)


def floor_checks_of(
    floor: Floor, limits: Limits, components: Mapping[str, Sequence[float]], agreements: Sequence[float], kind: str
) -> list[Check]:
    """Returns the checks of `floor_checks` for samples of a kind of which only the agreement in dB is known."""

    def check(level: str, component: str, metric: str, known: Agreement, values: Sequence[float]) -> Check:
        limit = floor_limit(known, max(len(values), 1), limits.picture_psnr_db)
        return _one(level, component, metric, median(values) if values else math.nan, limit)

    checks = [
        check("component", component, "median SQNR dB", floor.components[component], values)
        for component, values in components.items()
    ]
    return [*checks, check("picture", kind, "median agreement dB", floor.picture, agreements)]


# Right executions of the built-in generator scatter by 1.9 dB in a call of its denoiser and by 2 to 3 in a picture.
# From eight values on, a spread of their own is known to a third.
_USUAL_DB, _ENOUGH = 2.0, 8
# A spread beyond that of right executions is not theirs: some calls had no rounding that fell the other way, others
# one. It says nothing of how far below the median another right execution may be.
MOST_SPREAD_DB = 3.0


def floor_limit(floor: Agreement, count: int, most_db: float) -> float:
    """Returns the least dB that the median of ``count`` values must have, to be no further away than the floor.

    A second right execution gives other values of the same distribution. Two standard errors of the difference of both
    medians (a median's is 1.2533 times a mean's) are what so few values leave unsure. The spread is that of the floor
    alone: values that scatter more than right ones would be no excuse for themselves.
    """
    unsure = 2 * _MEDIAN_TO_MEAN * min(floor.spread_db, MOST_SPREAD_DB) * math.sqrt(1 / floor.count + 1 / count)
    return min(floor.median_db - BELOW_FLOOR_DB - unsure, most_db)


def recorded_floor_checks(recorded: Floor, measured: Floor, limits: Limits) -> list[Check]:
    """Returns the checks of the floor in a manifest, which a device reads, against one measured now.

    One far below would let a wrong artifact pass. Both are medians of right executions and differ as such.
    """
    named = {**{name: (floor, measured.components.get(name)) for name, floor in recorded.components.items()}}
    pairs = {**named, "picture": (recorded.picture, measured.picture)}
    checks = []
    for name, (kept, now) in pairs.items():
        if now is not None:
            # Of fewer values measured now, one mode of two may be all that is seen.
            enough = now.count >= _ENOUGH
            limit = floor_limit(now, kept.count, limits.picture_psnr_db) if enough else None
            value = min(kept.median_db, _EQUAL_DB)
            checks.append(Check(LOWERING, "manifest", name, None, None, None, "recorded floor dB", value, limit))
    return checks


def floor_of(
    components: Mapping[str, Sequence[float]], references: Sequence[Sample], others: Sequence[Sample]
) -> Floor:
    """Returns the noise floor from a second execution: SQNR of each call by component, and the same samples."""
    pictures = [agreement_db(a, b) for a, b in zip(references, others, strict=True)]
    return Floor({name: agreement_of(values) for name, values in components.items()}, agreement_of(pictures))


def agreement_of(values: Sequence[float]) -> Agreement:
    """Returns what comparisons in dB came to."""
    known = [min(value, _EQUAL_DB) for value in values]
    return Agreement(median(known), _spread(known), len(known))


def _spread(values: Sequence[float]) -> float:
    """Returns the standard deviation of normal values, from their median distance to the median.

    Outliers do not widen it: neither calls that agree to 100 dB by luck, nor a sample that is broken. Fewer than
    `_ENOUGH` values can lie close together by chance, and one says nothing: `_USUAL_DB` then counts like two of them.
    """
    middle = median(values)
    own = 1.4826 * median(abs(value - middle) for value in values)
    if len(values) >= _ENOUGH:
        return own
    return math.sqrt((len(values) * own**2 + 2 * _USUAL_DB**2) / (len(values) + 2))


def mean_check(originals: Sequence[Sample], references: Sequence[Sample], results: Sequence[Sample]) -> Check:
    """Returns the check that the artifact is as near to the original as the quantized reference is, in the mean.

    The two fall to either side of one another sample by sample; two standard errors of the mean difference are what
    the samples leave unsure.
    """
    pairs = zip(originals, references, results, strict=True)
    both = [(min(agreement_db(o, a), _EQUAL_DB), min(agreement_db(o, b), _EQUAL_DB)) for o, a, b in pairs]
    differences = [result - reference for reference, result in both]
    unsure = 2 * _spread(differences) / math.sqrt(len(differences))
    reference, result = (mean_db(values) for values in zip(*both, strict=True))
    limit = reference - MEAN_DB - unsure
    return _one("picture", originals[0].kind, "mean agreement with the original dB", result, limit)


def _one(level: str, component: str, metric: str, value: float, limit: float) -> Check:
    return Check(LOWERING, level, component, None, None, None, metric, value, limit)

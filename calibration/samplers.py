"""Which calls of the denoiser a calibration keeps: samplers by name.

A sampler says, for each trajectory of the reference, which of its N steps are kept, until there are as many calls as
asked for. Most keep one call of a trajectory, so that no two calls share their noise; ``own`` keeps all, at an N-th of
the cost. What the calls were given can be replaced afterwards (``qsample``, ``random``), to measure what that costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep.bundle.samples import Sample, StepFeed
from fewstep.errors import CalibrationError
from fewstep.numerics import noise

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

# PTQ4DM's script, in units of the time from clean (0) to noise (1).
NDTC_MEAN = NDTC_SPREAD = 0.4
# Weight of the variety term beside that of density, and fewest steps that have something to be compared.
TDAC_VARIETY, TDAC_FEWEST = 1.0, 3
# Draws of noise beyond those of any sampler and of `fewstep.numerics.inputs`.
_OFFSET = 1 << 29

Kept = tuple[int, ...]
"""Steps of one trajectory that are kept, in order."""
Features = Callable[[], tuple[Floats, str]]
"""() -> (features of each step [M, N, F] for M trajectories, where they were taken)."""


@dataclass(frozen=True)
class LatentNames:
    """Names of the inputs, by component, that are the latent of a step and the final latent."""

    of_step: dict[str, str]
    final: dict[str, str]


@dataclass(frozen=True)
class Question:
    """What a sampler has to go by: how many calls, of how many steps, and what may be asked."""

    size: int
    steps: int
    seed: int
    features: Features


@dataclass(frozen=True)
class Choice:
    """The kept steps of each trajectory, and what a report should say of them."""

    kept: tuple[Kept, ...]
    note: str


@dataclass(frozen=True)
class Sampler:
    """One way to choose calls.

    ``in_order`` takes prompts as they come, not shuffled. ``rewrite`` replaces what kept calls were given.
    """

    choose: Callable[[Question], Choice]
    in_order: bool = False
    rewrite: Callable[[Sample, LatentNames], Sample] | None = None


def get_sampler(name: str) -> Sampler:
    """Returns a sampler by name.

    Raises:
        CalibrationError: there is none of that name.
    """
    if name not in SAMPLERS:
        close = get_close_matches(name, SAMPLERS, n=1)
        raise CalibrationError(
            f"calibration sampler is {name!r}, expected one of {', '.join(SAMPLERS)}",
            hint=f"did you mean {close[0]!r}?" if close else None,
        )
    return SAMPLERS[name]


def prompt_order(count: int, prompts: int, steps: int, *, seed: int, in_order: bool) -> list[int]:
    """Returns the index of each trajectory's prompt: every prompt with every step in turn, in a seeded order.

    With one step kept of trajectory i, i modulo ``steps``, all pairs of prompt and step come up equally often.
    """
    order = list(range(prompts)) if in_order else np.random.default_rng([seed, 1]).permutation(prompts).tolist()
    cycle = math.lcm(prompts, steps)
    return [order[i % prompts] if in_order else order[(i + i // cycle) % prompts] for i in range(count)]


# ------------------------------------------------------------------------------------------------- which steps are kept


def _own(question: Question) -> Choice:
    count = math.ceil(question.size / question.steps)
    return Choice((tuple(range(question.steps)),) * count, f"all {question.steps} steps of {count} trajectories")


def _first(question: Question) -> Choice:
    whole, rest = divmod(question.size, question.steps)
    kept = [tuple(range(question.steps))] * whole + ([tuple(range(rest))] if rest else [])
    return Choice(tuple(kept), f"the first {question.size} calls, in the order of the prompts")


def _uniform(question: Question) -> Choice:
    kept = tuple((i % question.steps,) for i in range(question.size))
    return Choice(kept, f"one step of each of {question.size} trajectories, each step in turn")


def _single(question: Question) -> Choice:
    step = question.steps // 2
    return Choice(((step,),) * question.size, f"step {step} alone, of {question.size} trajectories")


def _ndtc(question: Question) -> Choice:
    """Normally distributed time-step calibration, with state and time label of one and the same step.

    Section 4.2 of Shang et al. (2023), arXiv:2211.15736; mean and spread as in the authors' script.
    """
    drawn = np.random.default_rng([question.seed, 2]).normal(NDTC_MEAN, NDTC_SPREAD, question.size)
    from_clean = np.clip((drawn * question.steps).astype(np.int64), 0, question.steps - 1)
    kept = tuple((question.steps - 1 - int(t),) for t in from_clean)
    return Choice(kept, f"times drawn normally around {NDTC_MEAN} (0 clean, 1 noise), {_shares(kept, question.steps)}")


def _tdac(question: Question) -> Choice:
    """Time-step distribution-aware alignment: more of steps that are like many others, and unlike the rest.

    Section 4.1 of EDA-DM, Liu et al. (2024), arXiv:2401.04585. The radius within which two steps count as alike is the
    median of all distances, where the paper sets it for each data set by hand.
    """
    if question.steps < TDAC_FEWEST:
        return _instead_of_tdac(question, f"{question.steps} steps leave nothing to compare")
    features, where = question.features()
    weights = step_weights(features)
    if weights is None:
        return _instead_of_tdac(question, f"by {where} all steps are alike")
    counts = allot(weights, question.size)
    return Choice(spread(counts), f"steps weighted by {where}, {_shares(spread(counts), question.steps)}")


def _instead_of_tdac(question: Question, why: str) -> Choice:
    uniform = _uniform(question)
    return Choice(uniform.kept, f"tdac is uniform here, {why}: {uniform.note}")


def step_weights(features_MNF: Floats) -> Floats | None:
    """Returns EDA-DM's weight of each step, [N], or None where density or variety do not tell steps apart."""
    trajectories, steps, _ = features_MNF.shape
    distance, unlike = np.zeros((steps, steps)), np.zeros((steps, steps))
    for f_NF in features_MNF:
        unit_NF = f_NF / np.maximum(np.linalg.norm(f_NF, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        distance += np.mean((f_NF[:, None] - f_NF[None]) ** 2, axis=-1) / trajectories
        unlike += (1 - unit_NF @ unit_NF.T) / trajectories
    others = ~np.eye(steps, dtype=bool)
    density = ((distance <= np.median(distance[others])) & others).sum(axis=1)
    variety = (unlike * others).sum(axis=1)
    if density.max() == density.min() or variety.max() == variety.min():
        return None
    terms = [(term - term.min()) / (term.max() - term.min()) for term in (density, variety)]
    return np.asarray(terms[0] + TDAC_VARIETY * terms[1], dtype=np.float64)


def allot(weights: Floats, size: int) -> list[int]:
    """Returns how many of ``size`` calls each step gets: one each, the rest in proportion, by largest remainders."""
    if size < len(weights):
        raise CalibrationError(f"size is {size}, expected at least one call for each of {len(weights)} steps")
    exact = weights / weights.sum() * (size - len(weights))
    counts = np.floor(exact).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: size - len(weights) - int(counts.sum())]:
        counts[i] += 1
    return [int(count) + 1 for count in counts]


def spread(counts: Sequence[int]) -> tuple[Kept, ...]:
    """Returns one kept step for each trajectory, each step ``counts`` times, evenly spread over them."""
    places = [((i + 0.5) / count, step) for step, count in enumerate(counts) for i in range(count)]
    return tuple((step,) for _, step in sorted(places))


def _shares(kept: Sequence[Kept], steps: int) -> str:
    counts = np.bincount(list(itertools.chain(*kept)), minlength=steps)
    return "calls of each step " + ", ".join(map(str, counts))


# ------------------------------------------------------------------------------------------------- what calls are given


def noised(sample: Sample, names: LatentNames) -> Sample:
    """Returns a sample whose latents are its own final one with noise added, as in training.

    How much of each is what the sampler itself has at the step: the share of the final latent in its latent by least
    squares, and the size of what remains. What the networks would answer is unknown: these calls have no outputs.
    """
    z = sample.latents[-1].astype(np.float64)

    def mix(feed: StepFeed, x: Array) -> Array:
        if x.shape != z.shape:
            raise CalibrationError(
                f"the latent of step {feed.step} is {list(x.shape)}, expected {list(z.shape)} as after the last one",
                hint="take the sampler own",
            )
        share = float(np.vdot(z, x) / np.vdot(z, z))
        return np.asarray(share * z + np.std(x - share * z) * _noise(sample, feed), dtype=x.dtype)

    return _with_latents(sample, names.of_step, mix)


def random_latents(sample: Sample, names: LatentNames) -> Sample:
    """Returns a sample whose latents are nothing but noise, of the mean and size of its own ones."""

    def draw(feed: StepFeed, x: Array) -> Array:
        return np.asarray(x.mean() + x.std() * _noise(sample, feed, x.shape), dtype=x.dtype)

    return _with_latents(sample, names.of_step | names.final, draw)


def _noise(sample: Sample, feed: StepFeed, shape: tuple[int, ...] | None = None) -> Floats:
    offset = _OFFSET if feed.step is None else _OFFSET + 1 + feed.step
    return noise.normal(sample.seed, offset, shape or sample.latents[-1].shape).astype(np.float64)


def _with_latents(sample: Sample, names: dict[str, str], make: Callable[[StepFeed, Array], Array]) -> Sample:
    def rewritten(feed: StepFeed) -> StepFeed:
        if feed.component not in names:
            return feed
        name = names[feed.component]
        return replace(feed, inputs={**feed.inputs, name: make(feed, feed.inputs[name])}, outputs={})

    return replace(sample, feeds=tuple(rewritten(feed) for feed in sample.feeds))


SAMPLERS = {
    "own": Sampler(_own),
    "uniform": Sampler(_uniform),
    "ndtc": Sampler(_ndtc),
    "tdac": Sampler(_tdac),
    "single": Sampler(_single),
    "first": Sampler(_first, in_order=True),
    "qsample": Sampler(_own, rewrite=noised),
    "random": Sampler(_own, rewrite=random_latents),
}

"""What a device computes between the network calls, checked by itself: no network runs.

A recorded sample is sampled again with the recorded outputs in the place of every network. What the host makes of them
(token ids, the embedding of the guidance scale, noise, the table of steps, the scale of the latent, the output) must be
what the reference recorded, to rounding. No error of a network hides in it, so that a difference says by itself where
it comes from, and a bundle that computes with integers is looked at as closely as one in float.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.bundle.contract import DRAW, GUIDANCE, INPUT, LATENT, MASK, NOISE, SAMPLE, STEP, TIME, TIMESTEP, TOKENS
from fewstep.bundle.manifest import Manifest
from fewstep.bundle.samples import Sample, StepFeed
from fewstep.errors import ContractError
from fewstep.numerics.metrics import sqnr_db
from fewstep.runtimes.base import Array, CheckedSession
from fewstep.runtimes.parity.harness import LOWERING, Check, agreement_db, label
from fewstep.runtimes.sampling.sampler import Sampler
from fewstep.text.tokens import Tokenizer

HOST = "host"
# Decibels of numbers that are equal or not: token ids and rows of the table.
_WRONG_DB = -math.inf

_Key = tuple[str, int | None, str]


@dataclass(frozen=True)
class _Compared:
    """A comparison before it is judged: where, of what, how close, and whether the sampler's own scale explains it."""

    place: str
    step: int | None
    tensor: str
    value_db: float


class _Playback(Sampler):
    """A sampler whose networks give what was recorded."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizers: Mapping[str, Tokenizer],
        recorded: Mapping[_Key, StepFeed],
        unconditional: Mapping[str, Array] | None,
    ) -> None:
        super().__init__(manifest.contract, manifest.components, tokenizers, _no_session, unconditional=unconditional)
        self._recorded = recorded

    def _answer(
        self, component: str, inputs: Mapping[str, Array], step: int | None, branch: str
    ) -> Mapping[str, Array]:
        feed = self._recorded.get((component, step, branch))
        if feed is not None:
            return feed.outputs
        for (name, at, _), other in self._recorded.items():  # the reference asks once for what is the same twice
            if (name, at) == (component, step) and _same(other.inputs, inputs):
                return other.outputs
        raise _NotRecordedError(component, step, branch)


class _NotRecordedError(Exception):
    """The host makes a call that the reference does not."""


def host_checks(
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    references: Sequence[Sample],
    limit_db: float,
    unconditional: Mapping[str, Array] | None = None,
) -> list[Check]:
    """Returns the checks of what the host makes of every recorded call of every sample that has its calls.

    Args:
        manifest: of the bundle, at the shape and batch of the samples.
        tokenizers: the bundle's, by name.
        references: recorded samples, of a batch one after the other; those without calls are passed over.
        limit_db: the least SQNR of what is a number; integers must be equal.
        unconditional: the bundle's tensors of the unconditional branch that are more than zeros, by origin.
    """
    checks = []
    for start in range(0, len(references), manifest.contract.batch):
        rows = references[start : start + manifest.contract.batch]
        if rows[0].feeds:
            for found in _compared(manifest, tokenizers, rows, unconditional):
                where = (LOWERING, HOST, found.place, found.step, label(rows[0]), found.tensor)
                checks.append(Check(*where, "SQNR dB", found.value_db, limit_db))
    return checks


def first_place(checks: Sequence[Check]) -> str | None:
    """Returns where the host first departs, None where it does not; checks are in the order of computation."""
    failed = (check for check in checks if check.level == HOST and not check.passed)
    return next((check.component for check in failed), None)


def _compared(
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    rows: Sequence[Sample],
    unconditional: Mapping[str, Array] | None,
) -> Iterator[_Compared]:
    recorded = {(feed.component, feed.step, feed.branch): feed for feed in rows[0].feeds}
    sampler = _Playback(manifest, tokenizers, recorded, unconditional)
    try:
        ours = sampler.batch(
            [sample.prompt for sample in rows],
            [sample.seed for sample in rows],
            manifest.schedule(rows[0].steps),
            guidance=rows[0].guidance,
            negative=rows[0].negative,
            inputs=[sample.inputs for sample in rows],
        )
    except _NotRecordedError as error:
        component, step, branch = error.args
        yield _Compared(f"call of {component} ({branch})", step, component, math.nan)
        return
    except ContractError as error:
        yield _Compared(f"contract: {error}", None, "sample", math.nan)
        return
    yield from _calls(manifest, ours, rows, recorded)
    for mine, sample in zip(ours, rows, strict=True):
        yield _Compared("output scale", None, sample.kind, agreement_db(sample, mine))


def _calls(
    manifest: Manifest, ours: Sequence[Sample], rows: Sequence[Sample], recorded: Mapping[_Key, StepFeed]
) -> Iterator[_Compared]:
    """Yields the comparison of every call's inputs and, behind the last call of each step, of the latent after it."""
    calls = ours[0].feeds
    for i, feed in enumerate(calls):
        known = recorded.get((feed.component, feed.step, feed.branch))
        theirs = known.inputs if known is not None else feed.inputs
        for name, values in feed.inputs.items():
            place = _place(manifest.components[feed.component].bindings[name], feed.step)
            tensor = f"{feed.component}.{name}" + ("" if feed.branch == "cond" else f" ({feed.branch})")
            value = _closeness_db(theirs.get(name), values)
            if place == "noise" and value < math.inf and feed.step == 0:
                place = _noise_or_scale(theirs[name], values)
            yield _Compared(place, feed.step, tensor, value)
        if feed.step is not None and (i + 1 == len(calls) or calls[i + 1].step != feed.step):
            for mine, sample in zip(ours, rows, strict=True):
                value = _closeness_db(sample.latents[feed.step], mine.latents[feed.step])
                yield _Compared(f"schedule step {feed.step}", feed.step, "latent", value)


def _place(origin: str, step: int | None) -> str:
    """Returns which part of the host makes a value, by its origin."""
    if origin.startswith((TOKENS, MASK)):
        return "tokenizer"
    if origin.startswith((NOISE, DRAW)):
        return "noise"
    if origin.startswith(INPUT):
        return f"input {origin.removeprefix(INPUT)}"
    if origin == LATENT:
        return "noise" if step == 0 else f"schedule step {(step or 0) - 1}"
    if origin in (TIMESTEP, STEP) or origin.startswith(TIME):
        return f"schedule step {step}"
    return {GUIDANCE: "guidance", SAMPLE: "latent scale"}.get(origin, f"binding of {origin}")


def _noise_or_scale(theirs: Array, ours: Array) -> str:
    """Returns what is wrong with the first latent: a multiple of the right one has the right noise."""
    a, b = theirs.astype(np.float64).ravel(), ours.astype(np.float64).ravel()
    factor = float(a @ b) / max(float(b @ b), 1e-300)
    return "schedule init_scale" if sqnr_db(a, factor * b) >= 60.0 else "noise"


def _closeness_db(theirs: Array | None, ours: Array) -> float:
    """Returns the SQNR of numbers; of integers, and of arrays of other shapes or types, whether they are equal."""
    if theirs is None or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return math.nan
    if ours.dtype.kind != "f":
        return math.inf if np.array_equal(theirs, ours) else _WRONG_DB
    return sqnr_db(theirs, ours)


def _same(theirs: Mapping[str, Array], ours: Mapping[str, Array]) -> bool:
    return theirs.keys() == ours.keys() and all(np.array_equal(values, theirs[name]) for name, values in ours.items())


def _no_session(component: str) -> CheckedSession:
    raise ContractError(f"{component} is not run when only the host is checked")

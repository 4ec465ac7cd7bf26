"""A bundle's golden pack replayed where its artifacts are meant to run, compared with PyTorch and with this machine.

Other machines are slow, emulated ones very: what is replayed is chosen by the time that it may take, in this order, and
what was left out is said. The calls of the first golden sample, each with the reference's own inputs; its operations
one by one, where it computes with whole numbers; the calls of the other samples that the pack has; pictures from their
prompts, as many as there is time for.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.manifest import INTEGERS, Manifest
from fewstep.bundle.samples import Sample
from fewstep.bundle.source import SourceSpec
from fewstep.errors import ContractError
from fewstep.numerics.metrics import sqnr_db
from fewstep.pipeline.bisect import answering
from fewstep.pipeline.execution_notes import executor_text
from fewstep.pipeline.references import (
    as_built,
    golden_samples,
    known_floor,
    limits_of,
    load_original,
    prepare,
    usable_source,
)
from fewstep.pipeline.verify import GOLDEN, Verification
from fewstep.progress import Progress, Silent
from fewstep.runtimes import get_runtime
from fewstep.runtimes.base import Array, CheckedSession, Runtime
from fewstep.runtimes.executors import NATIVE, get_executor
from fewstep.runtimes.parity.harness import (
    Check,
    ParityReport,
    agreement_db,
    compare_components,
    compare_samples,
    label,
)
from fewstep.runtimes.parity.quantized import floor_checks, operation_checks
from fewstep.runtimes.sampling.sampler import Sampler, open_sampler

MINUTES = 8.0
# What checks between two executors are called: neither is the reference of the other.
BETWEEN = "executors"


@dataclass
class _Budget:
    """The time that is left, and how long the last part took."""

    deadline: float
    longest_s: float = 0.0

    def has(self, parts: int = 1) -> bool:
        """Returns whether so many more parts, as long as the longest yet, would end in time."""
        return time.monotonic() + parts * self.longest_s <= self.deadline

    def took(self, started: float) -> None:
        """Notes a part that ends now."""
        self.longest_s = max(self.longest_s, time.monotonic() - started)


def replay(
    bundle: Bundle,
    executor: str,
    *,
    runtime: str | None = None,
    against: str | SourceSpec | None = None,
    minutes: float = MINUTES,
    progress: Progress | None = None,
) -> Verification:
    """Returns the comparison of a bundle, run by an executor, with its golden pack and with this machine.

    Args:
        bundle: the bundle.
        executor: name of the executor.
        runtime: which of the bundle's runtimes; None takes the first.
        against: the source that quantized operations are compared with, see `fewstep.pipeline.verify.verify`.
        minutes: how long replaying may take, beside preparing the executor; one sample is replayed in any case.
        progress: told of every sample.

    Raises:
        RuntimeMissingError: the executor cannot run here, cannot be prepared, or its process ended.
        BundleError: the bundle has no golden samples.
    """
    progress = progress or Silent()
    place = get_executor(executor)
    name = runtime or bundle.manifest.runtimes[0]
    here = get_runtime(name)
    golden = golden_samples(bundle, "")
    with place.at(here, progress) as there:
        part = _Replay(bundle, there, golden, _Budget(time.monotonic() + 60 * minutes), progress)
        part.run(against)
    if executor != NATIVE:
        part.compare_with(here)
    return part.verification(there, here if executor != NATIVE else None)


class _Replay:
    """What was replayed so far."""

    def __init__(
        self, bundle: Bundle, there: Runtime, golden: Sequence[Sample], budget: _Budget, progress: Progress
    ) -> None:
        self._bundle, self._there, self._golden = bundle, there, golden
        self._budget, self._progress = budget, progress
        self._manifest: Manifest = bundle.manifest
        self._limits = limits_of(self._manifest)
        artifacts = {c: self._manifest.artifact(there.name, c) for c in self._manifest.components}
        self._artifacts = artifacts
        self._integers = [component for component, artifact in artifacts.items() if artifact.compute == INTEGERS]
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self.replayed: list[Sample] = []
        """Golden samples whose calls were replayed, with the outputs from there."""
        self.results: list[Sample] = []

    def run(self, against: str | SourceSpec | None) -> None:
        """Replays what there is time for."""
        recorded = [sample for sample in self._golden if sample.feeds]
        if not recorded:
            raise ContractError("the golden pack has no network calls", hint="build the bundle again")
        sampler = open_sampler(self._bundle, runtime=self._there, exact=True)
        advance = self._progress.task("replay calls", len(recorded))
        try:
            self._calls(recorded[0], sampler)
            advance()
            if self._integers:
                self._operations(recorded[0], against)
            for sample in recorded[1:]:
                if self._budget.has(2):  # a picture has to fit behind it, which takes as long as its calls
                    self._calls(sample, sampler)
                advance()
            self._pictures(sampler)
        finally:
            sampler.close()
        if self._manifest.shapes:
            self.notes.append(
                f"not replayed: {', '.join(self._manifest.shapes)}, the bundle's further shapes and batches"
            )
        calls = sum(len(sample.feeds) for sample in self.replayed)
        of = sum(len(sample.feeds) for sample in recorded)
        self.notes.append(
            f"replayed {calls} of the golden pack's {of} network calls and {len(self.results)} of its "
            f"{len(self._golden)} pictures: the others would have taken longer than was allowed"
            if calls < of or len(self.results) < len(self._golden)
            else f"replayed all of the golden pack: {calls} network calls and {len(self.results)} pictures"
        )

    def compare_with(self, here: Runtime) -> None:
        """Adds the checks of the same calls and pictures on this machine, and says what they come to."""
        exact = not self._integers
        sampler = open_sampler(self._bundle, runtime=here, exact=True)
        values: dict[str, list[float]] = defaultdict(list)
        try:
            for sample in self.replayed:
                for feed in sample.feeds:
                    outputs = sampler.session(feed.component).run(feed.inputs)
                    limit = None if feed.component in self._integers else self._limits.component_sqnr_db
                    for name, there in feed.outputs.items():
                        value = sqnr_db(outputs[name], there)
                        values[feed.component].append(value)
                        at, tensor = label(sample), name if feed.branch == "cond" else f"{name} ({feed.branch})"
                        self.checks.append(
                            Check(BETWEEN, "component", feed.component, feed.step, at, tensor, "SQNR dB", value, limit)
                        )
            for there_sample in self.results:
                ours = _draw(self._bundle, sampler, there_sample)
                value = agreement_db(ours, there_sample)
                limit = self._limits.picture_psnr_db if exact else None
                at = label(ours)
                self.checks.append(Check(BETWEEN, "picture", ours.kind, None, at, None, "agreement dB", value, limit))
                values["picture"].append(value)
        finally:
            sampler.close()
        least = ", ".join(f"{name} {min(found):.1f} dB" for name, found in values.items())
        self.notes.append(f"agreement with {here.name} on this machine, at least: {least}")

    def verification(self, there: Runtime, here: Runtime | None) -> Verification:
        """Returns what was found."""
        executor = executor_text(there, self._artifacts.values())
        reference = GOLDEN if here is None else f"{GOLDEN}, and {here.name} on this machine"
        floor = known_floor(self._bundle) if self._integers else None
        report = ParityReport(tuple(self.checks), reference, executor, floor)
        drawn = {label(sample) for sample in self.results}
        references = tuple(sample for sample in self._golden if label(sample) in drawn)
        return Verification(report, references, tuple(self.results), tuple(self.notes))

    def _calls(self, sample: Sample, sampler: Sampler) -> None:
        """Compares every call of a golden sample, and keeps what came out of it."""
        started = time.monotonic()
        kept: list[Mapping[str, Array]] = []
        self.checks += compare_components(
            [sample],
            lambda component: _Kept(sampler.session(component), kept),
            lambda component: None if component in self._integers else self._limits.component_sqnr_db,
        )
        self._budget.took(started)
        feeds = (replace(feed, outputs=outputs) for feed, outputs in zip(sample.feeds, kept, strict=True))
        self.replayed.append(replace(sample, feeds=tuple(feeds)))

    def _operations(self, sample: Sample, against: str | SourceSpec | None) -> None:
        """Compares the operations of a sample's calls one by one, where the source is at hand."""
        source, reason = usable_source(self._bundle, against)
        if source is None or self._there.compare_integers is None:
            self.notes.append(f"quantized operations were not compared one by one: {reason or 'nothing compares them'}")
            return
        original = as_built(load_original(self._bundle, source, self._progress), self._manifest)
        quantized = prepare(self._bundle, original)[2]
        assert quantized is not None, "its artifacts compute with whole numbers"
        advance = self._progress.task("compare operations", len(self._integers))
        left_out = 0
        for component in self._integers:
            made = quantized.make(component)
            for i, feed in enumerate(f for f in sample.feeds if f.component == component):
                if i > 0 and not self._budget.has(2):
                    left_out += 1
                    continue
                started = time.monotonic()
                program, inputs, variant = answering(self._manifest, made, feed.inputs)
                artifact = self._manifest.artifact(self._there.name, component, variant)
                path, compare = self._bundle.file(artifact.path), self._there.of(artifact).compare_integers
                assert compare is not None, "of one graph as of another"
                self.checks += operation_checks(component, sample, feed.step, compare(program, path, inputs))
                self._budget.took(started)
            advance()
        if left_out:
            self.notes.append(f"{left_out} calls were not compared operation by operation, for want of time")

    def _pictures(self, sampler: Sampler) -> None:
        """Draws golden samples from their prompts, the first in any case."""
        advance = self._progress.task("draw pictures", len(self._golden))
        for sample in self._golden:
            if self.results and not self._budget.has():
                break
            started = time.monotonic()
            self.results.append(_draw(self._bundle, sampler, sample))
            self._budget.took(started)
            advance()
        references = self._golden[: len(self.results)]
        self.checks += compare_samples(
            references,
            self.results,
            None if self._integers else self._limits.picture_psnr_db,
            schedules=self._manifest.schedules,
        )
        if self._integers:
            found = {
                name: [c.value for c in self.checks if (c.level, c.component) == ("component", name)]
                for name in self._integers
            }
            self.checks += floor_checks(known_floor(self._bundle), self._limits, found, references, self.results)


@dataclass(frozen=True)
class _Kept:
    """A session whose outputs are kept."""

    session: CheckedSession
    outputs: list[Mapping[str, Array]]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        found = self.session.run(feeds)
        self.outputs.append(found)
        return found

    def close(self) -> None:
        """Closes nothing: the sampler that opened the session does."""


def _draw(bundle: Bundle, sampler: Sampler, sample: Sample) -> Sample:
    schedule = bundle.manifest.schedule(sample.steps)
    w, negative = sample.guidance, sample.negative
    return sampler(sample.prompt, sample.seed, schedule, guidance=w, negative=negative, inputs=sample.inputs)

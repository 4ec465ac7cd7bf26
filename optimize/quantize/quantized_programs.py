"""The programs of a bundle, quantized as planned: what is compiled, and what the artifacts are compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fewstep.bundle.contract import ComponentSpec, Contract
from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.bundle.samples import Sample
from fewstep.bundle.schedule import Schedule
from fewstep.calibration import CalibrationSet, SampleRequest
from fewstep.export import Description, Generator, Programs
from fewstep.numerics.metrics import sqnr_db
from fewstep.optimize.quantize.apply import quantize
from fewstep.optimize.quantize.golden_operations import golden_operations
from fewstep.optimize.quantize.plan import QuantPlan
from fewstep.runtimes.base import CheckedSession
from fewstep.runtimes.parity.golden_operations import GoldenOperation
from fewstep.runtimes.parity.harness import Floor
from fewstep.runtimes.parity.quantized import floor_of
from fewstep.runtimes.pytorch.float64 import open_double
from fewstep.runtimes.pytorch.reference import open_program
from fewstep.runtimes.sampling.sampler import Sampler
from fewstep.text.tokens import Tokenizer

# Of two values in two modes the middle says nothing: with sixteen, the larger of both modes decides.
LEAST_CALLS = 16


@dataclass(frozen=True)
class QuantizedPrograms:
    """Programs and the plan that quantizes them.

    A quantized generator has no pipeline of its own: it is sampled like a bundle, with the bundle's ``tokenizers`` and
    ``schedules``.
    """

    programs: Programs
    plan: QuantPlan
    tokenizers: Mapping[str, Tokenizer]
    schedules: Mapping[int, Schedule]
    calibration: CalibrationSet | None = None
    """The calls that the plan was made from, where it was made now."""

    @property
    def generator(self) -> Generator:
        """The generator, before quantization."""
        return self.programs.generator

    @property
    def described(self) -> Description:
        """The generator's description, before quantization."""
        return self.programs.described

    @property
    def contract(self) -> Contract:
        """What a device must know to sample."""
        return self.programs.contract

    @property
    def components(self) -> Mapping[str, ComponentSpec]:
        """What the components take and give."""
        return self.programs.components

    def key(self, component: str) -> dict[str, Any]:
        """Returns all that determines a component's program beside the generator's weights, JSON-ready."""
        return {**self.programs.key(component), "plan": self.plan.digest(component)}

    def make(self, component: str, spec: ComponentSpec | None = None) -> Program:
        """Returns the quantized program of a component; ``spec`` as in `Programs.make`."""
        return quantize(self.programs.make(component, spec), self.plan.components[component])

    def rows(self, component: str) -> list[int]:
        """Returns the rows of the table of steps that a network of the loop is called with."""
        return self.programs.rows(component)

    def label(self, artifact: Artifact) -> Artifact:
        """Returns an artifact that says what its component's weights are stored in and what it computes with."""
        return self.plan.label(artifact)

    def samples(self, requests: Sequence[SampleRequest]) -> Iterator[Sample]:
        """Yields the sample of each request, computed by the quantized programs in PyTorch."""
        return self._sampled(requests, open_program)

    def floor(self, references: Sequence[Sample]) -> Floor:
        """Returns what two executions of the programs in PyTorch agree to, from samples of the first."""
        requests = [SampleRequest(r.prompt, r.seed, r.steps, r.guidance, r.inputs, r.negative) for r in references]
        others = list(self._sampled(requests, open_double))
        values: dict[str, list[float]] = defaultdict(list)
        for component in self.components:
            with open_double(self.make(component)) as session:
                for feed in (f for sample in references for f in sample.feeds if f.component == component):
                    outputs = session.run(feed.inputs)
                    values[component] += [sqnr_db(feed.outputs[name], outputs[name]) for name in feed.outputs]
                values[component] += self._more(component, session, LEAST_CALLS - len(values[component]))
        return floor_of(values, references, others)

    def _more(self, component: str, other: CheckedSession, count: int) -> Iterator[float]:
        """Yields what two executions agree to on calls of the calibration, which cost no trajectory."""
        if self.calibration is None or count <= 0:
            return
        from fewstep.optimize.quantize.planner import calls_of

        names = [spec.name for spec in self.components[component].inputs]
        with open_program(self.make(component)) as session:
            for _, inputs in islice(calls_of(self.programs, self.calibration, component), count):
                feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
                first, second = session.run(feeds), other.run(feeds)
                yield from (sqnr_db(first[name], second[name]) for name in first)

    def operations(self, sample: Sample) -> list[GoldenOperation]:
        """Returns the operations of the golden pack: of the first call of each component that computes in integers."""
        found = []
        for component, plan in self.plan.components.items():
            feed = next((feed for feed in sample.feeds if feed.component == component), None)
            # Graphs of single rows have grids of their own, and another name for each.
            if feed is not None and plan.computes and self.contract.form != "specialized":
                found += golden_operations(self.make(component), feed.inputs, feed.step)
        return found

    def _sampled(
        self, requests: Sequence[SampleRequest], open_session: Callable[[Program], CheckedSession]
    ) -> Iterator[Sample]:
        sampler = Sampler(
            self.programs.contract,
            self.components,
            self.tokenizers,
            lambda c: open_session(self.make(c)),
            unconditional=self.programs.described.guided.values,
        )
        try:
            for r in requests:
                schedule = self.schedules[r.steps]
                yield sampler(r.prompt, r.seed, schedule, guidance=r.guidance, negative=r.negative, inputs=r.inputs)
        finally:
            sampler.close()

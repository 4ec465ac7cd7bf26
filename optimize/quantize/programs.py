"""The programs of a bundle, quantized as planned: what is compiled, and what the artifacts are compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.calibration import CalibrationSet, SampleRequest
from fewstep.contract import ComponentSpec, Contract
from fewstep.export import Description, Generator, Programs
from fewstep.feeds import Sample
from fewstep.manifest import Artifact
from fewstep.metrics import sqnr_db
from fewstep.optimize.quantize.apply import quantize
from fewstep.optimize.quantize.plan import QuantPlan
from fewstep.program import Program
from fewstep.runtimes.base import CheckedSession
from fewstep.runtimes.parity import Floor
from fewstep.runtimes.pytorch_double import open_double
from fewstep.runtimes.pytorch_reference import open_program
from fewstep.runtimes.quantized_parity import floor_of
from fewstep.runtimes.sampler import Sampler
from fewstep.runtimes.tokenizer import Tokenizer
from fewstep.schedule import Schedule


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
        requests = [SampleRequest(r.prompt, r.seed, r.steps, r.guidance, r.inputs) for r in references]
        others = list(self._sampled(requests, open_double))
        values: dict[str, list[float]] = defaultdict(list)
        for component in self.components:
            with open_double(self.make(component)) as session:
                for feed in (f for sample in references for f in sample.feeds if f.component == component):
                    outputs = session.run(feed.inputs)
                    values[component] += [sqnr_db(feed.outputs[name], outputs[name]) for name in feed.outputs]
        return floor_of(values, references, others)

    def _sampled(
        self, requests: Sequence[SampleRequest], open_session: Callable[[Program], CheckedSession]
    ) -> Iterator[Sample]:
        sampler = Sampler(
            self.programs.contract, self.components, self.tokenizers, lambda c: open_session(self.make(c))
        )
        try:
            for r in requests:
                yield sampler(r.prompt, r.seed, self.schedules[r.steps], guidance=r.guidance, inputs=r.inputs)
        finally:
            sampler.close()

"""A generator as its recipe wants it: what is compiled, and what the compiled artifacts are compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.calibration import SampleRequest, record_samples
from fewstep.export import Programs
from fewstep.feeds import Sample
from fewstep.metrics import sqnr_db
from fewstep.optimize.quantize import QuantPlan, quantize
from fewstep.program import Program
from fewstep.runtimes.base import CheckedSession
from fewstep.runtimes.parity import Floor
from fewstep.runtimes.pytorch_double import open_double
from fewstep.runtimes.pytorch_reference import open_program
from fewstep.runtimes.quantized_parity import floor_of
from fewstep.runtimes.sampler import Sampler
from fewstep.runtimes.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A generator after every pass, and the plan of its quantization, None if it computes in float.

    ``tokenizers`` are the bundle's: a quantized generator has no pipeline of its own and is sampled like a bundle.
    """

    programs: Programs
    plan: QuantPlan | None
    tokenizers: Mapping[str, Tokenizer]

    def program(self, component: str) -> Program:
        """Returns the traced program of a component, quantized as planned."""
        program = self.programs.make(component)
        if self.plan is None:
            return program
        return quantize(program, self.plan.components[component])

    def key(self, component: str) -> dict[str, Any]:
        """Returns what makes a component's program what it is, beside the source and the versions of packages."""
        return {
            "program": self.programs.key(component),
            "plan": None if self.plan is None else self.plan.digest(component),
        }

    @property
    def computes_integers(self) -> bool:
        """Whether any component multiplies whole numbers."""
        return self.plan is not None and any(plan.computes for plan in self.plan.components.values())

    def samples(self, requests: Sequence[SampleRequest]) -> Iterator[Sample]:
        """Yields the reference's sample of each request.

        In float that is the generator's own pipeline. With a plan it is the quantized programs in PyTorch, sampled with
        the generator's table.
        """
        if self.plan is None:
            recorded = record_samples(self.programs.generator, self.programs.described, requests)
            yield from map(self.programs.restate, recorded)
        else:
            yield from self._sampled(requests, open_program)

    def floor(self, references: Sequence[Sample]) -> Floor:
        """Returns what two executions of the quantized programs in PyTorch agree to, from samples of the first."""
        requests = [SampleRequest(r.prompt, r.seed, r.steps, r.guidance, r.inputs) for r in references]
        others = list(self._sampled(requests, open_double))
        values: dict[str, list[float]] = defaultdict(list)
        for component in self.programs.components:
            with open_double(self.program(component)) as session:
                for feed in (f for sample in references for f in sample.feeds if f.component == component):
                    outputs = session.run(feed.inputs)
                    values[component] += [sqnr_db(feed.outputs[name], outputs[name]) for name in feed.outputs]
        return floor_of(values, references, others)

    def _sampled(
        self, requests: Sequence[SampleRequest], open_session: Callable[[Program], CheckedSession]
    ) -> Iterator[Sample]:
        sampler = Sampler(
            self.programs.contract, self.programs.components, self.tokenizers, lambda c: open_session(self.program(c))
        )
        try:
            for r in requests:
                schedule = self.programs.described.schedules[r.steps]
                yield sampler(r.prompt, r.seed, schedule, guidance=r.guidance, inputs=r.inputs)
        finally:
            sampler.close()

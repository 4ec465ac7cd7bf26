"""A generator as its recipe wants it: what is compiled, and what the compiled artifacts are compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.calibration import SampleRequest, record_samples
from fewstep.export import Description, Generator, digest, trace
from fewstep.feeds import Sample
from fewstep.metrics import sqnr_db
from fewstep.optimize.quantize import QuantPlan, quantize
from fewstep.program import Program
from fewstep.runtimes.parity import Floor, agreement_db, mean_db
from fewstep.runtimes.pytorch_reference import open_program
from fewstep.runtimes.sampler import Sampler
from fewstep.runtimes.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A generator after every pass, and the plan of its quantization, None if it computes in float.

    ``tokenizers`` are the bundle's: a quantized generator has no pipeline of its own and is sampled like a bundle.
    """

    generator: Generator
    described: Description
    plan: QuantPlan | None
    tokenizers: Mapping[str, Tokenizer]

    def program(self, component: str) -> Program:
        """Returns the traced program of a component, quantized as planned."""
        program = trace(self.generator, self.described.wirings[component], self.described.components[component])
        if self.plan is None:
            return program
        return quantize(program, self.plan.components[component])

    def key(self, component: str) -> dict[str, Any]:
        """Returns what makes a component's program what it is, beside the source and the versions of packages."""
        return {
            "wiring": digest(self.described.wirings[component]),
            "plan": None if self.plan is None else self.plan.digest(component),
        }

    @property
    def computes_integers(self) -> bool:
        """Whether any component multiplies whole numbers."""
        return self.plan is not None and any(plan.computes for plan in self.plan.components.values())

    def samples(self, requests: Sequence[SampleRequest], *, other_kernels: bool = False) -> Iterator[Sample]:
        """Yields the reference's sample of each request.

        In float that is the generator's own pipeline. With a plan it is the quantized programs in PyTorch, sampled with
        the generator's table; ``other_kernels`` runs them with other convolutions and products of PyTorch's, which
        tells how much two correct executions differ.
        """
        if self.plan is None:
            yield from record_samples(self.generator, self.described, requests)
            return
        sampler = Sampler(
            self.described.contract, self.described.components, self.tokenizers, lambda c: open_program(self.program(c))
        )
        with _kernels(other=other_kernels):
            for r in requests:
                schedule = self.described.schedules[r.steps]
                yield sampler(r.prompt, r.seed, schedule, guidance=r.guidance, inputs=r.inputs)

    def floor(self, references: Sequence[Sample]) -> Floor:
        """Returns what two executions of the quantized programs in PyTorch agree to, from samples of the first."""
        requests = [SampleRequest(r.prompt, r.seed, r.steps, r.guidance, r.inputs) for r in references]
        others = list(self.samples(requests, other_kernels=True))
        picture = mean_db(agreement_db(a, b) for a, b in zip(references, others, strict=True))
        values: dict[str, list[float]] = defaultdict(list)
        with _kernels(other=True):
            for component in self.described.components:
                session = open_program(self.program(component))
                for feed in (f for sample in references for f in sample.feeds if f.component == component):
                    outputs = session.run(feed.inputs)
                    values[component] += [sqnr_db(feed.outputs[name], outputs[name]) for name in feed.outputs]
        return Floor({name: mean_db(found) for name, found in values.items()}, picture)


@contextmanager
def _kernels(*, other: bool) -> Iterator[None]:
    with torch.backends.mkldnn.flags(enabled=not other):
        yield

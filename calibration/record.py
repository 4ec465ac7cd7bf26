"""Records samples of the reference generator, one at a time, so that memory holds one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fewstep.bundle.contract import Guidance
from fewstep.bundle.samples import BESIDE, Sample
from fewstep.export import Description, Generator, record
from fewstep.numerics.inputs import example_inputs

NEGATIVE = "Blurry, low quality"  # with capitals, as people write


@dataclass(frozen=True)
class SampleRequest:
    """What to sample: prompt, seed (0 to 2^64 - 1), step count, guidance scale, and a negative prompt if any."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    inputs: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    negative: str | None = None

    @classmethod
    def grid(
        cls, generator: Generator, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
    ) -> list[SampleRequest]:
        """Returns every prompt with every seed, prompts outermost; other inputs are examples that vary with both."""
        return [
            cls(prompt, seed, steps, guidance, example_inputs(generator.inputs, len(seeds) * i + j))
            for i, prompt in enumerate(prompts)
            for j, seed in enumerate(seeds)
        ]

    def beside(self, guidance: Guidance, *, off: bool) -> list[SampleRequest]:
        """Returns what shows the rest of two-pass guidance: the other number of passes, and a negative prompt.

        Args:
            guidance: of the contract.
            off: whether to show two passes where this sample makes one.
        """
        two = guidance.two_passes(self.guidance)
        if guidance.kind != "two_pass" or not (two or off):
            return []
        above = max(2.0, 2 * (guidance.threshold or 1.0))
        other = guidance.threshold if two else above
        found = [] if other is None else [replace(self, seed=self.seed + BESIDE, guidance=other)]
        if guidance.takes_negative:
            guided = self.guidance if two else above
            found.append(replace(self, seed=self.seed + BESIDE, guidance=guided, negative=NEGATIVE))
        return found


def record_samples(generator: Generator, described: Description, requests: Iterable[SampleRequest]) -> Iterator[Sample]:
    """Yields the reference's sample for each request, with every network call."""
    for request in requests:
        yield record(
            generator,
            described,
            request.prompt,
            request.seed,
            steps=request.steps,
            guidance=request.guidance,
            negative=request.negative,
            inputs=request.inputs,
        )

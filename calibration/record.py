"""Records samples of the reference generator, one at a time, so that memory holds one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewstep.export import Description, Generator, record
from fewstep.feeds import Sample
from fewstep.inputs import example_inputs


@dataclass(frozen=True)
class SampleRequest:
    """What to sample: the prompt, the seed (0 to 2^64 - 1), the step count and the guidance scale."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    inputs: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)

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
            inputs=request.inputs,
        )

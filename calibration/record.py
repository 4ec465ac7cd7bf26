"""Records samples of the reference generator, one at a time, so that memory holds one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fewstep.export.generator import Generator
from fewstep.export.reference import record
from fewstep.feeds import Sample


@dataclass(frozen=True)
class SampleRequest:
    """What to sample: the prompt, the seed (0 to 2^64 - 1), the step count and the guidance scale."""

    prompt: str
    seed: int
    steps: int
    guidance: float

    @classmethod
    def grid(cls, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> list[SampleRequest]:
        """Returns every prompt with every seed, prompts outermost."""
        return [cls(prompt, seed, steps, guidance) for prompt in prompts for seed in seeds]


def record_samples(generator: Generator, requests: Iterable[SampleRequest]) -> Iterator[Sample]:
    """Yields the reference's sample for each request, with every network call."""
    for request in requests:
        yield record(generator, request.prompt, request.seed, steps=request.steps, guidance=request.guidance)

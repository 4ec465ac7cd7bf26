"""What coarser weights of a component do to the picture: the whole generator is sampled with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.fx import GraphModule

from fewstep.bundle.samples import Sample
from fewstep.errors import QuantizationError
from fewstep.export import Programs
from fewstep.numerics.metrics import ssim
from fewstep.runtimes.base import Array, CheckedSession
from fewstep.runtimes.sampling.sampler import Sampler
from fewstep.text.tokens import Tokenizer

Weights = Mapping[tuple[str, str], torch.Tensor]
"""Values in the place of weights, by component and parameter name."""


@dataclass(frozen=True)
class PictureDamage:
    """Mean square error of the outputs, relative to their peak of 1 in pictures, and their structural similarity."""

    mse: float
    ssim: float

    @property
    def psnr_db(self) -> float | None:
        """In dB; None where there is no error."""
        return None if self.mse == 0 else round(float(-10 * np.log10(self.mse)), 2)


class Pictures:
    """Samples a generator in PyTorch, with some weights replaced, and compares with the same samples without.

    What a component makes of inputs that it has seen with its own weights is remembered.

    Args:
        programs: of the generator.
        modules: graph of every component.
        tokenizers: as `fewstep.runtimes.sampling.sampler.open_tokenizers` returns them.
        samples: recorded ones, to be drawn again.
    """

    def __init__(
        self,
        programs: Programs,
        modules: Mapping[str, GraphModule],
        tokenizers: Mapping[str, Tokenizer],
        samples: Sequence[Sample],
    ) -> None:
        if not samples:
            raise QuantizationError("there are no samples to see a weight's damage in, expected at least one")
        self._sessions = {
            name: _ModuleSession(modules[name], [s.name for s in spec.inputs], [s.name for s in spec.outputs])
            for name, spec in programs.components.items()
        }
        self._sampler = Sampler(
            programs.contract,
            programs.components,
            tokenizers,
            lambda name: CheckedSession(name, programs.components[name], self._sessions[name]),
            unconditional=programs.described.guided.values,
        )
        self._schedules = programs.described.schedules
        self._samples = samples
        self._references = [self._draw(sample) for sample in samples]

    def damage(self, weights: Weights) -> PictureDamage:
        """Returns what the weights do to the samples."""
        with self._replaced(weights):
            drawn = [self._draw(sample) for sample in self._samples]
        pairs = list(zip(self._references, drawn, strict=True))
        errors = [np.mean((b.output.astype(np.float64) - a.output) ** 2) for a, b in pairs]
        return PictureDamage(
            float(np.mean(errors)), float(np.mean([ssim(a.picture_HWC, b.picture_HWC) for a, b in pairs]))
        )

    def _draw(self, sample: Sample) -> Sample:
        schedule, w, negative = self._schedules[sample.steps], sample.guidance, sample.negative
        return self._sampler(sample.prompt, sample.seed, schedule, guidance=w, negative=negative, inputs=sample.inputs)

    @contextmanager
    def _replaced(self, weights: Weights) -> Iterator[None]:
        for (component, name), values in weights.items():
            self._sessions[component].replaced[name] = values
        try:
            yield
        finally:
            for component, _ in weights:
                self._sessions[component].replaced.clear()


class _ModuleSession:
    """A session on a graph whose weights can be replaced between calls."""

    def __init__(self, module: GraphModule, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._module = module
        self._inputs = inputs
        self._outputs = outputs
        self._seen: dict[str, dict[str, Array]] = {}
        self.replaced: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        if self.replaced:
            return self._run(feeds)
        key = hashlib.sha256(b"".join(np.ascontiguousarray(feeds[name]).tobytes() for name in self._inputs)).hexdigest()
        if key not in self._seen:
            self._seen[key] = self._run(feeds)
        return self._seen[key]

    def close(self) -> None:
        """Forgets what was seen."""
        self._seen.clear()

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = tuple(torch.from_numpy(feeds[name]) for name in self._inputs)
        results = torch.func.functional_call(self._module, self.replaced, given)
        return {name: result.numpy() for name, result in zip(self._outputs, results, strict=True)}

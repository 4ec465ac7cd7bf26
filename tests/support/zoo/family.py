"""What a family of the zoo is, and how one of its generators is run the way its users run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Group = Literal[
    "consistency",
    "one-call and adversarial",
    "flow",
    "two times",
    "transformers",
    "image in",
    "not pictures",
    "special",
]
Output = Literal["picture", "audio", "video", "depth"]

PROMPTS = ("a red apple", "two blue birds on a wire")


@dataclass(frozen=True)
class Input:
    """What a user hands in.

    A prompt is text for a pipeline and token ids [1, L] below ``high`` for a loop; a class is a label below ``high``;
    an image is [1, 3, H, W] in [0, 1]; a mask is [1, 1, H, W] of zeros and ones.
    """

    kind: Literal["prompt", "class", "image", "mask"]
    shape: tuple[int, ...] = ()
    high: int = 0

    def tensor(self, variant: int = 0) -> Tensor:
        """Returns an example, a different one for each variant."""
        generator = torch.Generator().manual_seed(100 + variant)
        if self.kind in ("prompt", "class"):
            ids = torch.randint(0, self.high, self.shape, generator=generator)
            return (ids + variant) % self.high  # never the same twice in a row
        values = torch.rand(self.shape, generator=generator)
        return values if self.kind == "image" else (values > 0.5).float()

    def argument(self, variant: int = 0) -> Any:
        """Returns an example as a diffusers pipeline takes it."""
        if self.kind == "prompt":
            return PROMPTS[variant]
        value = self.tensor(variant)
        return value.tolist() if self.kind == "class" else value


@dataclass(frozen=True)
class Loop:
    """A generator in plain PyTorch: networks, and the function that samples with them.

    ``sample(nets, inputs, *, steps, guidance, noise)`` takes the networks (or stand-ins for them) by name, the user's
    inputs by name, and ``noise(shape)``, which returns fresh standard normal noise at each call.
    """

    name: str
    networks: Mapping[str, nn.Module]
    sample: Callable[..., Tensor]
    inputs: Mapping[str, Input]
    output: Output
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """A kind of few-step generator and a tiny one of that kind with random weights.

    Attributes:
        name: identifies the family.
        group: what it exercises.
        kind: "diffusers" if a pipeline class of diffusers runs it, "loop" if it is a ``Loop``.
        make: writes the pipeline into a folder and returns it (diffusers), or returns the ``Loop``.
        steps: numbers of steps to run it with (``num_inference_steps`` of the pipeline), the smallest first.
        call_kwargs: what else is passed to the pipeline (or ``guidance`` to the loop); a function is called with the
            number of steps.
        inputs: what the user hands in, by the name of the argument.
        output: what comes out.
        note: what is special about it.
        load_kwargs: what the user passes to ``from_pretrained``.
    """

    name: str
    group: Group
    kind: Literal["diffusers", "loop"]
    make: Callable[..., Any]
    steps: tuple[int, ...]
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Input] = field(default_factory=dict)
    output: Output = "picture"
    note: str = ""
    load_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, steps: int, variants: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Returns the keyword arguments of one call of the pipeline; ``variants`` picks other inputs than the first."""
        fixed = {k: v(steps) if callable(v) else v for k, v in self.call_kwargs.items()}
        inputs = {k: i.argument((variants or {}).get(k, 0)) for k, i in self.inputs.items()}
        return {"num_inference_steps": steps, **fixed, **inputs}

    def load(self, folder: Path) -> Any:
        """Returns what runs: the pipeline made in ``folder`` and loaded from there, or the ``Loop``."""
        if self.kind == "loop":
            return self.make()
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging

        logging.set_verbosity_error()  # advice about safety checkers, which no tiny pipeline has
        logging.disable_progress_bar()
        pipeline = DiffusionPipeline.from_pretrained(
            self.make(folder), use_safetensors=True, local_files_only=True, **self.load_kwargs
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def run(
        self, loaded: Any, *, steps: int | None = None, seed: int = 0, variants: Mapping[str, int] | None = None
    ) -> Tensor:
        """Returns what ``loaded`` generates, float32, with the smallest number of steps if none is given."""
        steps = steps or self.steps[0]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            if self.kind == "loop":
                return loaded.sample(
                    loaded.networks,
                    {k: i.tensor((variants or {}).get(k, 0)) for k, i in self.inputs.items()},
                    steps=steps,
                    guidance=self.call_kwargs.get("guidance", 1.0),
                    noise=partial(torch.randn, generator=generator),
                )
            result = loaded(**self.arguments(steps, variants), generator=generator, output_type="np")
        first = next(iter(result.values()))
        return torch.from_numpy(np.array(first, dtype=np.float32))

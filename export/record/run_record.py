"""What one run of a generator leaves behind: its calls, texts, draws and latents, and the names of tensors in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fewstep.bundle.contract import DRAW, LATENT, draw_offset, is_denoiser
from fewstep.export.record.tape import Tape

# Names that ONNX Runtime users of diffusers models expect for the inputs and outputs of these methods.
_INPUT_NAMES = {("vae_decoder", "z"): "latent_sample", ("vae_decoder", "x"): "latent_sample"}
_OUTPUT_NAMES = {"unet": ("out_sample",), "transformer": ("out_sample",), "vae_decoder": ("sample",)}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a component.

    ``instance`` tells calls apart that a component gets between the same two steps: ``encoder``, ``encoder-2``.
    ``steps_done`` is the number of sampler steps before it, ``position`` where the tape stood. ``inputs`` and
    ``outputs`` are copies of the tensors by flat name; ``arguments`` and ``result`` hold the objects themselves.
    """

    component: str
    instance: str
    steps_done: int
    position: int
    arguments: Mapping[str, Any]
    result: Any
    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Text:
    """One call of a tokenizer; ``again`` makes the same call with other texts, a row for each."""

    tokenizer: str
    text: str
    ids: torch.Tensor
    mask: torch.Tensor | None
    again: Callable[[Sequence[str]], Mapping[str, torch.Tensor]]


@dataclass
class Run:
    """One run of the generator while it is listened to."""

    guidance: float
    is_loop: bool
    batch: int = 1
    tape: Tape = field(default_factory=Tape)
    calls: list[Call] = field(default_factory=list)
    every_call: list[Call] = field(default_factory=list)
    """``calls`` are those that depend on anything that varies."""
    texts: list[Text] = field(default_factory=list)
    draws: dict[int, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    states: list[torch.Tensor] = field(default_factory=list)
    """The latent before each step."""
    latents: list[torch.Tensor] = field(default_factory=list)
    """The latent after each step."""
    model_outputs: list[torch.Tensor] = field(default_factory=list)
    scheduler_times: list[torch.Tensor] = field(default_factory=list)
    step_options: dict[str, float] = field(default_factory=dict)
    set_timesteps: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    begin_index: int | None = None
    noised: tuple[torch.Tensor, torch.Tensor] | None = None
    """The clean latent and the noise that the pipeline made its first latent of."""
    clips: bool = False
    clean: torch.Tensor | None = None
    ends_clean: bool = False
    """Whether the pipeline decodes the clean latent that the last step reports, and not the next one."""
    steps_done: int = 0
    result: Any = None
    output: np.ndarray[Any, Any] | None = None

    def note_state(self, latent: torch.Tensor) -> None:
        """Keeps the latent of a step; the first one may be something else too, a picture for instance.

        Of one that is there twice, for the two passes of guidance, it keeps the first half.
        """
        latent = self.once(latent)
        if self.states:
            self.tape.leaf(LATENT, latent)
        self.states.append(latent)

    def once(self, latent: torch.Tensor) -> torch.Tensor:
        """Returns a latent, or the first half of one that is there twice."""
        if latent.ndim == 0 or latent.shape[0] != 2 * self.batch:
            return latent
        with self.tape.paused():
            first, second = latent.chunk(2)
            return first if torch.equal(first, second) else latent

    def step_draws(self) -> dict[str, list[torch.Tensor]]:
        """Returns the draws that every step makes beside its latent's noise, one for each step, by origin."""
        found: dict[str, list[torch.Tensor]] = {}
        for number in itertools.count(1):
            offsets = [draw_offset(k, number) for k in range(len(self.states))]
            if not all(offset in self.draws for offset in offsets):
                return found
            found[f"{DRAW}{number}"] = [self.draws[offset] for offset in offsets]
        return found

    @property
    def denoiser_calls(self) -> list[Call]:
        """The calls that make the output of a step, whichever network each is of."""
        return [call for call in self.calls if is_denoiser(call.component)]

    def of(self, component: str) -> list[Call]:
        """Returns the calls of one component, in order."""
        return [call for call in self.calls if call.component == component]


def flatten_tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of nested dicts, lists, tuples and distributions with its dotted name."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten_tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flatten_tensors(item, f"{name}.{i}" if name else f"output.{i}")
    elif type(value).__name__ == "DiagonalGaussianDistribution":
        for key in ("mean", "std"):
            yield f"{name}.{key}", getattr(value, key)


def name_inputs(folder: str, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the tensors among a call's arguments by flat name."""
    named: dict[str, torch.Tensor] = {}
    for argument, value in arguments.items():
        named.update(flatten_tensors(value, _INPUT_NAMES.get((folder, argument), argument)))
    return named


def name_outputs(folder: str, result: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors of a call's result by name: of the result's fields, or as ONNX Runtime users know them."""
    tensors = dict(flatten_tensors(result, "output.0" if isinstance(result, torch.Tensor) else ""))
    known = _OUTPUT_NAMES.get(folder, ())
    return {known[i] if i < len(known) else name: tensor for i, (name, tensor) in enumerate(tensors.items())}

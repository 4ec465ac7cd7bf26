"""Stands in for what a pipeline calls, lets it through, and writes down what it saw."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import diffusers.utils.torch_utils
import torch

from fewstep.bundle.contract import LATENT, MASK, NOISE, TOKENS, draw_offset, is_denoiser
from fewstep.errors import ExportError
from fewstep.export.record.run_record import Call, Run, Text, name_inputs, name_outputs
from fewstep.numerics import noise

# The result of `scale_model_input`, if the pipeline calls it.
SCALED = "scaled_latent"
# The clean latent that a scheduler's step reports beside the next one.
CLEAN = "clean_latent"
_SCHEDULER_METHODS = ("set_timesteps", "step", "scale_model_input", "add_noise", "scale_noise")

Stub = Callable[[int, Any], Any]


class Listener:
    """Stands in for a network's method: calls it, or a stub, and records the call."""

    def __init__(
        self, component: str, folder: str, original: Callable[..., Any], recorded: Run, stubs: Mapping[str, Stub]
    ) -> None:
        functools.update_wrapper(self, original)
        self._component, self._folder, self._original = component, folder, original
        self._run = recorded
        self._stub = stubs.get(component)
        self._signature = inspect.signature(original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the method, or the stub, returns."""
        run, position = self._run, self._run.tape.position
        # Networks may empty the lists that they are given.
        arguments = _copied_containers(self._bind(args, kwargs))
        tensors = name_inputs(self._folder, arguments)
        if run.is_loop and is_denoiser(self._component):
            # Schedulers name the latent; in plain PyTorch it is what the network is given first.
            run.note_state(next(iter(tensors.values())))
        with run.tape.paused():
            inputs = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            earlier = run.of(self._component)
            number = sum(call.component == self._component for call in run.every_call)
            same = sum(call.steps_done == run.steps_done for call in earlier)
            instance = self._component if same == 0 else f"{self._component}-{same + 1}"
            result = self._original(*args, **kwargs) if self._stub is None else self._stub(number, arguments)
            outputs = name_outputs(self._folder, result)
            varies = is_denoiser(self._component) or any(map(run.tape.varies, tensors.values()))
            for name, tensor in outputs.items() if varies else ():
                run.tape.leaf(f"{instance}.{name}", tensor)
            copies = {name: tensor.detach().clone() for name, tensor in outputs.items()}
        call = Call(self._component, instance, run.steps_done, position, arguments, result, inputs, copies)
        run.every_call.append(call)
        if varies:  # what gives the same in every run is a constant, not a component
            run.calls.append(call)
        run.steps_done += run.is_loop and is_denoiser(self._component)
        return result

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        variable = {p.name for p in self._signature.parameters.values() if p.kind is p.VAR_KEYWORD}
        arguments = {name: value for name, value in bound.arguments.items() if name not in variable}
        for name in variable:
            arguments.update(bound.arguments.get(name, {}))
        return arguments


def _copied_containers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied_containers(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied_containers(item) for item in value)
    return value


@contextmanager
def listen_to_tokenizer(name: str, tokenizer: Any, recorded: Run) -> Iterator[None]:
    """Records the calls of one tokenizer; Python looks ``__call__`` up in the class, so that is where to listen."""
    original = type(tokenizer).__call__

    def listen(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = original(self, text, *args, **kwargs)
        ids = result.get("input_ids") if self is tokenizer else None
        if isinstance(ids, torch.Tensor):
            mask = result.get("attention_mask")
            recorded.tape.leaf(f"{TOKENS}{name}", ids)
            if mask is not None:
                recorded.tape.leaf(f"{MASK}{name}", mask)

            def again(others: Sequence[str]) -> Mapping[str, torch.Tensor]:
                rows: Mapping[str, torch.Tensor] = original(self, list(others), *args, **kwargs)
                return rows

            recorded.texts.append(Text(name, text if isinstance(text, str) else text[0], ids, mask, again))
        return result

    with mock.patch.object(type(tokenizer), "__call__", listen):
        yield


@contextmanager
def listen_to_scheduler(scheduler: Any, recorded: Run) -> Iterator[None]:
    """Records what a pipeline asks of its scheduler; the inside of the scheduler stays off the tape."""
    original = {name: getattr(scheduler, name) for name in _SCHEDULER_METHODS if hasattr(scheduler, name)}
    tape = recorded.tape

    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        recorded.set_timesteps = args, {k: v for k, v in kwargs.items() if k != "device"}
        return original["set_timesteps"](*args, **kwargs)

    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not recorded.states:
            recorded.begin_index = getattr(scheduler, "_begin_index", None)
            recorded.step_options = {k: float(v) for k, v in kwargs.items() if _is_number(v)}
        recorded.note_state(sample)
        recorded.model_outputs.append(model_output)
        times = torch.as_tensor(timestep)  # one, or the same for each sample of a batch
        recorded.scheduler_times.append(times[:1].clone() if times.ndim else times.clone())
        with tape.paused():
            result = original["step"](model_output, timestep, sample, *args, **kwargs)
        following = result[0] if isinstance(result, tuple) else result.prev_sample
        tape.leaf(LATENT, following)
        clean = result[-1] if isinstance(result, tuple) else getattr(result, "pred_original_sample", None)
        if clean is not None and clean is not following:
            tape.leaf(CLEAN, clean)
            recorded.clean = clean
        recorded.latents.append(recorded.once(following))
        recorded.steps_done += 1
        return result

    def scale_model_input(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with tape.paused():
            result = original["scale_model_input"](sample, *args, **kwargs)
        if result is not sample:
            tape.leaf(SCALED, result)
        return result

    def add_noise(clean: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rest = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.shape == clean.shape]
        recorded.noised = recorded.noised or ((clean, rest[0]) if rest else None)
        return original["add_noise"](clean, *args, **kwargs)

    def scale_noise(clean: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rest = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.shape == clean.shape]
        recorded.noised = recorded.noised or ((clean, rest[0]) if rest else None)
        return original["scale_noise"](clean, *args, **kwargs)

    listeners = {f.__name__: f for f in (set_timesteps, step, scale_model_input, add_noise, scale_noise)}
    with ExitStack() as stack:
        for name, method in original.items():
            listener = functools.wraps(method)(listeners[name])
            stack.enter_context(mock.patch.object(scheduler, name, listener))
        yield


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Draws:
    """fewstep's noise: one offset for every draw of a run, one row for every sample of its batch."""

    def __init__(self, draw: Callable[[int, tuple[int, ...]], torch.Tensor], recorded: Run, batch: int = 1) -> None:
        self._draw, self._run, self._batch = draw, recorded, batch

    def __call__(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the next draw: offset 0 before the first step, 1 + k for a latent's noise in step k."""
        run, rows = self._run, self._rows(tuple(shape))
        offset = len(run.states)
        if offset in run.draws or (offset > 0 and rows != tuple(run.states[0].shape)):
            further = (number for number in itertools.count(1) if draw_offset(offset, number) not in run.draws)
            offset = draw_offset(offset, next(further))
        run.draws[offset] = self._draw(offset, rows)
        run.tape.leaf(f"{NOISE}{offset}", run.draws[offset])
        return run.draws[offset]

    def _rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a draw for the whole batch; a loop in plain PyTorch asks for one row, whatever it is."""
        if self._batch == 1 or shape[:1] == (self._batch,):
            return shape
        if shape[:1] != (1,):
            raise ExportError(
                f"noise {list(shape)} is drawn in a batch of {self._batch}, expected one row for each sample",
                hint="build it without a batch",
            )
        return (self._batch, *shape[1:])


def noise_tensor(seed: int, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns a draw of a seed's noise as a tensor."""
    return torch.from_numpy(noise.normal(seed, offset, shape))


@contextmanager
def our_noise(draw: Draws) -> Iterator[None]:
    """Replaces diffusers' ``randn_tensor``, wherever it was imported to, for the length of a block."""
    original = diffusers.utils.torch_utils.randn_tensor

    def ours(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> torch.Tensor:
        return draw(tuple(shape)).to(device=device, dtype=dtype)

    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            # Through vars: diffusers' lazy modules would import every pipeline at a getattr.
            if vars(module).get("randn_tensor") is original:
                stack.enter_context(mock.patch.object(module, "randn_tensor", ours))
        yield

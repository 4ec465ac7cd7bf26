"""Runs a generator as its authors run it and listens: the reference that everything is compared with.

For a diffusers generator this is the pipeline's ``__call__``, unchanged. Only its random numbers are replaced by
fewstep's (``noise``), so that a seed means the same picture here and on a device. Networks, tokenizers, scheduler and
the tensor operations between them are listened to.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any
from unittest import mock

import diffusers.utils.torch_utils
import numpy as np
import torch

from fewstep import noise
from fewstep.errors import ExportError
from fewstep.export.generator import Generator
from fewstep.export.stored_networks import on_the_cpu
from fewstep.export.tape import Tape
from fewstep.manifest import DENOISER, EARLY_DRAWS, INPUT, LATENT, MASK, NOISE, TEXT, TOKENS

# Names that ONNX Runtime users of diffusers models expect for the inputs and outputs of these methods.
_INPUT_NAMES = {("vae_decoder", "z"): "latent_sample", ("vae_decoder", "x"): "latent_sample"}
_OUTPUT_NAMES = {"unet": ("out_sample",), "transformer": ("out_sample",), "vae_decoder": ("sample",)}
# The result of `scale_model_input`, if the pipeline calls it.
SCALED = "scaled_latent"
# The clean latent that a scheduler's step reports beside the next one.
CLEAN = "clean_latent"
_SCHEDULER_METHODS = ("set_timesteps", "step", "scale_model_input", "add_noise", "scale_noise")

Stub = Callable[[int, Any], Any]


@dataclass(frozen=True)
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
    """One call of a tokenizer."""

    tokenizer: str
    text: str
    ids: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Run:
    """One run of the generator while it is listened to."""

    guidance: float
    is_loop: bool
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
        """Keeps the latent of a step; the first one may be something else too, a picture for instance."""
        if self.states:
            self.tape.leaf(LATENT, latent)
        self.states.append(latent)

    def of(self, component: str) -> list[Call]:
        """Returns the calls of one component, in order."""
        return [call for call in self.calls if call.component == component]


@torch.no_grad()
def run(
    generator: Generator,
    prompt: str,
    seed: int,
    *,
    steps: int,
    guidance: float,
    inputs: Mapping[str, np.ndarray[Any, Any]] | None = None,
    stubs: Mapping[str, Stub] | None = None,
    draw: Callable[[int, tuple[int, ...]], torch.Tensor] | None = None,
    on_start: Callable[[Run], object] | None = None,
    clips: bool | None = None,
) -> Run:
    """Returns a run of the generator with fewstep's noise.

    Args:
        generator: what to run.
        prompt: the text, if the generator takes one.
        seed: of the noise: offset 0 for the first draw, 1 + k for the draw in the scheduler's step k.
        steps: step count, as the pipeline takes it.
        guidance: guidance scale, as the pipeline takes it.
        inputs: the generator's other inputs, by name.
        stubs: (number of the call, its arguments) -> result, by component; stands in for a network. None: the
            networks themselves.
        draw: (offset, shape) -> noise, in place of the seed's.
        on_start: told the run before it begins.
        clips: whether a loop in plain PyTorch clips x0, so that a clamp after the last call is part of the last step;
            None: it is if there is a clamp after every call of several.
    """
    recorded = Run(guidance, generator.is_loop)
    if on_start is not None:
        on_start(recorded)
    draws = _Draws(draw or functools.partial(noise_tensor, seed), recorded)
    with ExitStack() as stack:
        if generator.stored is not None:
            stubs = generator.stored.loaded(generator) if stubs is None else stubs
            stack.enter_context(on_the_cpu(generator.pipeline))
        for component, part in generator.parts.items():
            module = generator.module(component)
            listener = _Listener(component, part.folder, getattr(module, part.method), recorded, (stubs or {}))
            stack.enter_context(mock.patch.object(module, part.method, listener))
        takes_text = any(spec.kind == TEXT for spec in generator.inputs)
        for name, tokenizer in generator.tokenizers.items() if takes_text else ():
            stack.enter_context(_listen_to_tokenizer(name, tokenizer, recorded))
        for name, array in (inputs or {}).items():
            recorded.inputs[name] = torch.from_numpy(np.array(array))
            recorded.tape.leaf(f"{INPUT}{name}", recorded.inputs[name])
        if generator.is_loop:
            call = functools.partial(_call_loop, generator, prompt, recorded, steps, guidance, draws)
        else:
            stack.enter_context(_listen_to_scheduler(generator.pipeline.scheduler, recorded))
            stack.enter_context(_our_noise(draws))
            call = functools.partial(_call_pipeline, generator, prompt, recorded, steps, guidance)
        stack.enter_context(recorded.tape)
        recorded.result = call()
    if recorded.clean is not None and _takes(recorded, CLEAN):
        recorded.ends_clean = True
        recorded.latents[-1] = recorded.clean
        recorded.tape.rename(LATENT, recorded.clean)
    if recorded.is_loop:
        recorded.clips = _clips(recorded) if clips is None else clips
        _find_last_latent(recorded)
    recorded.output = _output_array(recorded.result, generator.kind, signed=recorded.is_loop)
    return recorded


def _takes(recorded: Run, leaf: str) -> bool:
    """Returns whether what runs after the loop is given a leaf."""
    after = [c for c in recorded.calls if c.steps_done == len(recorded.states)]
    for call in after[:1]:
        tensors = [t for _, t in flatten_tensors(dict(call.arguments), "")]
        return leaf in recorded.tape.cut(tensors, what=call.component).leaves
    return False


def _clips(recorded: Run) -> bool:
    starts = [c.position for c in recorded.of(DENOISER)]
    ends = [*starts[1:], recorded.tape.position]
    clamps = recorded.tape.clamps
    return len(starts) > 1 and all(any(a <= c < b for c in clamps) for a, b in zip(starts, ends, strict=True))


def _find_last_latent(recorded: Run) -> None:
    """Notes what a loop in plain PyTorch ends with: what it hands on, before it is reshaped or clipped to be shown."""
    after = [c for c in recorded.calls if c.steps_done == len(recorded.states)]
    tensors = [t for c in after[:1] for _, t in flatten_tensors(dict(c.arguments), "") if recorded.tape.varies(t)]
    shape = recorded.states[0].shape
    for k, state in enumerate(recorded.states):
        if state.shape != shape:
            raise ExportError(
                f"the latent of step {k} is {list(state.shape)}, expected {list(shape)} as in step 0",
                hint="a latent that changes its size cannot be expressed yet",
            )
    last = tensors[0] if tensors else recorded.result
    while last.shape != shape or (recorded.tape.is_clamp(last) and not recorded.clips):
        parents = recorded.tape.parents(last)
        if len(parents) != 1:
            break
        last = parents[0]
    if last.shape != shape:
        raise ExportError(
            f"the loop ends with {list(last.shape)}, expected a latent {list(shape)} as its denoiser takes",
            hint="the denoiser's first argument must be the latent that the loop updates",
        )
    recorded.tape.rename(LATENT, last)
    recorded.latents = [*recorded.states[1:], last]


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


class _Listener:
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
        run, position = self._run, self._run.tape.position
        # Networks may empty the lists that they are given.
        arguments = _copied_containers(self._bind(args, kwargs))
        tensors = name_inputs(self._folder, arguments)
        if run.is_loop and self._component == DENOISER:
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
            varies = self._component == DENOISER or any(map(run.tape.varies, tensors.values()))
            for name, tensor in outputs.items() if varies else ():
                run.tape.leaf(f"{instance}.{name}", tensor)
            copies = {name: tensor.detach().clone() for name, tensor in outputs.items()}
        call = Call(self._component, instance, run.steps_done, position, arguments, result, inputs, copies)
        run.every_call.append(call)
        if varies:  # what gives the same in every run is a constant, not a component
            run.calls.append(call)
        run.steps_done += run.is_loop and self._component == DENOISER
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
def _listen_to_tokenizer(name: str, tokenizer: Any, recorded: Run) -> Iterator[None]:
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
            recorded.texts.append(Text(name, text if isinstance(text, str) else text[0], ids, mask))
        return result

    with mock.patch.object(type(tokenizer), "__call__", listen):
        yield


@contextmanager
def _listen_to_scheduler(scheduler: Any, recorded: Run) -> Iterator[None]:
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
        recorded.scheduler_times.append(torch.as_tensor(timestep).clone())
        with tape.paused():
            result = original["step"](model_output, timestep, sample, *args, **kwargs)
        following = result[0] if isinstance(result, tuple) else result.prev_sample
        tape.leaf(LATENT, following)
        clean = result[-1] if isinstance(result, tuple) else getattr(result, "pred_original_sample", None)
        if clean is not None and clean is not following:
            tape.leaf(CLEAN, clean)
            recorded.clean = clean
        recorded.latents.append(following)
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


class _Draws:
    """fewstep's noise: one offset for every draw of a run."""

    def __init__(self, draw: Callable[[int, tuple[int, ...]], torch.Tensor], recorded: Run) -> None:
        self._draw, self._run = draw, recorded

    def __call__(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the next draw: offset 0 before the first step, 1 + k during step k."""
        run = self._run
        offset = len(run.states)
        if offset == 0 and 0 in run.draws:
            offset = EARLY_DRAWS + len(run.draws) - 1
        elif offset in run.draws:
            raise ExportError(
                f"step {offset - 1} draws noise more than once, expected at most one array",
                hint="draw all that a step needs as one array",
            )
        run.draws[offset] = self._draw(offset, tuple(shape))
        run.tape.leaf(f"{NOISE}{offset}", run.draws[offset])
        return run.draws[offset]


def noise_tensor(seed: int, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns a draw of a seed's noise as a tensor."""
    return torch.from_numpy(noise.normal(seed, offset, shape))


@contextmanager
def _our_noise(draw: _Draws) -> Iterator[None]:
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


def _call_pipeline(generator: Generator, prompt: str, recorded: Run, steps: int, guidance: float) -> Any:
    """Returns what a diffusers pipeline returns, called as its users call it."""
    pipeline = generator.pipeline
    parameters = inspect.signature(pipeline.__call__).parameters
    wanted: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    if guidance > 1:
        wanted["negative_prompt"] = ""
    arguments = {name: value for name, value in wanted.items() if name in parameters}
    for spec in generator.inputs:
        arguments[spec.name] = prompt if spec.kind == TEXT else recorded.inputs[spec.name]
    options = {name: value(steps) if callable(value) else value for name, value in generator.options.items()}
    for name in options.keys() - parameters.keys():
        close = get_close_matches(name, parameters, n=1)
        raise ExportError(
            f"{type(pipeline).__name__} takes no option {name!r}",
            hint=f"did you mean {close[0]!r}?" if close else "options are arguments of the pipeline's call",
        )
    try:
        return pipeline(**{**arguments, **options})
    except (TypeError, ValueError) as error:  # what pipelines and schedulers refuse their settings with
        raise ExportError(
            f"{type(pipeline).__name__} refuses {steps} steps with these settings: {error}",
            hint="the pipeline itself says so: change its scheduler's configuration, the step counts or the options",
        ) from error


def _call_loop(
    generator: Generator, prompt: str, recorded: Run, steps: int, guidance: float, draw: _Draws
) -> torch.Tensor:
    """Returns what a sampling function in plain PyTorch returns."""
    inputs = dict(recorded.inputs)
    for spec in generator.inputs:
        if spec.kind == TEXT:
            tokenizer = generator.tokenizers[spec.name]
            length = tokenizer.model_max_length
            encoded = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            inputs[spec.name] = encoded.input_ids
    result: torch.Tensor = generator.pipeline(inputs, steps=steps, guidance=guidance, noise=draw)
    return result


def result_tensor(result: Any) -> Any:
    """Returns the tensor or array of a pipeline's output, batch first."""
    for name in ("images", "frames", "audios", "prediction", "sample"):
        if hasattr(result, name):
            return getattr(result, name)
    return result[0] if isinstance(result, tuple) else result


def _output_array(result: Any, kind: str, *, signed: bool) -> np.ndarray[Any, Any]:
    """Returns the first output as float32: a picture [H, W, C] or a video in [0, 1], anything else as it comes."""
    value = result_tensor(result)
    if isinstance(value, (list, tuple)):
        value = value[0][None] if isinstance(value[0], (torch.Tensor, np.ndarray)) else np.asarray(value[0])[None]
    first = (value[0].float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value[0])).astype(np.float32)
    if kind == "picture" and first.ndim == 3 and first.shape[0] in (1, 3, 4) and first.shape[-1] not in (1, 3, 4):
        first = first.transpose(1, 2, 0)
    if kind in ("picture", "video") and signed:
        first = np.clip(first * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray(first)

"""Find the table of any diffusers scheduler by running it once on a symbolic sample.

The "pixels" of the sample are coefficients: element 0 stands for the initial latent, elements 1..N for the network
outputs F_0..F_{N-1}, the N after them for the step noises n_0..n_{N-1}. The network's output at call k and the noise
drawn there are one-hot, so what the scheduler returns is the row of coefficients of x_{k+1}. The short form of
`fewstep.bundle.schedule` is solved from the rows, and checked against the scheduler itself on random arrays.

Legend: N network calls; D = 2 + 2 N coefficients in the basis (x_init, F_0..F_{N-1}, n_0..n_{N-1}, anchor).
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from fewstep.bundle.schedule import Schedule, advance
from fewstep.errors import ScheduleError
from fewstep.export.schedule.solve_coefficients import Row, columns, solve_step

# The table is checked in float64, but diffusers does some steps in float32 (Euler's `sample.to(float32)`): 6e-8 per
# operation, and a step is a handful of operations with cancellation. Measured over the tested schedulers: up to 1.3e-7.
VERIFY_TOLERANCE = 1e-5
_CHECK_SHAPE = (2, 3, 4, 4)
# 1: ordinary inputs. 1000: far outside any clipping range; a linear scheduler scales with its inputs.
_CHECK_SCALES = (1.0, 1000.0)
# Schedulers whose `timesteps` end with an entry that pipelines do not pass to the network.
_WITH_TERMINAL_ENTRY = frozenset({"SCMScheduler"})
_CLAMPS = (torch.clamp, torch.clip, torch.Tensor.clamp, torch.Tensor.clip)
_CASTS = (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type)


class Scheduler(Protocol):
    """What is used of a diffusers scheduler."""

    timesteps: torch.Tensor
    config: Any
    set_timesteps: Callable[..., None]
    step: Callable[..., Any]


def probe(
    scheduler: Scheduler,
    steps: int,
    *,
    set_timesteps: Callable[[Any, int], None] | None = None,
    timestep_factor: float = 1.0,
    eta: float | None = None,
    timesteps: torch.Tensor | None = None,
) -> Schedule:
    """Returns the table of a scheduler at a number of steps; the scheduler itself is left as it was.

    The table has one row per network call: more than `steps` for second-order schedulers (Heun).

    Args:
        scheduler: any diffusers scheduler, or an object that behaves like one.
        steps: number of inference steps, as given to the scheduler's `set_timesteps`.
        set_timesteps: (scheduler, steps) -> None, for schedulers that need more (mu, sigmas, original steps).
        timestep_factor: the network wants `scheduler.timesteps * timestep_factor` (0.001 where a pipeline divides by
            1000).
        eta: passed to `step` when given. Pipelines pass their own eta to every scheduler that takes one (0.0 unless
            their caller says otherwise), whatever the scheduler's own default is.
        timesteps: those of the scheduler's timesteps at which the pipeline steps; None: all of them.

    Raises:
        ScheduleError: the scheduler is not of the table's form; the message says at which step and why.
    """
    sampler = _Sampler.prepare(scheduler, steps, set_timesteps, eta, timesteps)
    references = [sampler.reference(scale) for scale in _CHECK_SCALES]
    _refuse_hidden_noise(sampler, references[0])
    schedule = _short_form(sampler, sampler.trace(), timestep_factor)
    for reference in references:
        _verify(schedule, reference)
    return schedule


@contextmanager
def replaced_noise(scheduler: Scheduler, draw: Callable[[tuple[int, ...]], torch.Tensor]) -> Iterator[None]:
    """Returns a context in which the scheduler's noise comes from `draw(shape)`.

    Replaces the name `randn_tensor` in the modules of the scheduler's classes: schedulers of the same modules in other
    threads are affected too.
    """
    modules = [sys.modules[cls.__module__] for cls in type(scheduler).__mro__]
    originals = {module: module.randn_tensor for module in modules if hasattr(module, "randn_tensor")}

    def randn_tensor(shape: Sequence[int], *_: object, **__: object) -> torch.Tensor:
        return draw(tuple(shape))

    try:
        for module in originals:
            setattr(module, "randn_tensor", randn_tensor)  # noqa: B010 - a module has no declared attributes
        yield
    finally:
        for module, original in originals.items():
            setattr(module, "randn_tensor", original)  # noqa: B010


@dataclass(frozen=True)
class _Reference:
    """Inputs and outputs of the scheduler itself on random arrays; S = 1 + N states, the first one the initial."""

    scale: float
    x_SNCHW: npt.NDArray[np.float64]
    F_SNCHW: npt.NDArray[np.float64]
    noise_SNCHW: npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Trace:
    """Rows of one symbolic run: per call, and per kind of x0 that the scheduler lets see."""

    x_SD: tuple[Row, ...]
    input_SD: tuple[Row, ...]
    x0_SD: dict[str, tuple[Row, ...]]
    clip: float | None


@dataclass(frozen=True)
class _Sampler:
    """A scheduler with its timesteps set, and how to step a fresh copy of it."""

    scheduler: Any
    timesteps: torch.Tensor
    options: dict[str, float]
    name: str

    @classmethod
    def prepare(
        cls,
        scheduler: Scheduler,
        steps: int,
        set_timesteps: Callable[[Any, int], None] | None,
        eta: float | None,
        timesteps: torch.Tensor | None,
    ) -> _Sampler:
        """Returns the sampler of a copy of the scheduler, or refuse it by its configuration."""
        name = type(scheduler).__name__
        for method in ("set_timesteps", "step"):
            if not hasattr(scheduler, method):
                raise ScheduleError(f"{name} has no method {method}, expected a diffusers scheduler")
        variance_type = str(getattr(scheduler.config, "variance_type", ""))
        if variance_type.startswith("learned"):
            raise ScheduleError(
                f"{name}.config.variance_type is {variance_type!r}: the network's output scales the noise of a step",
                hint="use a deterministic scheduler, for instance DDIM or DPM-Solver++, with this network",
            )
        if eta is not None and "eta" not in inspect.signature(scheduler.step).parameters:
            raise ScheduleError(f"eta is {eta}, but {name}.step takes no eta")
        required = [
            parameter.name
            for parameter in inspect.signature(scheduler.step).parameters.values()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        if len(required) != 3:
            raise ScheduleError(f"{name}.step requires {required}, expected model_output, timestep and sample only")
        ready = copy.deepcopy(scheduler)
        if set_timesteps is None:
            ready.set_timesteps(steps)
        else:
            set_timesteps(ready, steps)
        if timesteps is None:
            timesteps = ready.timesteps[:-1] if name in _WITH_TERMINAL_ENTRY else ready.timesteps
        return cls(ready, timesteps, {} if eta is None else {"eta": eta}, name)

    @property
    def calls(self) -> int:
        """Number of network calls."""
        return len(self.timesteps)

    @property
    def init_scale(self) -> float:
        """Scale of the initial noise; flow-matching schedulers do not name one and start from unit noise."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def run(
        self, scheduler: Any, x: torch.Tensor, outputs: Sequence[torch.Tensor], noises: Sequence[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, Any]]:
        """Yields (input of the network, result of `step`) per call of `scheduler`, a fresh copy of this one."""
        for k, (t, F) in enumerate(zip(self.timesteps, outputs, strict=True)):
            where = f"step {k} of {self.name}"
            try:
                with replaced_noise(scheduler, _OneDraw(where, noises[k])):
                    scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                    result = scheduler.step(F, t, x, **self.options)
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                raise ScheduleError(f"{where} fails on a sample {list(x.shape)}: {error}") from error
            if not hasattr(result, "prev_sample") or result.prev_sample.shape != F.shape:
                raise ScheduleError(f"{where} returns no prev_sample {list(F.shape)}, as diffusers' schedulers do")
            x = result.prev_sample
            yield scaled, result

    def reference(self, scale: float) -> _Reference:
        """Returns a run on random arrays of the given scale, the same at every call."""
        generator = np.random.default_rng(0)
        x = generator.standard_normal(_CHECK_SHAPE) * scale * self.init_scale
        F, noise = generator.standard_normal((2, self.calls, *_CHECK_SHAPE)) * scale
        arrays = (torch.from_numpy(x), tuple(torch.from_numpy(F)), tuple(torch.from_numpy(noise)))
        results = self.run(copy.deepcopy(self.scheduler), *arrays)
        states = [x]
        for k, (_, result) in enumerate(results):
            states.append(result.prev_sample.double().numpy())
            if not np.isfinite(states[-1]).all():
                raise ScheduleError(f"step {k} of {self.name} itself gives inf or nan, expected finite numbers")
        return _Reference(scale, np.stack(states), F, noise)

    def trace(self) -> _Trace:
        """Returns the rows of a run on the symbolic sample."""
        size = 2 + 2 * self.calls
        basis = torch.eye(size, dtype=torch.float64).reshape(-1, 1, 1, 1, size)
        outputs, noises = tuple(basis[1 : 1 + self.calls]), tuple(basis[1 + self.calls : -1])
        x_rows, input_rows = [_row(basis[0])], []
        seen: list[dict[str, Row]] = []
        scheduler = copy.deepcopy(self.scheduler)
        with Watch(basis.shape[-1], self.name) as watch:
            _note_conversions(scheduler, watch)
            for k, (scaled, result) in enumerate(self.run(scheduler, basis[0], outputs, noises)):
                input_rows.append(_row(scaled))
                x_rows.append(_row(result.prev_sample))
                seen.append(watch.collect(k, result) | {"network output": _row(outputs[k])})
        kinds = [kind for kind in seen[0] if all(kind in step for step in seen)]
        if watch.clip is not None:
            if "clipped" not in kinds:
                raise ScheduleError(f"{self.name} clips x0 at some steps only, expected all or none")
            kinds = ["clipped"]
        x0_rows = {kind: tuple(step[kind] for step in seen) for kind in kinds}
        return _Trace(tuple(x_rows), tuple(input_rows), x0_rows, watch.clip)


class _OneDraw:
    """The noise of one step, given out once."""

    def __init__(self, where: str, noise: torch.Tensor) -> None:
        self._where = where
        self._noise: torch.Tensor | None = noise

    def __call__(self, shape: tuple[int, ...]) -> torch.Tensor:
        noise, self._noise = self._noise, None
        if noise is None:
            raise ScheduleError(f"{self._where} draws noise more than once, expected at most one array")
        if noise.shape != shape:
            raise ScheduleError(f"{self._where} draws noise {list(shape)}, expected {list(noise.shape)}")
        return noise


class Watch(TorchFunctionMode):
    """A context that keeps symbolic rows linear and in float64, and takes note of what is x0.

    Clamps of the symbolic sample are noted and skipped; casts to a narrower type are skipped, so that rows are exact.
    """

    def __init__(self, size: int, name: str) -> None:
        super().__init__()
        self.clip: float | None = None
        self._size = size
        self._name = name
        self._clamped: list[Row] = []
        self.converted: list[Row] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        symbolic = bool(args) and isinstance(args[0], torch.Tensor) and args[0].numel() == self._size
        if symbolic and func in _CLAMPS:
            return self._clamp(*args, **kwargs)
        result = func(*args, **kwargs)
        if symbolic and func in _CASTS and args[0].dtype == torch.float64 and isinstance(result, torch.Tensor):
            return args[0]
        return result

    def _clamp(self, value: torch.Tensor, min: Any = None, max: Any = None) -> torch.Tensor:
        if isinstance(min, torch.Tensor) or isinstance(max, torch.Tensor):
            raise ScheduleError(
                f"{self._name} clips by a bound that depends on the sample (dynamic thresholding)",
                hint="set thresholding=False in the scheduler's configuration",
            )
        if min is None or max is None or -min != max or self.clip not in (None, float(max)):
            raise ScheduleError(f"{self._name} clips to [{min}, {max}], expected one range [-r, r] at all steps")
        self.clip = float(max)
        self.note_clamp(_row(value))
        return value

    def note_clamp(self, row: Row) -> None:
        """Keeps what was clamped."""
        self._clamped.append(row)

    def collect(self, k: int, result: Any) -> dict[str, Row]:
        """Returns what could be x0 at step k, best first: clipped, reported by the scheduler, converted by it."""
        if len(self._clamped) > 1:
            raise ScheduleError(f"step {k} of {self._name} clips {len(self._clamped)} times, expected at most once")
        reported = [getattr(result, name, None) for name in ("pred_original_sample", "denoised")]
        found = {
            "clipped": self._clamped,
            "reported": [_row(value) for value in reported if value is not None],
            "converted": self.converted,
        }
        self._clamped, self.converted = [], []
        return {kind: rows[-1] for kind, rows in found.items() if rows}


def _refuse_hidden_noise(sampler: _Sampler, reference: _Reference) -> None:
    """Raises if the same inputs give another result the second time."""
    if not np.array_equal(sampler.reference(reference.scale).x_SNCHW, reference.x_SNCHW):
        raise ScheduleError(
            f"{sampler.name} gives two results for the same inputs: it draws noise other than through randn_tensor",
            hint="let the scheduler draw its noise with diffusers.utils.torch_utils.randn_tensor",
        )


def _note_conversions(scheduler: Any, watch: Watch) -> None:
    """Lets the watch see what `convert_model_output` of this object returns (DPM-Solver, UniPC)."""
    convert = getattr(scheduler, "convert_model_output", None)
    if convert is None:
        return

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = convert(*args, **kwargs)
        watch.converted.append(_row(result))
        return result

    scheduler.convert_model_output = noted


def _short_form(sampler: _Sampler, trace: _Trace, timestep_factor: float) -> Schedule:
    """Returns the table with the least history; tries the kinds of x0 in turn, and refuses if none fits."""
    failures = []
    for kind, x0_SD in trace.x0_SD.items():
        try:
            steps = [solve_step(trace.x_SD, trace.input_SD[k], x0_SD, k, kind) for k in range(sampler.calls)]
        except ScheduleError as error:
            failures.append(error.message)
            continue
        dtype = str(sampler.timesteps.dtype).removeprefix("torch.")
        return Schedule(
            timesteps=tuple(float(t) * timestep_factor for t in sampler.timesteps),
            timestep_dtype=dtype if timestep_factor == 1.0 or "float" in dtype else "float32",
            init_scale=sampler.init_scale,
            **columns(steps),
            clip=trace.clip,
            source=sampler.name,
        )
    raise ScheduleError(f"{sampler.name} is not a table of numbers: {'; '.join(failures)}")


def _verify(schedule: Schedule, reference: _Reference) -> None:
    """Raises unless each step of the table, from the scheduler's own state before it, gives the state after it."""
    history: list[Any] = []
    for k in range(schedule.steps):
        x, expected = reference.x_SNCHW[k : k + 2]
        noise = reference.noise_SNCHW[k] if schedule.uses_noise(k) else None
        actual, x0 = advance(schedule, k, x, reference.F_SNCHW[k], noise, history)
        history.append(x0)
        error = float(np.abs(actual - expected).max() / max(np.abs(x).max(), np.abs(expected).max()))
        if not error <= VERIFY_TOLERANCE:
            raise ScheduleError(
                f"{schedule.source} departs from its table by {error:.1e} of the latent at step {k}, expected at most"
                f" {VERIFY_TOLERANCE:.0e}, with random inputs of scale {reference.scale:g}: it is not linear"
                + ("" if schedule.clip is None else " around the clip of x0")
            )


def _row(value: torch.Tensor) -> Row:
    """Returns a symbolic sample as its D coefficients."""
    return value.detach().double().reshape(-1).numpy().copy()

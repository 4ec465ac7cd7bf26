"""Finds the table of a generator's own sampler, for any step count: from its scheduler, or from its loop.

Networks are replaced by stand-ins whose outputs are known numbers, so a run costs nothing but the sampler. What a
pipeline does around its scheduler (its input scaling, its time values, how it mixes the network's output with the
latent before ``step``) is read off by comparing numbers, and folded into the scheduler's table.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fewstep.bundle.contract import DENOISER, is_denoiser
from fewstep.bundle.schedule import Schedule, advance
from fewstep.errors import ExportError, ScheduleError
from fewstep.export.generator import Generator
from fewstep.export.record.intercept import Stub, noise_tensor
from fewstep.export.record.replace_tensors import replace_tensors
from fewstep.export.record.run import run
from fewstep.export.record.run_record import Call, Run
from fewstep.export.schedule.probe_scheduler import Watch, probe
from fewstep.export.schedule.solve_coefficients import Row, columns, solve_step

# The reference computes in float32; what it does to a latent between two calls is a few operations.
_TOLERANCE = 1e-5
# A loop may take differences of numbers that are a hundred times larger: noise levels.
_REPLAY_TOLERANCE = 1e-3
_STUB_SEED = 1 << 40


@dataclass(frozen=True)
class Anatomy:
    """What a recorded run tells about the loop: which arguments of the denoiser are the latent and times.

    ``has_glue`` is True where tensor operations lie between the network's output and the scheduler's model output that
    are no mere scaling; they belong to the network's program then.
    """

    latent: str | None
    times: tuple[str, ...]
    post: Callable[[torch.Tensor], torch.Tensor] | None
    initial: Callable[[torch.Tensor], torch.Tensor]
    initial_offset: int | None
    guidance: float
    clips: bool = False
    post_after: int | None = None
    """Of a loop in plain PyTorch: before the last operation of ``post`` so many others are recorded after the call."""


def example_prompts(generator: Generator) -> str | list[str]:
    """Returns the prompt that a generator is described with; of a batch, one for each sample."""
    prompts = generator.prompts or ("",)
    return prompts[0] if generator.batch == 1 else [prompts[i % len(prompts)] for i in range(generator.batch)]


def stand_ins(recorded: Run, outputs: Callable[[int, tuple[int, ...]], torch.Tensor]) -> dict[str, Stub]:
    """Returns a stub for every component of a recorded run: the denoiser's tensors are ``outputs(step, shape)``."""

    steps = itertools.count()  # of all denoisers together

    def stub(component: str, first: Sequence[Call]) -> Stub:
        def result(number: int, _: Any) -> Any:
            call = first[min(number, len(first) - 1)]
            if not is_denoiser(component):
                return call.result
            step = next(steps)
            return replace_tensors(call.result, lambda t: outputs(step, tuple(t.shape)))

        return result

    calls: dict[str, list[Call]] = {}
    for call in recorded.every_call:
        calls.setdefault(call.component, []).append(call)
    return {name: stub(name, of_component) for name, of_component in calls.items()}


def probe_run(
    generator: Generator,
    recorded: Run,
    steps: int,
    guidance: float,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    *,
    clips: bool | None = None,
) -> Run:
    """Returns a run at another step count in which no network runs: its outputs are random numbers."""
    stubs = stand_ins(recorded, lambda number, shape: noise_tensor(_STUB_SEED, number, shape))
    texts = example_prompts(generator)
    return run(generator, texts, 0, steps=steps, guidance=guidance, inputs=inputs, stubs=stubs, clips=clips)


def pipeline_schedule(
    generator: Generator, recorded: Run, anatomy: Anatomy, steps: int, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> Schedule:
    """Returns the table of a diffusers pipeline at a step count.

    Raises:
        ScheduleError: the scheduler is not a table, or the pipeline does more around it than a table can say.
    """
    stubbed = probe_run(generator, recorded, steps, anatomy.guidance, inputs)
    calls = stubbed.denoiser_calls
    if len(calls) != len(stubbed.states):
        raise ScheduleError(
            f"the pipeline calls its denoiser {len(calls)} times in {len(stubbed.states)} steps, expected once in each",
            hint="a pipeline that skips or repeats calls cannot be expressed",
        )
    base = _probe(generator, stubbed, steps)
    times = {name: tuple(float(c.inputs[name].reshape(-1)[0]) for c in calls) for name in anatomy.times}
    first = anatomy.times[0] if anatomy.times else None
    if stubbed.ends_clean:
        base = _ending_clean(base)
    return replace(
        base,
        timesteps=times.pop(first) if first else (0.0,) * len(calls),
        timestep_dtype=str(calls[0].inputs[first].dtype).removeprefix("torch.") if first else "float32",
        times=times,
        networks=_networks(calls),
        **_around_the_scheduler(stubbed, calls, anatomy, base),
        **_start(recorded, stubbed, anatomy),
    )


def _ending_clean(schedule: Schedule) -> Schedule:
    """Returns the table whose last step ends with x0, whatever the scheduler would go on with."""
    last = {"a": 0.0, "b": 1.0, "c": 0.0, "g": 0.0, "h": ()}
    changed: dict[str, Any] = {name: (*getattr(schedule, name)[:-1], value) for name, value in last.items()}
    return replace(schedule, **changed)


def _probe(generator: Generator, stubbed: Run, steps: int) -> Schedule:
    """Returns the table of the scheduler as the pipeline uses it."""
    args, kwargs = stubbed.set_timesteps

    def set_timesteps(scheduler: Any, _: int) -> None:
        scheduler.set_timesteps(*args, **kwargs)
        if stubbed.begin_index is not None:
            scheduler.set_begin_index(stubbed.begin_index)

    return probe(
        copy.deepcopy(generator.pipeline.scheduler),
        steps,
        set_timesteps=set_timesteps,
        eta=stubbed.step_options.get("eta"),
        timesteps=torch.stack(stubbed.scheduler_times),
    )


def _around_the_scheduler(stubbed: Run, calls: Sequence[Call], anatomy: Anatomy, base: Schedule) -> dict[str, Any]:
    """Returns the columns s, p and q with what the pipeline does around ``scheduler.step`` folded in."""
    s, p, q = list(base.s), list(base.p), list(base.q)
    for k, call in enumerate(calls):
        x, given = stubbed.states[k], stubbed.model_outputs[k]
        if anatomy.latent is not None:
            s[k] = _nearest(s[k], *coefficients(call.inputs[anatomy.latent], [x], f"input of step {k}"))
        F = next(iter(call.outputs.values()))
        F = F if anatomy.post is None else anatomy.post(F)
        mixed, kept = coefficients(given, [F, x], f"model output of step {k}")
        mixed, kept = _nearest(1.0, mixed), _nearest(0.0, kept)
        p[k], q[k] = p[k] + q[k] * kept, q[k] * mixed
    return {"s": tuple(s), "p": tuple(p), "q": tuple(q)}


def _start(recorded: Run, stubbed: Run, anatomy: Anatomy) -> dict[str, Any]:
    """Returns the scales of the first latent's parts."""
    x = stubbed.states[0]
    if anatomy.initial_offset is None:
        if not torch.allclose(x, recorded.states[0], rtol=_TOLERANCE, atol=_TOLERANCE):
            raise ScheduleError(
                "the first latent depends on the step count and is no mixture of noise and one clean latent"
            )
        return {"init_scale": 1.0}
    initial = anatomy.initial(stubbed.draws[anatomy.initial_offset])
    if stubbed.noised is None:
        return {"init_scale": coefficients(x, [initial], "the first latent")[0]}
    scale, anchor = coefficients(x, [initial, stubbed.noised[0]], "the first latent")
    return {"init_scale": scale, "init_anchor": anchor}


def coefficients(target: torch.Tensor, columns: Sequence[torch.Tensor], what: str) -> list[float]:
    """Returns the numbers that combine the columns to the target.

    Raises:
        ScheduleError: none do, to float32 rounding.
        ExportError: one of them has values that are not finite.
    """
    if any(column.shape != target.shape for column in columns):
        shapes = [list(column.shape) for column in columns]
        raise ScheduleError(f"{what} is {list(target.shape)}, what it should be made of is {shapes}")
    if not all(torch.isfinite(tensor).all() for tensor in (target, *columns)):
        raise ExportError(
            f"{what or 'what the network takes and gives'} is not finite in the reference's own run",
            hint="does the generator draw pictures in float32 on its own? check its weights for NaN",
        )
    matrix = torch.stack([c.double().reshape(-1) for c in columns], dim=1)
    wanted = target.double().reshape(-1)
    solution = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
    rest = (matrix @ solution - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    if not float(rest) <= _TOLERANCE:
        raise ScheduleError(
            f"{what} is no combination of latent and network output: {float(rest):.1e} of it is left over",
            hint="the pipeline does something between network and scheduler that a table cannot say",
        )
    return [float(value) for value in solution]


def _nearest(exact: float, measured: float) -> float:
    """Returns the exact number where the measured one is the same to float32 rounding."""
    return exact if abs(measured - exact) <= 2 * _TOLERANCE * max(abs(exact), 0.1) else measured


def is_scaled(value: torch.Tensor, by: torch.Tensor) -> bool:
    """Returns whether one tensor is the other times a number."""
    try:
        coefficients(value, [by], "")
    except ScheduleError:
        return False
    return True


class _LoopWatch(Watch):
    """Notes between which network calls a clamp happens."""

    def __init__(self, size: int, name: str, started: Callable[[], int]) -> None:
        super().__init__(size, name)
        self.by_step: dict[int, list[Row]] = {}
        self._started = started

    def note_clamp(self, row: Row) -> None:
        """Keeps a clamped row with the number of network calls before it."""
        self.by_step.setdefault(self._started() - 1, []).append(row)


def loop_schedule(
    generator: Generator, recorded: Run, anatomy: Anatomy, steps: int, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> Schedule:
    """Returns the table of a loop in plain PyTorch, by running it once on symbols.

    See `fewstep.export.schedule.probe_scheduler`.

    Raises:
        ScheduleError: the loop is not linear in noise, network outputs and one tensor that stays the same.
    """
    counted = probe_run(generator, recorded, steps, anatomy.guidance, inputs, clips=anatomy.clips)
    calls, shape = len(counted.states), tuple(counted.states[0].shape)
    size = 2 + 2 * calls
    numel = int(np.prod(shape))
    if numel < size:
        raise ScheduleError(f"the latent {list(shape)} is too small to probe {calls} steps, expected {size} numbers")

    symbolic: list[Run] = []

    def symbol(index: int, wanted: tuple[int, ...]) -> torch.Tensor:
        if wanted != shape:
            return torch.zeros(wanted, dtype=torch.float64)
        symbol = torch.zeros(numel, dtype=torch.float64)
        symbol[index] = 1.0
        return symbol.reshape(shape)

    def output(number: int, wanted: tuple[int, ...]) -> torch.Tensor:
        if anatomy.post_after is None:
            return symbol(1 + number, wanted)
        tape = symbolic[0].tape
        # A copy: what stands for a view must be none itself.
        tape.replacements[tape.position + anatomy.post_after] = symbol(1 + number, shape).clone()
        return torch.zeros(wanted, dtype=torch.float64)

    stubs = stand_ins(recorded, output)
    anchors: list[str] = []
    if anatomy.initial_offset is not None:
        early = dict.fromkeys(call.component for call in recorded.calls if call.steps_done == 0)
        shapes = {name: {tuple(t.shape) for t in recorded.of(name)[0].outputs.values()} for name in early}
        anchors = [name for name in early if not is_denoiser(name) and shape in shapes[name]]
    for name in anchors:
        stubs[name] = _anchor_stub(recorded.of(name)[0].result, shape, symbol(size - 1, shape))

    def draw(offset: int, wanted: tuple[int, ...]) -> torch.Tensor:
        if offset == anatomy.initial_offset:
            return symbol(0, wanted)
        if 0 < offset <= calls:
            return symbol(calls + offset, wanted)
        return counted.draws[offset].double()  # for networks, or for a first latent that is no mere noise

    with _LoopWatch(numel, generator.name, lambda: len(symbolic[0].states) if symbolic else 0) as watch:
        traced = run(
            generator,
            example_prompts(generator),
            0,
            steps=steps,
            guidance=anatomy.guidance,
            inputs=inputs,
            stubs=stubs,
            draw=draw,
            on_start=symbolic.append,
            clips=anatomy.clips,
        )
    schedule = _solve(generator, traced, counted, anatomy, watch, size)
    _check_on_numbers(generator, schedule, counted, recorded, anatomy, anchors)
    return schedule


def _check_on_numbers(
    generator: Generator, schedule: Schedule, counted: Run, recorded: Run, anatomy: Anatomy, anchors: Sequence[str]
) -> None:
    """Raises unless the table gives what the loop gave for random network outputs: symbols do not show a square."""
    shape = counted.states[0].shape

    def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        return tensor.detach().double().numpy()

    held = [array(t) for name in anchors for t in recorded.of(name)[0].outputs.values() if t.shape == shape]
    history: list[np.ndarray[Any, Any]] = []
    for k, call in enumerate(counted.denoiser_calls):
        output = next(iter(call.outputs.values()))
        F = array(output if anatomy.post is None else anatomy.post(output))
        drawn = array(counted.draws[k + 1]) if schedule.uses_noise(k) else None
        anchor = held[0] if held else None
        x, x0 = advance(schedule, k, array(counted.states[k]), F, drawn, history, anchor)
        history.append(x0)
        wanted = array(counted.latents[k])
        rest = np.abs(x - wanted).max() / max(np.abs(wanted).max(), 1e-30)
        if not rest <= _REPLAY_TOLERANCE:
            raise ScheduleError(
                f"{generator.name}: step {k} is not linear in latent, network output and noise: {rest:.1e} of it is "
                "left over",
                hint="move what is not linear into a network",
            )


def _anchor_stub(result: Any, shape: tuple[int, ...], anchor: torch.Tensor) -> Stub:
    """Returns a stand-in for a component whose output of the latent's shape is the anchor."""
    return lambda number, arguments: replace_tensors(result, lambda t: anchor if tuple(t.shape) == shape else t)


def _solve(generator: Generator, traced: Run, counted: Run, anatomy: Anatomy, watch: _LoopWatch, size: int) -> Schedule:
    start = counted.states[0].double().reshape(-1).numpy() if anatomy.initial_offset is None else None

    def row(tensor: torch.Tensor) -> Row:
        flat = tensor.detach().double().reshape(-1).numpy()
        if start is not None:
            # A first latent that is always the same is no symbol: its coefficient is what the other elements show.
            share = float(flat[size:] @ start[size:] / (start[size:] @ start[size:]))
            flat = flat - share * start
            flat = np.where(np.abs(flat) > _TOLERANCE * np.abs(start).max(), flat, 0.0)
            flat[0] += share
        if np.abs(flat[size:]).max(initial=0.0) > 0:
            raise ScheduleError(
                f"{generator.name}: a latent is not made element by element",
                hint="move what mixes elements into a network",
            )
        return flat[:size].copy()

    calls = len(traced.states)
    x_SD = [row(x) for x in (*traced.states, traced.latents[-1])]
    outputs = list(np.eye(size)[1 : 1 + calls])
    clipped = [watch.by_step.get(k, []) for k in range(calls)]
    clip = watch.clip if anatomy.clips and all(clipped) else None
    x0_SD = [rows[0][:size] for rows in clipped] if clip is not None else outputs
    solved = [solve_step(x_SD, x_SD[k], x0_SD, k, "clipped" if clip else "network output") for k in range(calls)]
    rest = x_SD[0].copy()
    rest[[0, -1]] = 0.0
    if np.abs(rest).max() > 0:
        raise ScheduleError(f"{generator.name}: the first latent depends on the network's output")
    times = {
        name: tuple(float(c.inputs[name].reshape(-1)[0]) for c in counted.denoiser_calls) for name in anatomy.times
    }
    first = anatomy.times[0] if anatomy.times else None
    dtype = str(counted.denoiser_calls[0].inputs[first].dtype).removeprefix("torch.") if first else "float32"
    return Schedule(
        timesteps=times.pop(first) if first else (0.0,) * calls,
        timestep_dtype=dtype,
        init_scale=float(x_SD[0][0]) if anatomy.initial_offset is not None else 1.0,
        init_anchor=float(x_SD[0][-1]),
        **columns(solved),
        clip=clip,
        source=f"{generator.name}'s own loop",
        times=times,
        networks=_networks(counted.denoiser_calls),
    )


def _networks(calls: Sequence[Call]) -> tuple[str, ...]:
    """Returns the column of a schedule that names the network of each step, empty if all call the same."""
    names = tuple(call.component for call in calls)
    return () if set(names) == {DENOISER} else names


def refuse(what: str) -> ExportError:
    """Returns the error for a pipeline whose loop does something that a bundle cannot say."""
    return ExportError(what, hint="this pipeline does something between its networks that fewstep cannot express yet")

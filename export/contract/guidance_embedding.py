"""How the guidance scale reaches a generator: an input of its network, two passes in each step, or not at all."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from fewstep.bundle.contract import DENOISER, Guidance, is_denoiser
from fewstep.errors import ExportError
from fewstep.export.contract.guidance_probe import Probe, passes
from fewstep.export.generator import Generator, UndecidedScale
from fewstep.export.record.run import run
from fewstep.export.record.run_record import Run
from fewstep.export.schedule.extract import example_prompts, refuse
from fewstep.export.source.offloaded_networks import shape_stand_ins
from fewstep.numerics.guidance import guidance_value
from fewstep.numerics.inputs import example_inputs, stacked

# The reference and our own arithmetic for the same value differ by float32 rounding of a product or two.
_RTOL, _ATOL = 1e-5, 1e-6
# Where pipelines change what they do, and beyond: two passes above 1 or above 0 are what there is.
_SCALES = (0.0, 0.5, math.nextafter(1, 0), 1.0, math.nextafter(1, 2), 1.5, 2.0, 3.0, 7.5)
# Below what turns on two passes anywhere.
_LOW_SCALES = (0.25, 0.75)


@dataclass(frozen=True)
class Scale:
    """How the scale acts, and which arguments of which networks are made of it."""

    guidance: Guidance
    arguments: Mapping[str, frozenset[str]] = field(default_factory=dict)


def own_scale(generator: Generator) -> float | None:
    """Returns the scale that a pipeline takes when its user gives none; None if it has no default that is a number."""
    if generator.is_loop:
        return None
    parameters = inspect.signature(generator.pipeline.__call__).parameters
    default = parameters["guidance_scale"].default if "guidance_scale" in parameters else None
    return float(default) if isinstance(default, (int, float)) and not isinstance(default, bool) else None


def decided(generator: Generator) -> Generator:
    """Returns the generator with its pipeline's own scale, if that is an input of its network and none was chosen.

    Where the scale means two passes, few-step generators are made for none.
    """
    own = own_scale(generator)
    if not isinstance(generator.guidance, UndecidedScale) or not own:
        return generator
    for shapes in (True, False) if generator.stored is None else (True,):
        try:
            first, second = _low_runs(generator, shapes)
        except Exception:  # without values; the run with values says what is wrong
            continue
        return replace(generator, guidance=own if _made_of_scale({_LOW_SCALES[1]: second}, first) else 0.0)
    return generator


def _low_runs(generator: Generator, shapes: bool) -> list[Run]:
    """Returns runs at two scales that differ in what is made of the scale alone."""
    stubs = shape_stand_ins(generator) if shapes else None
    inputs = stacked([example_inputs(generator.inputs, i) for i in range(generator.batch)])
    text, steps = example_prompts(generator), generator.default_steps
    return [run(generator, text, 0, steps=steps, guidance=w, inputs=inputs, stubs=stubs) for w in _LOW_SCALES]


def takes_scale(generator: Generator) -> bool:
    """Returns whether a generator is given a guidance scale at all."""
    return generator.is_loop or "guidance_scale" in inspect.signature(generator.pipeline.__call__).parameters


def read_scale(probe: Probe) -> Scale:
    """Returns how the scale acts on a generator, found by running it at several.

    Raises:
        ExportError: an input of a network depends on the scale in a way that a bundle cannot express, or passes come
            and go with it.
    """
    generator = probe.generator
    none = Guidance("none", generator.guidance, own=own_scale(generator))
    if not takes_scale(generator):
        return Scale(none)
    runs: dict[float, Run] = {}
    for w in sorted({*_SCALES, probe.plain, generator.guidance, *filter(None, [none.own])}):
        try:
            runs[w] = probe.run(w)
        except ExportError:
            if w in (probe.plain, generator.guidance):
                raise  # elsewhere the pipeline refuses the scale, and nobody can sample with it
    plain = runs[probe.plain]
    twice = {w: any(count != 1 for count in passes(found, plain)) for w, found in runs.items()}
    single = {w: found for w, found in runs.items() if not twice[w]}
    arguments = _made_of_scale(single, plain)
    if arguments:
        if any(twice.values()):
            raise refuse(f"{generator.name}: the scale is an input of {', '.join(arguments)} and makes two passes too")
        return Scale(_as_input(generator, single, arguments, none), arguments)
    if any(twice.values()):
        return Scale(replace(none, kind="two_pass", threshold=_threshold(probe, plain, twice)))
    if any(not _same_sampler(found, plain) for found in single.values()):
        return Scale(replace(none, kind="fixed", reason="the numbers of its sampler depend on the scale"))
    return Scale(none)


def _made_of_scale(runs: Mapping[float, Run], plain: Run) -> dict[str, frozenset[str]]:
    """Returns the arguments of networks that differ between runs while their latents are the same, by component.

    Raises:
        ExportError: an argument that is no tensor does.
    """
    found: dict[str, set[str]] = {}
    for w, other in runs.items():
        for a, b in zip(plain.every_call, other.every_call, strict=False):
            if a.component != b.component:
                raise refuse(f"at guidance {w:g} {b.component} is called where {a.component} is at {plain.guidance:g}")
            _refuse_numbers(a.component, a.arguments, b.arguments, w)
            k = a.steps_done
            same_latent = k == 0 or torch.equal(*((*each.states, each.latents[-1])[k] for each in (plain, other)))
            for name in a.inputs if same_latent else ():
                if name in b.inputs and not torch.equal(a.inputs[name], b.inputs[name]):
                    found.setdefault(a.component, set()).add(name)
    return {component: frozenset(names) for component, names in found.items()}


def _refuse_numbers(component: str, ours: object, theirs: object, w: float) -> None:
    """Raises ExportError for an argument that is no tensor and depends on the scale."""
    (a, a_spec), (b, b_spec) = tree_flatten(ours), tree_flatten(theirs)
    plain = [(x, y) for x, y in zip(a, b, strict=False) if isinstance(x, (bool, int, float, str, type(None)))]
    if a_spec != b_spec or any(x != y for x, y in plain):
        raise refuse(f"{component}: an argument that is no tensor depends on the guidance scale (another at {w:g})")


def _same_sampler(a: Run, b: Run) -> bool:
    pairs = zip((*a.states, *a.latents), (*b.states, *b.latents), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def _as_input(
    generator: Generator, runs: Mapping[float, Run], arguments: Mapping[str, frozenset[str]], none: Guidance
) -> Guidance:
    """Returns how a network's input is made of the scale: an embedding of it, or the scale times a number.

    Raises:
        ExportError: in neither way.
    """
    outside = [name for name in arguments if not _in_loop(next(iter(runs.values())), name)]
    if outside:
        raise refuse(f"{outside[0]} is given the guidance scale before or after the loop, expected in it alone")
    candidates = [c for c in (embedded_guidance(generator), _affine(runs, arguments)) if c is not None]
    for candidate in candidates:
        if all(_expresses(candidate, found, w, arguments) for w, found in runs.items()):
            return replace(candidate, scale=none.scale, own=none.own)
    told = ", ".join(f"{component}.{name}" for component, names in arguments.items() for name in sorted(names))
    raise refuse(
        f"{told} depends on the guidance scale, and is neither its sinusoidal embedding nor it times a number plus one"
    )


def _in_loop(found: Run, component: str) -> bool:
    return is_denoiser(component) or len(found.of(component)) == len(found.states)


def _expresses(guidance: Guidance, found: Run, w: float, arguments: Mapping[str, frozenset[str]]) -> bool:
    return all(
        is_scale(call.inputs[name], guidance, w)
        for call in found.every_call
        for name in arguments.get(call.component, ())
        if name in call.inputs
    )


def _affine(runs: Mapping[float, Run], arguments: Mapping[str, frozenset[str]]) -> Guidance | None:
    """Returns the numbers that make an input of the scale, from its values at 0 and 1."""
    component, names = next(iter(arguments.items()))
    if not {0.0, 1.0} <= set(runs):
        return None
    zero, one = (next(iter(runs[w].of(component))).inputs[min(names)].reshape(-1)[0] for w in (0.0, 1.0))
    if not one.dtype.is_floating_point:
        return None
    return Guidance("scalar", 0.0, factor=float(one - zero), shift=float(zero))


def _threshold(probe: Probe, plain: Run, twice: Mapping[float, bool]) -> float | None:
    """Returns the largest scale with one pass, to the last bit; None if no scale below has one.

    Raises:
        ExportError: passes come and go.
    """
    single, double = [w for w in twice if not twice[w]], [w for w in twice if twice[w]]
    if single == [1.0] and min(double) < 1:
        return None  # one pass where two would give the same
    low, high = max(single), min(double)
    if low > high:
        raise refuse(f"the generator makes one pass at guidance {low:g} and two at {high:g}, expected them above it")
    while (middle := low + (high - low) / 2) not in (low, high):
        if any(count != 1 for count in passes(probe.run(middle), plain)):
            high = middle
        else:
            low = middle
    return low


def embedded_guidance(generator: Generator) -> Guidance | None:
    """Returns the embedding of w that diffusers' pipelines compute for this denoiser, None if it takes none."""
    dim = getattr(getattr(generator.module(DENOISER), "config", None), "time_cond_proj_dim", None)
    if dim is None:
        return None
    half = dim // 2
    # Every rounding as the pipelines have it, the logarithm in float32 too: see `Guidance`.
    exponent = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -exponent)
    return Guidance("embedded", generator.guidance, tuple(frequencies.tolist()))


def is_scale(value: torch.Tensor, guidance: Guidance, w: float) -> bool:
    """Returns whether a tensor is what a network is told of the guidance scale w."""
    expected = torch.from_numpy(np.array(guidance_value(guidance, w)))
    if guidance.kind == "embedded" and (value.ndim != 2 or value.shape[1:] != expected.shape[1:]):
        return False  # one row for each sample
    return torch.allclose(value.double(), expected.expand_as(value).double(), rtol=_RTOL, atol=_ATOL)

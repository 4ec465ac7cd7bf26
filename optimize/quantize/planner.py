"""Makes a plan: which tensors of a program go onto which grid, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from fewstep.calibration.observe import observe
from fewstep.calibration.ranges import StepRanges, estimate
from fewstep.export import Description, Generator, trace
from fewstep.optimize.quantize.apply import float_graph
from fewstep.optimize.quantize.grids import activation_grid, weight_grid
from fewstep.optimize.quantize.plan import ComponentPlan, Grid, QuantPlan, network_sha256
from fewstep.optimize.quantize.quantizer import attribute
from fewstep.optimize.quantize.sites import Site
from fewstep.profiles import TargetProfile, get_profile
from fewstep.program import Program
from fewstep.progress import Progress, Silent
from fewstep.quantization import FLOAT_BITS, Quantization

if TYPE_CHECKING:
    from fewstep.calibration import CalibrationSet

# Below this many values a scale for each channel costs more than the bits save.
_SMALLEST_WEIGHT = 256
# The first and the last operations of a network get at least this many bits (PTQ4DM, arXiv:2211.15736).
_OUTERMOST_BITS = 8

Calls = Callable[[], Iterable[tuple[int, tuple[torch.Tensor, ...]]]]
"""Returns (step, inputs in order) of a component's recorded calls, the same each time."""


@dataclass(frozen=True)
class Decision:
    """What becomes of a site: bits of its weight (32: float) and whether it multiplies whole numbers, with reasons."""

    site: Site
    choice: Quantization
    weights: int
    computes: bool
    weight_reason: str | None
    activation_reason: str | None


def decide(
    program: Program, sites: Iterable[Site], quantization: Quantization, profile: TargetProfile
) -> list[Decision]:
    """Returns what the recipe and the profile make of every site of a component."""
    return [_decide(site, quantization.at(site.op, f"{program.component}/{site.name}"), profile) for site in sites]


def _decide(site: Site, choice: Quantization, profile: TargetProfile) -> Decision:
    bits, reason = choice.weights, None
    if site.on_time_path:
        bits, reason = FLOAT_BITS, "on the time path, which few steps take through few values: kept exact"
    elif bits == FLOAT_BITS:
        reason = "the recipe keeps it in float"
    elif site.parameters < _SMALLEST_WEIGHT:
        bits, reason = FLOAT_BITS, f"{site.parameters} values, whose scales would take more than they save"
    elif site.outermost:
        bits = max(bits, _OUTERMOST_BITS)
    activation_reason: str | None
    if bits == FLOAT_BITS:
        activation_reason = reason
    elif choice.activations == FLOAT_BITS:
        activation_reason = "the recipe computes in float"
    elif site.op not in profile.computes:
        activation_reason = f"{profile.name} has no kernel of whole numbers for {site.op}"
    elif site.rows < profile.min_rows:
        activation_reason = f"{site.rows} row: reading the weights takes the time, not multiplying"
    else:
        activation_reason = None
    return Decision(site, choice, bits, activation_reason is None, reason, activation_reason)


def observe_sites(
    module: GraphModule, decisions: Iterable[Decision], profile: TargetProfile, calls: Calls
) -> StepRanges | None:
    """Returns the ranges of every activation that the decisions need; None if they need none.

    Raises:
        CalibrationError: see `fewstep.calibration.observe`.
    """
    points = {name: name for d in decisions if d.computes for name in _activations(d.site, profile)}
    return observe(module, points, calls) if points else None


def _activations(site: Site, profile: TargetProfile) -> list[str]:
    """Returns the activations that go onto a grid where a site multiplies whole numbers."""
    return [site.data, site.result] if site.op in profile.outputs else [site.data]


def make_plan(
    generator: Generator,
    described: Description,
    quantization: Quantization,
    calls: CalibrationSet,
    progress: Progress | None = None,
) -> QuantPlan:
    """Returns the plan of every component.

    Args:
        generator: the generator, after all passes.
        described: its description.
        quantization: what the recipe asks for.
        calls: recorded calls of the generator.
        progress: told of each component.

    Raises:
        CalibrationError: the calls are not finite, or a step has none.
        QuantizationError: a budget cannot be met.
    """
    profile = get_profile(quantization.profile)
    advance = (progress or Silent()).task("plan quantization", len(described.components))
    plans = {}
    for component, spec in described.components.items():
        program = trace(generator, described.wirings[component], spec)
        plans[component], _ = plan_component(program, quantization, profile, partial(calls.calls, component))
        advance()
    return QuantPlan(generator.source.sha256, profile.name, plans)


def plan_component(
    program: Program, quantization: Quantization, profile: TargetProfile, calls: Calls
) -> tuple[ComponentPlan, StepRanges | None]:
    """Returns the plan of a component with weights rounded to the nearest, and the ranges that it was made from."""
    module, sites = float_graph(program)
    decisions = decide(program, sites, quantization, profile)
    ranges = observe_sites(module, decisions, profile, calls)
    return draw_up(module, sites, decisions, ranges, profile), ranges


def draw_up(
    module: GraphModule,
    sites: tuple[Site, ...],
    decisions: Iterable[Decision],
    ranges: StepRanges | None,
    profile: TargetProfile,
) -> ComponentPlan:
    """Returns the plan that follows from decisions and ranges."""
    weights: dict[str, Grid] = {}
    activations: dict[str, Grid] = {}
    reasons: dict[str, str] = {}
    computes, outputs = [], []
    for d in decisions:
        site = d.site
        if d.weight_reason is not None:
            reasons[site.weight] = d.weight_reason
        if d.activation_reason is not None:
            reasons[site.node] = d.activation_reason
        if d.weights == FLOAT_BITS:
            continue
        weights[site.weight] = weight_grid(
            attribute(module, site.weight),
            d.weights,
            axis=site.channel_axis,
            # Whole numbers are multiplied before they are scaled: one scale for all inputs of a channel.
            granularity="channel" if d.computes and d.choice.granularity == "group" else d.choice.granularity,
            group_size=d.choice.group_size,
        )
        if d.computes:
            computes.append(site.name)
            if site.op in profile.outputs:
                outputs.append(site.name)
            for name in _activations(site, profile):
                if name not in activations:
                    activations[name] = _activation(ranges, name, d.choice.ranges, profile)
    reasons |= {name: reason for name, reason in _float_reasons(module, profile).items() if name not in activations}
    return ComponentPlan(
        network_sha256(sites), weights, activations, computes=tuple(computes), outputs=tuple(outputs), reasons=reasons
    )


def _activation(ranges: StepRanges | None, name: str, method: str, profile: TargetProfile) -> Grid:
    assert ranges is not None, "observe_sites finds ranges for whatever is computed in whole numbers"
    found = estimate(ranges.merged(name), method, bits=8, symmetric=profile.symmetric)
    return activation_grid(found, profile)


def _float_reasons(module: GraphModule, profile: TargetProfile) -> Mapping[str, str]:
    """Returns why the profile keeps operations without a weight in float, by node name."""
    found = {}
    for node in module.graph.nodes:
        name = str(node.target).removeprefix("aten.").split(".")[0] if node.op == "call_function" else ""
        if name in profile.floats:
            found[node.name] = profile.floats[name]
    return found

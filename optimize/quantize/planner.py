"""Makes a plan: which tensors of a program go onto which grid, and why the others do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from fewstep.bundle.contract import BEFORE, LOOP, called_in_step
from fewstep.bundle.program import Program
from fewstep.calibration.observe import observe
from fewstep.calibration.ranges import StepRanges
from fewstep.export import Programs
from fewstep.optimize.quantize.apply import float_graph
from fewstep.optimize.quantize.attributes import attribute
from fewstep.optimize.quantize.decisions import Decision, decide, granularity
from fewstep.optimize.quantize.mixed_precision.candidates import Option, Weight, gather
from fewstep.optimize.quantize.mixed_precision.float_fallback import kept_in_float
from fewstep.optimize.quantize.mixed_precision.image_damage import Pictures
from fewstep.optimize.quantize.mixed_precision.search import Bought, Candidate, share_out
from fewstep.optimize.quantize.per_step_qparams import SHARED, StepGrids
from fewstep.optimize.quantize.plan import ComponentPlan, Grid, QuantPlan, network_sha256
from fewstep.optimize.quantize.qparams import weight_grid
from fewstep.optimize.quantize.quantizable_ops import Site
from fewstep.optimize.quantize.weight_rounding import round_weights, some
from fewstep.progress import Progress, Silent
from fewstep.recipe.quantization import FLOAT_BITS, Quantization
from fewstep.recipe.target_profiles import TargetProfile, get_profile
from fewstep.text.tokens import Tokenizer

if TYPE_CHECKING:
    from fewstep.calibration import CalibrationSet

# Trajectories whose calls, and samples whose pictures, a weight's damage is measured in.
_TRIALS, _PICTURES = 2, 4
# Calls whose second moments say how to round: with a few hundred rows each, more than any layer has inputs.
_ROUNDING_CALLS = 32

Calls = Callable[[], Iterable[tuple[int, tuple[torch.Tensor, ...]]]]
"""Returns (step, inputs in order) of a component's recorded calls, the same each time."""


def observe_sites(
    module: GraphModule,
    decisions: Iterable[Decision],
    profile: TargetProfile,
    calls: Calls,
    *,
    steps: Sequence[int] | None = None,
) -> StepRanges | None:
    """Returns the ranges of every activation that the decisions need; None if they need none.

    With ``steps``, each of these must have a call.

    Raises:
        CalibrationError: see `fewstep.calibration.observe`.
    """
    points = {name: name for d in decisions if d.computes and not d.dynamic for name in _activations(d.site, profile)}
    return observe(module, points, calls, steps=steps) if points else None


def _activations(site: Site, profile: TargetProfile) -> list[str]:
    """Returns the activations that go onto a grid where a site multiplies whole numbers."""
    return [site.data, site.result] if _has_output_grid(site, profile) else [site.data]


def _has_output_grid(site: Site, profile: TargetProfile) -> bool:
    return profile.needs_output_grid(site.op, site.unfolded, site.groups)


def make_plan(
    programs: Programs,
    quantization: Quantization,
    calls: CalibrationSet,
    progress: Progress | None = None,
    *,
    tokenizers: Mapping[str, Tokenizer] | None = None,
) -> QuantPlan:
    """Returns the plan of every component.

    Args:
        programs: of the generator, after all passes.
        quantization: what the recipe asks for.
        calls: recorded calls of the generator.
        progress: told of each component.
        tokenizers: the generator's; mixed precision samples pictures with them.

    Raises:
        CalibrationError: the calls are not finite, or a step has none.
        QuantizationError: a budget cannot be met.
    """
    profile = get_profile(quantization.profile)
    advance = (progress or Silent()).task("plan quantization", len(programs.components) * (1 + quantization.mixed))
    parts = (
        _Part.of(
            programs.make(name),
            quantization,
            profile,
            partial(calls_of, programs, calls, name),
            _early(programs),
            _steps_of(programs, calls, name),
            StepGrids.of(programs, quantization, calls, name),
        )
        for name in programs.components
    )
    plans, quality = {}, {}
    if quantization.mixed:
        kept = list(parts)
        bought = _share_out(kept, programs, quantization, profile, calls, tokenizers or {}, advance)
        quality = bought.quality
        parts = (part.with_options(bought.options[part.component]) for part in kept)
    for part in parts:
        plans[part.component], _ = part.plan(quantization, profile)
        advance()
    return QuantPlan(programs.generator.source.sha256, profile.name, plans, quality)


def _early(programs: Programs) -> frozenset[str]:
    return frozenset(name for name, spec in programs.components.items() if spec.phase == BEFORE)


@dataclass(frozen=True)
class _Part:
    """A component between the recipe and its plan; ``options`` are of mixed precision, by parameter name."""

    component: str
    module: GraphModule
    sites: tuple[Site, ...]
    decisions: list[Decision]
    calls: Calls
    steps: Sequence[int] | None = None
    step_grids: StepGrids = SHARED
    options: Mapping[str, Option] | None = None

    @classmethod
    def of(
        cls,
        program: Program,
        quantization: Quantization,
        profile: TargetProfile,
        calls: Calls,
        early: frozenset[str],
        steps: Sequence[int] | None,
        step_grids: StepGrids,
    ) -> _Part:
        """Returns a component with what the recipe and the profile make of it."""
        module, sites = float_graph(program, split=quantization.split)
        decisions = decide(program, sites, quantization, profile, early)
        return cls(program.component, module, sites, decisions, calls, steps, step_grids)

    def weights(self, usual: int) -> list[Weight]:
        """Returns all weights that the recipe puts onto a grid; their bits are open unless it says other than usual."""
        choices = {
            d.site.name: (d.choice, d.computes, None if d.choice.weights == usual else d.choice.weights)
            for d in self.decisions
            if d.weights < FLOAT_BITS
        }
        return gather(self.sites, choices)

    def with_options(self, options: Mapping[str, Option]) -> _Part:
        """Returns the component with an option chosen for every open weight."""
        decisions = [_chosen(d, options[d.site.weight]) if d.site.weight in options else d for d in self.decisions]
        return replace(self, decisions=decisions, options=options)

    def plan(self, quantization: Quantization, profile: TargetProfile) -> tuple[ComponentPlan, StepRanges | None]:
        """Returns the plan, and the ranges that it was made from."""
        ranges = observe_sites(self.module, self.decisions, profile, self.calls, steps=self.steps)
        if quantization.float_products > 0 and ranges is not None:
            part = replace(self, decisions=self._spared(ranges, profile, quantization.float_products))
            return part._drawn_up(ranges, quantization, profile), ranges
        return self._drawn_up(ranges, quantization, profile), ranges

    def _spared(self, ranges: StepRanges, profile: TargetProfile, share: float) -> list[Decision]:
        """Returns the decisions with those operations in float where ``share`` of all products helps most."""
        whole = draw_up(self.module, self.sites, self.decisions, ranges, profile)
        sites = [d.site for d in self.decisions if d.computes]
        budget = int(share * sum(site.macs for site in self.sites))
        reasons = kept_in_float(
            self.module, sites, whole.activations, some(self.calls, _TRIALS * len(self.steps or (0,))), budget
        )
        return [
            replace(d, computes=False, activation_reason=reasons[d.site.name]) if d.site.name in reasons else d
            for d in self.decisions
        ]

    def _drawn_up(self, ranges: StepRanges | None, quantization: Quantization, profile: TargetProfile) -> ComponentPlan:
        grids = {name: o.grid for name, o in (self.options or {}).items() if o.grid is not None}
        plan = draw_up(self.module, self.sites, self.decisions, ranges, profile, grids, self.step_grids)
        plan = replace(plan, split=quantization.split)
        if self.options is not None:
            found = {name: o.integers for name, o in self.options.items() if o.integers is not None}
            return replace(plan, rounded=found)
        methods = {d.site.name: d.choice.rounding for d in self.decisions if d.choice.rounding != "nearest"}
        return round_weights(plan, self.module, self.sites, methods, some(self.calls, _ROUNDING_CALLS))


def _chosen(decision: Decision, option: Option) -> Decision:
    if option.grid is not None:
        return replace(decision, weights=option.bits)
    reason = "more sensitive than what its bytes would buy elsewhere"
    return replace(decision, weights=FLOAT_BITS, computes=False, weight_reason=reason, activation_reason=reason)


def _share_out(
    parts: Iterable[_Part],
    programs: Programs,
    quantization: Quantization,
    profile: TargetProfile,
    calls: CalibrationSet,
    tokenizers: Mapping[str, Tokenizer],
    advance: Callable[[], None],
) -> Bought:
    parts = list(parts)
    # The calls of whole trajectories: every step counts the same.
    trials = {part.component: partial(calls_of, programs, calls, part.component, _TRIALS) for part in parts}
    candidates = {
        part.component: Candidate(
            part.module,
            part.weights(quantization.weights),
            some(part.calls, _ROUNDING_CALLS),
            trials[part.component],
            _early(programs),
        )
        for part in parts
    }
    modules = {part.component: part.module for part in parts}
    samples = list(itertools.islice(calls.samples(), _PICTURES))
    return share_out(
        candidates, quantization, profile, lambda: Pictures(programs, modules, tokenizers, samples), advance
    )


def calls_of(
    programs: Programs, calls: CalibrationSet, component: str, trajectories: int | None = None
) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """Yields the recorded calls of a component as its program takes them, one trajectory in memory at a time."""
    names = [spec.name for spec in programs.components[component].inputs]
    for sample in itertools.islice(calls.samples(), trajectories):
        for feed in programs.restate([sample])[0].feeds:
            if feed.component == component:
                yield (
                    0 if calls.sampler == "single" else feed.step or 0,
                    tuple(torch.from_numpy(feed.inputs[name]) for name in names),
                )


def _steps_of(programs: Programs, calls: CalibrationSet, component: str) -> list[int]:
    """Returns the steps at which a component must have calls; a set of one step, made to see what that costs, has 0."""
    if programs.components[component].phase != LOOP or calls.sampler == "single":
        return [0]
    schedule = programs.described.schedules[calls.steps]
    return [k for k in range(calls.steps) if called_in_step(component, schedule, k)]


def plan_component(
    program: Program,
    quantization: Quantization,
    profile: TargetProfile,
    calls: Calls,
    early: frozenset[str] = frozenset(),
    *,
    steps: Sequence[int] | None = None,
    step_grids: StepGrids = SHARED,
) -> tuple[ComponentPlan, StepRanges | None]:
    """Returns the plan of a component, and the ranges that it was made from."""
    return _Part.of(program, quantization, profile, calls, early, steps, step_grids).plan(quantization, profile)


def draw_up(
    module: GraphModule,
    sites: tuple[Site, ...],
    decisions: Sequence[Decision],
    ranges: StepRanges | None,
    profile: TargetProfile,
    grids: Mapping[str, Grid] | None = None,
    step_grids: StepGrids = SHARED,
) -> ComponentPlan:
    """Returns the plan that follows from decisions and ranges; ``grids`` are weights' that are known already."""
    weights: dict[str, Grid] = {}
    activations: dict[str, Grid] = {}
    reasons: dict[str, str] = {}
    computes, dynamic, outputs = [], [], []
    whole = [d.site for d in decisions if d.computes and not d.dynamic and _has_output_grid(d.site, profile)]
    of_whole = {name for site in whole for name in _activations(site, profile)}
    for d in decisions:
        site = d.site
        if d.weight_reason is not None:
            reasons[site.weight] = d.weight_reason
        if d.activation_reason is not None:
            reasons[site.node] = d.activation_reason
        if d.weights == FLOAT_BITS:
            continue
        weights[site.weight] = (grids or {}).get(site.weight) or weight_grid(
            attribute(module, site.weight),
            d.weights,
            axis=site.channel_axis,
            granularity=granularity(d),
            group_size=d.choice.group_size,
            profile=profile,
        )
        if d.dynamic:
            computes.append(site.name)
            dynamic.append(site.name)
        elif d.computes:
            computes.append(site.name)
            if _has_output_grid(site, profile):
                outputs.append(site.name)
            for name in _activations(site, profile):
                if name not in activations:
                    assert ranges is not None, "observe_sites finds ranges for whatever is computed in whole numbers"
                    activations[name] = step_grids.beside(name in of_whole).grid(ranges, name, d.choice.ranges, profile)
    reasons |= {name: reason for name, reason in _float_reasons(module, profile).items() if name not in activations}
    return ComponentPlan(
        network_sha256(sites),
        weights,
        activations,
        computes=tuple(computes),
        dynamic=tuple(dynamic),
        outputs=tuple(outputs),
        float_bias=profile.float_bias,
        reasons=reasons,
    )


def _float_reasons(module: GraphModule, profile: TargetProfile) -> Mapping[str, str]:
    """Returns why the profile keeps operations without a weight in float, by node name."""
    found = {}
    for node in module.graph.nodes:
        name = str(node.target).removeprefix("aten.").split(".")[0] if node.op == "call_function" else ""
        if name in profile.floats:
            found[node.name] = profile.floats[name]
    return found

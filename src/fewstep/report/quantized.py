"""What the report says of quantization: the plan of each component, its calibration, and why tensors stay in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fewstep.report.rows import CoverageRow, PlanRow, QuantizationFacts, ReasonRow, Section

if TYPE_CHECKING:
    from fewstep.calibration import CalibrationSet
    from fewstep.optimize.quantize import ComponentPlan, QuantPlan


def quantization_facts(
    recipe: Mapping[str, Any], plan: QuantPlan, calibration: CalibrationSet | None
) -> QuantizationFacts:
    """Returns what the page shows of a plan.

    Args:
        recipe: the recipe's quantization, as the manifest has it.
        plan: the plan.
        calibration: the calls that it was made from, if they are at hand.
    """
    methods = [Section("target profile", plan.profile)]
    if any(component.activations for component in plan.components.values()):
        methods += [
            Section("ranges of activations", str(recipe["ranges"])),
            Section("grids of the loop's activations", f"{recipe.get('step_grids', 'shared')} by step"),
        ]
    dynamic = sum(len(component.dynamic) for component in plan.components.values())
    if dynamic:
        methods.append(
            Section("grids that each call finds", f"{dynamic} operations, a grid for each row of their data")
        )
    methods.append(Section("rounding of weights", str(recipe["rounding"])))
    coverage: Sequence[CoverageRow] = ()
    if calibration is not None:
        methods.append(Section("calibration", f"{calibration.sampler}: {calibration.note}; seed {calibration.seed}"))
        coverage = [
            CoverageRow(row.component, row.step, row.branch, row.count, row.prompts, row.seeds, row.timesteps)
            for row in calibration.coverage()
        ]
    plans = [_plan_row(name, component) for name, component in plan.components.items()]
    reasons = [row for name, component in plan.components.items() for row in _reasons(name, component)]
    return QuantizationFacts(methods, plans, reasons, coverage)


def _plan_row(name: str, plan: ComponentPlan) -> PlanRow:
    bits = Counter(grid.bits for grid in plan.weights.values())
    shared = Counter(
        "group" if grid.group_size is not None else "tensor" if grid.axis is None else "channel"
        for grid in plan.weights.values()
    )
    return PlanRow(
        name,
        weights=", ".join(f"{count} at {n} bits" for n, count in sorted(bits.items())) or "none",
        granularity=", ".join(f"{count} per {what}" for what, count in sorted(shared.items())) or "none",
        activations=len(plan.activations),
        computes=len(plan.computes),
        floats=sum(_is_parameter(tensor) for tensor in plan.reasons),
    )


def _reasons(name: str, plan: ComponentPlan) -> list[ReasonRow]:
    """Returns each reason once, with how many weights and operations it is of, and the first of them."""
    found: dict[tuple[bool, str], list[str]] = {}
    for tensor, reason in plan.reasons.items():
        found.setdefault((_is_parameter(tensor), reason), []).append(tensor)
    return [
        ReasonRow(name, "weight" if weight else "operation", len(tensors), tensors[0], reason)
        for (weight, reason), tensors in found.items()
    ]


def _is_parameter(tensor: str) -> bool:
    """Returns whether a name is a parameter's path, and not that of a node: nodes have no dots in theirs."""
    return "." in tensor

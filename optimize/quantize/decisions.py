"""What becomes of each operation with a weight: its bits, whether it multiplies whole numbers, and why not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fewstep.bundle.program import Program
from fewstep.optimize.quantize.quantizable_ops import Site
from fewstep.recipe.quantization import FLOAT_BITS, Quantization
from fewstep.recipe.target_profiles import TargetProfile

# Below this many values a scale for each channel costs more than the bits save.
SMALLEST_WEIGHT = 256
# The first and the last operations of a network get at least this many bits (PTQ4DM, arXiv:2211.15736).
_OUTERMOST_BITS = 8
# And compute in float where that takes no more than this share of the component's products (MixDQ, arXiv:2405.17873,
# finds the first and the last convolution the most sensitive of all).
OUTERMOST_SHARE = 0.02


@dataclass(frozen=True)
class Decision:
    """What becomes of a site: bits of its weight (32: float) and whether it multiplies whole numbers, with reasons."""

    site: Site
    choice: Quantization
    weights: int
    computes: bool
    weight_reason: str | None
    activation_reason: str | None

    @property
    def dynamic(self) -> bool:
        """Whether each call puts the rows of its data onto grids of their own."""
        return self.computes and self.choice.dynamic


def decide(
    program: Program,
    sites: Iterable[Site],
    quantization: Quantization,
    profile: TargetProfile,
    early: frozenset[str] = frozenset(),
) -> list[Decision]:
    """Returns what the recipe and the profile make of every site of a component.

    ``early`` are the components that run before the loop: what depends on their outputs alone is of the prompt.
    """
    sites = list(sites)
    macs = max(1, sum(site.macs for site in sites))
    decisions = [
        _decide(
            site,
            _possible(quantization.at(site.op, f"{program.component}/{site.name}"), profile),
            profile,
            site.macs / macs,
            of_prompt=quantization.protect and _of_prompt(site, early),
        )
        for site in sites
    ]
    # Kernels of dynamic grids take integers: a weight that something else reads too would have to be stored twice.
    mixed = {d.site.weight for d in decisions if d.dynamic} & {d.site.weight for d in decisions if not d.dynamic}
    return [_in_float(d, "its weight is read in float too") if d.site.weight in mixed else d for d in decisions]


def _in_float(decision: Decision, reason: str) -> Decision:
    return replace(decision, computes=False, activation_reason=decision.activation_reason or reason)


def _possible(choice: Quantization, profile: TargetProfile) -> Quantization:
    """Returns the choices as the target can store them."""
    coarser = choice.granularity == "group" and not profile.groups
    return replace(choice, granularity="channel") if coarser else choice


def _of_prompt(site: Site, early: frozenset[str]) -> bool:
    """Returns whether a site's data is made of outputs of components that run once a picture: text, most of all."""
    return bool(site.depends) and all(origin.partition(".")[0] in early for origin in site.depends)


def _decide(site: Site, choice: Quantization, profile: TargetProfile, share: float, *, of_prompt: bool) -> Decision:
    bits, reason = choice.weights, None
    if site.on_time_path and choice.exact_time:
        bits, reason = FLOAT_BITS, "on the time path, which few steps take through few values: kept exact"
    elif bits == FLOAT_BITS:
        reason = "the recipe keeps it in float"
    elif site.parameters < SMALLEST_WEIGHT:
        bits, reason = FLOAT_BITS, f"{site.parameters} values, whose scales would take more than they save"
    elif site.outermost or site.of_guidance_scale:
        bits = max(bits, _OUTERMOST_BITS)
    activation_reason: str | None
    if bits == FLOAT_BITS:
        activation_reason = reason
    elif choice.activations == FLOAT_BITS:
        activation_reason = "the recipe computes in float"
    elif site.of_guidance_scale:
        activation_reason = "of the guidance scale alone, once a picture: not worth an error at every step"
    elif site.op not in profile.computes:
        activation_reason = f"{profile.name} has no kernel of whole numbers for {site.op}"
    elif choice.dynamic and (bits not in profile.dynamic.get(site.op, ()) or site.groups > 1):
        activation_reason = f"{profile.name} has no kernel that finds grids in each call for {_kind(site, bits)}"
    elif site.rows < profile.min_rows and not choice.dynamic:
        activation_reason = f"{site.rows} row: reading the weights takes the time, not multiplying"
    elif of_prompt and not (choice.dynamic and site.op == "linear"):  # each token then has a grid of its own
        activation_reason = (
            "of the prompt alone: its first token is an outlier, whose grid would leave the others no bits"
        )
    elif site.outermost and share <= OUTERMOST_SHARE:
        activation_reason = f"first or last operation and {share:.1%} of the products: costs little, saves the ends"
    else:
        activation_reason = None
    if activation_reason is not None and bits < FLOAT_BITS and not profile.weight_only:
        bits = FLOAT_BITS
        reason = activation_reason = f"{profile.name} stores whole numbers only to multiply them: {activation_reason}"
    return Decision(site, choice, bits, activation_reason is None, reason, activation_reason)


def _kind(site: Site, bits: int) -> str:
    return f"{site.op} in groups" if site.groups > 1 else f"{site.op} of {bits} bits"


def granularity(decision: Decision) -> str:
    """Returns what shares a scale: groups are of weights whose rows are one output each, and are multiplied in float.

    Whole numbers are multiplied before they are scaled, which takes one scale for all inputs of a channel.
    """
    asked = decision.choice.granularity
    grouped = not decision.computes and decision.site.channel_axis == 0
    return "channel" if asked == "group" and not grouped else asked

"""Mixed precision: which bits each weight is worth, over all components together.

MixDQ (Zhao et al. 2024, arXiv:2405.17873) measures every layer alone, judges layers that carry the prompt by the
picture and the others by the output of the network, and shares bits out by integer programs. Here both measures are
brought to one scale, the error of the picture, and one program serves all components.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from fewstep.bundle.contract import INPUT, MASK, TOKENS
from fewstep.calibration.observe import Calls
from fewstep.errors import QuantizationError
from fewstep.optimize.quantize.attributes import attribute
from fewstep.optimize.quantize.mixed_precision.candidates import Option, Weight, float_bytes, options_of
from fewstep.optimize.quantize.mixed_precision.ilp import Item, allocate
from fewstep.optimize.quantize.mixed_precision.image_damage import PictureDamage, Pictures
from fewstep.optimize.quantize.mixed_precision.sensitivity import Noise, measure_noise
from fewstep.optimize.quantize.quantizable_ops import Site
from fewstep.recipe.quantization import Quantization
from fewstep.recipe.target_profiles import TargetProfile

# What an operation takes in a file beside its weights: its name, its inputs' names and its attributes.
_NODE_BYTES = 400


@dataclass(frozen=True)
class Candidate:
    """A component whose weights are to be chosen for.

    Attributes:
        module: its graph in float.
        weights: what may go onto a grid.
        calls: to look at its layers in.
        trials: fewer calls, of every step, to measure noise in.
        early: components that run before the loop.
    """

    module: GraphModule
    weights: Sequence[Weight]
    calls: Calls
    trials: Calls
    early: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Measured:
    """A weight with its options, and for each the noise of its component's output and the error of the picture."""

    component: str
    weight: Weight
    options: tuple[Option, ...]
    noise: tuple[Noise, ...]
    picture: PictureDamage | None
    damage: tuple[float, ...]


@dataclass(frozen=True)
class Bought:
    """The option of every weight, by component and parameter name, and what the report says of it."""

    options: Mapping[str, Mapping[str, Option]]
    quality: dict[str, Any]


def share_out(
    candidates: Mapping[str, Candidate],
    quantization: Quantization,
    profile: TargetProfile,
    pictures: Callable[[], Pictures],
    advance: Callable[[], None],
) -> Bought:
    """Returns what to store every weight as, for the least error of the picture within the recipe's budget.

    Args:
        candidates: by component.
        quantization: with ``bits`` or ``max_bytes``.
        profile: what the target can store.
        pictures: opens what samples the generator.
        advance: called after each component.

    Raises:
        QuantizationError: the budget is too small.
    """
    options = {c: options_of(v.module, v.weights, profile, v.calls) for c, v in candidates.items()}
    rest = sum(_rest(candidate) for candidate in candidates.values())
    budget = _budget(candidates, options, quantization, rest)
    drawn = pictures()
    measured, effects = [], {}
    for component, candidate in candidates.items():
        if candidate.weights:
            found, effects[component] = measure(component, candidate, options[component], drawn)
            measured += found
        advance()
    items = [Item(tuple(o.bytes for o in m.options), m.damage) for m in measured]
    chosen = allocate(items, budget)
    bought: dict[str, dict[str, Option]] = {component: {} for component in candidates}
    for m, i in zip(measured, chosen, strict=True):
        bought[m.component][m.weight.name] = m.options[i]
    return Bought(bought, _quality(measured, chosen, effects, budget, rest))


def _rest(candidate: Candidate) -> int:
    """Returns the bytes of a component's file that are no weight of a candidate's."""
    module, chosen = candidate.module, {weight.name for weight in candidate.weights}
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    return len(module.graph.nodes) * _NODE_BYTES + sum(
        float_bytes(tensor.detach()) for name, tensor in tensors if name in used and name not in chosen
    )


def _budget(
    candidates: Mapping[str, Candidate],
    options: Mapping[str, Mapping[str, tuple[Option, ...]]],
    quantization: Quantization,
    rest: int,
) -> int:
    """Returns how many bytes the chosen options may take together.

    Raises:
        QuantizationError: the smallest options take more.
    """
    least = sum(found[0].bytes for of in options.values() for found in of.values())
    count = sum(weight.parameters for candidate in candidates.values() for weight in candidate.weights)
    if quantization.max_bytes is not None:
        if quantization.max_bytes < least + rest:
            raise QuantizationError(
                f"max_bytes is {quantization.max_bytes}, but all components take at least {least + rest} bytes: "
                f"{least} of weights in the fewest bits that the profile stores, {rest} of what stays in float",
                hint=f"allow --max-size {math.ceil((least + rest) / 1e5) / 10:.1f}MB or more",
            )
        return quantization.max_bytes - rest
    assert quantization.bits is not None
    if quantization.bits * count / 8 < least:
        raise QuantizationError(
            f"bits is {quantization.bits:g}, but weights take at least {8 * least / count:.2f} bits each with their "
            f"scales: {least} bytes for {count} weights",
            hint=f"allow --bits {math.ceil(80 * least / count) / 10:.1f} or more",
        )
    return int(quantization.bits * count / 8)


def measure(
    component: str, candidate: Candidate, options: Mapping[str, tuple[Option, ...]], drawn: Pictures
) -> tuple[list[Measured], PictureDamage]:
    """Returns what each option of each weight does to the picture, and what all weights do at their smallest."""
    weights = {weight.name: weight for weight in candidate.weights}

    def substitute(name: str, i: int) -> torch.Tensor:
        return options[name][i].values(attribute(candidate.module, name), weights[name].axis)

    counts = {name: sum(not option.exact for option in found) for name, found in options.items()}
    steps = len({step for step, _ in candidate.trials()})
    exact = Noise((0.0,) * steps)  # of the options after those on a grid: the weight as it is
    noise = {
        name: (*found, *[exact] * (len(options[name]) - counts[name]))
        for name, found in measure_noise(candidate.module, counts, substitute, candidate.trials).items()
    }
    effect = drawn.damage({(component, name): substitute(name, 0) for name in weights})
    rate = _rate(effect, sum(found[0].mean for found in noise.values()))
    measured = []
    for name, weight in weights.items():
        picture, at = None, rate
        if any(carries_prompt(site, candidate.early) for site in weight.sites):
            picture = drawn.damage({(component, name): substitute(name, 0)})
            at = _rate(picture, noise[name][0].mean)
        damage = tuple(at * n.mean for n in noise[name])
        measured.append(Measured(component, weight, options[name], noise[name], picture, damage))
    return measured, effect


def _rate(effect: PictureDamage, noise: float) -> float:
    """Returns the picture's error for each unit of noise; 0 where the smallest options are exact."""
    return effect.mse / noise if noise else 0.0


def carries_prompt(site: Site, early: frozenset[str]) -> bool:
    """Returns whether a site's data is of the prompt alone: what goes wrong there changes what the picture shows.

    Layers of text encoders, keys and values of cross attention. Their error is the same at every step, and the output
    of their own component says little of what the denoiser makes of it. ``early`` are the components that run before
    the loop.
    """
    given = (TOKENS, MASK, INPUT)
    return bool(site.depends) and all(o.startswith(given) or o.partition(".")[0] in early for o in site.depends)


def _quality(
    measured: Sequence[Measured],
    chosen: Sequence[int],
    effects: Mapping[str, PictureDamage],
    budget: int,
    rest: int,
) -> dict[str, Any]:
    """Returns what was measured and bought, JSON-ready."""
    pairs = list(zip(measured, chosen, strict=True))
    used = sum(m.options[i].bytes for m, i in pairs)
    count = sum(m.weight.parameters for m in measured)
    expected = sum(m.damage[i] for m, i in pairs)
    return {
        "budget_bytes": budget,
        "weight_bytes": used,
        "other_bytes": rest,
        "bits": round(8 * used / max(1, count), 3),
        "expected_psnr_db": PictureDamage(expected, 1.0).psnr_db,
        "components": {
            name: {"smallest_psnr_db": effect.psnr_db, "smallest_ssim": round(effect.ssim, 4)}
            for name, effect in effects.items()
        },
        "weights": [_row(m, i) for m, i in pairs],
    }


def _row(m: Measured, chosen: int) -> dict[str, Any]:
    return {
        "component": m.component,
        "site": m.weight.sites[0].name,
        "op": m.weight.sites[0].op,
        "parameters": m.weight.parameters,
        "chosen": chosen,
        "judged_by": "output" if m.picture is None else "picture",
        "smallest_ssim": None if m.picture is None else round(m.picture.ssim, 4),
        "options": [
            {
                "bits": option.bits,
                "scales": option.granularity,
                "bytes": option.bytes,
                "sqnr_db": noise.sqnr_db,
                "picture_psnr_db": PictureDamage(damage, 1.0).psnr_db,
            }
            for option, noise, damage in zip(m.options, m.noise, m.damage, strict=True)
        ],
    }

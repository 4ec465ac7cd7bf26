"""What each weight of a component can be stored as: its grids, its integers on them, and the bytes that they take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from fewstep.calibration.observe import Calls
from fewstep.optimize.quantize.attributes import attribute
from fewstep.optimize.quantize.plan import Array, Grid
from fewstep.optimize.quantize.qparams import flat, rows_grid, weight_grid
from fewstep.optimize.quantize.quantizable_ops import Site
from fewstep.optimize.quantize.weight_rounding import round_each
from fewstep.optimize.rounding import weight_qparams as weight_grids
from fewstep.recipe.quantization import FLOAT_BITS, Quantization
from fewstep.recipe.target_profiles import TargetProfile

# Smaller tensors are stored in single precision: see `fewstep.runtimes.onnxruntime.compile.lower`.
_SMALLEST_HALVES = 256


@dataclass(frozen=True, eq=False)
class Option:
    """One way to store a weight.

    Attributes:
        bits: of its integers; 32 leaves it in float.
        grid: None in float.
        integers: int8, of the weight's shape; None in float.
        bytes: that it takes in a file, scales included.
    """

    bits: int
    grid: Grid | None
    integers: Array | None
    bytes: int

    @property
    def exact(self) -> bool:
        """Whether the values are those of the weight."""
        return self.grid is None

    @property
    def granularity(self) -> str:
        """What shares a scale, in words."""
        if self.grid is None:
            return "float"
        if self.grid.axis is None:
            return "tensor"
        return "channel" if self.grid.group_size is None else f"group of {self.grid.group_size}"

    def values(self, weight: torch.Tensor, axis: int) -> torch.Tensor:
        """Returns the weight as the option keeps it, float32, for the weight and its axis of output channels."""
        if self.grid is None or self.integers is None:
            return weight
        rows = flat(torch.from_numpy(self.integers), axis)
        dequantized = weight_grids.dequantize(rows, rows_grid(self.grid, rows.shape[1]))
        return dequantized.reshape(weight.movedim(axis, 0).shape).movedim(0, axis).contiguous()


@dataclass(frozen=True)
class Weight:
    """A parameter that may go onto a grid, with the sites that read it.

    Attributes:
        name: of the parameter.
        sites: that read it.
        choice: what the recipe says of them.
        computes: whether one of them multiplies whole numbers.
        bits: where an override of the recipe says which; None leaves them open.
    """

    name: str
    sites: tuple[Site, ...]
    choice: Quantization
    computes: bool
    bits: int | None = None

    @property
    def parameters(self) -> int:
        """Number of values."""
        return self.sites[0].parameters

    @property
    def axis(self) -> int:
        """Of the output channels."""
        return self.sites[0].channel_axis


def options_of(
    module: GraphModule, weights: Sequence[Weight], profile: TargetProfile, calls: Calls
) -> dict[str, tuple[Option, ...]]:
    """Returns the options of every weight by parameter name, fewest bytes first, rounded as the recipe says.

    A weight can take the bits that the profile stores; fewer would be stored in as many. Where the recipe's scales are
    of groups, both groups and channels are on offer below the most bits: a scale is paid from the same budget as bits.
    The dearest option is the weight as it is, unless the recipe says the bits.

    Args:
        module: the component's graph in float.
        weights: to make options for.
        profile: what the target can store.
        calls: (step, inputs) of the calls that the layers are looked at in.
    """
    grids = {weight.name: _grids(attribute(module, weight.name), weight, profile) for weight in weights}
    methods = {site.name: w.choice.rounding for w in weights for site in w.sites[:1] if w.choice.rounding != "nearest"}
    rounded = round_each(grids, module, [w.sites[0] for w in weights], methods, calls)
    found = {}
    for weight in weights:
        values = attribute(module, weight.name)
        made = rounded.get(weight.name) or [_nearest(values, grid, weight.axis) for grid in grids[weight.name]]
        options = [
            Option(grid.bits, grid, q, integer_bytes(weight.parameters, grid, profile))
            for grid, q in zip(grids[weight.name], made, strict=True)
        ]
        if weight.bits is None:
            exact = Option(FLOAT_BITS, None, None, float_bytes(values))
            # Where a scale serves few inputs, integers with their scales may be the larger ones.
            options = [*(option for option in options if option.bytes < exact.bytes), exact]
        found[weight.name] = tuple(sorted(options, key=lambda option: option.bytes))
    return found


def integer_bytes(parameters: int, grid: Grid, profile: TargetProfile) -> int:
    """Returns what a weight on a grid takes in a file of the profile's target."""
    bits = min(bits for bits in profile.weight_bits if bits >= grid.bits)
    return math.ceil(parameters * bits / 8) + (2 if profile.halves else 4) * grid.scale.size


def float_bytes(values: torch.Tensor) -> int:
    """Returns what a tensor takes in a file: two bytes for every value if all of them are halves."""
    if not values.is_floating_point():
        return values.numel() * values.element_size()
    halves = values.numel() >= _SMALLEST_HALVES and torch.equal(values.half().float(), values.float())
    return values.numel() * (2 if halves else 4)


def _grids(values: torch.Tensor, weight: Weight, profile: TargetProfile) -> list[Grid]:
    choice = weight.choice
    wanted = profile.weight_bits if weight.bits is None else (weight.bits,)
    kinds = [(bits, choice.granularity) for bits in wanted]
    # Whole numbers are multiplied before they are scaled, and groups are of inputs: one scale for all of a channel.
    if choice.granularity == "group" and (weight.computes or weight.axis != 0):
        kinds = [(bits, "channel") for bits in wanted]
    elif choice.granularity == "group":
        # At the most bits a scale for each channel is fine enough.
        most = max(profile.weight_bits)
        kinds = [(bits, kind) for bits in wanted for kind in ("channel", "group") if kind == "channel" or bits < most]
    return [
        weight_grid(values, bits, axis=weight.axis, granularity=kind, group_size=choice.group_size, profile=profile)
        for bits, kind in kinds
    ]


def _nearest(values: torch.Tensor, grid: Grid, axis: int) -> Array:
    rows = flat(values, axis)
    q = weight_grids.nearest(rows, rows_grid(grid, rows.shape[1]))
    made: Array = q.reshape(values.movedim(axis, 0).shape).movedim(0, axis).contiguous().numpy()
    return made


def gather(sites: Iterable[Site], choices: Mapping[str, tuple[Quantization, bool, int | None]]) -> list[Weight]:
    """Returns the weights of the sites that ``choices`` names, each with choice, whether it computes, and set bits."""
    readers: dict[str, list[Site]] = {}
    for site in sites:
        readers.setdefault(site.weight, []).append(site)
    return [
        Weight(name, tuple(found), choice, any(choices[s.name][1] for s in found), bits)
        for name, found in readers.items()
        if all(site.name in choices for site in found)
        for choice, _, bits in [choices[found[0].name]]
    ]

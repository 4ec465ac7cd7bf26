"""The plan of a quantized generator: a grid for every quantized tensor, and a reason for every one that is not.

A plan is text (JSON, so that two of them can be compared line by line) beside arrays (safetensors), and can be applied
again without calibration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fewstep.bundle.manifest import INTEGERS, Artifact
from fewstep.bundle.manifest import PLAN as PLAN
from fewstep.errors import QuantizationError
from fewstep.hashing import value_sha256
from fewstep.optimize.quantize.plan_schema import HINT, check_plan
from fewstep.optimize.quantize.quantizable_ops import Site
from fewstep.strict import read_json

ARRAYS = "plan.safetensors"
VERSION = 1
Array = npt.NDArray[Any]

_LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int32": (-(2**31), 2**31 - 1)}


@dataclass(frozen=True)
class Grid:
    """The values that a tensor may take: ``scale * (q - zero_point)``, with q whole numbers from ``low`` to ``high``.

    Attributes:
        dtype: in which q is stored: int8, uint8 or int32.
        low: least q.
        high: largest q.
        scale: float32; one number for the whole tensor, one for each channel, or [channels, groups]. Without an axis,
            several numbers are of the whole tensor in each row of the table of steps.
        zero_point: int32, of scale's shape.
        axis: of the channels; None for a grid of the whole tensor.
        group_size: how many successive inputs (a convolution's flattened with its kernel) share a scale; None: all.
    """

    dtype: str
    low: int
    high: int
    scale: Array
    zero_point: Array
    axis: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        """Checks what no grid may lack.

        Raises:
            QuantizationError: a scale that is not a positive number, or a zero point that is no q.
        """
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise QuantizationError(f"a grid has the scale {self.scale.min()}, expected finite numbers above 0")
        least, most = _LIMITS[self.dtype]
        if not (least <= self.low < self.high <= most) or self.scale.shape != self.zero_point.shape:
            raise QuantizationError(f"no {self.dtype} grid goes from {self.low} to {self.high}")
        if (self.zero_point < self.low).any() or (self.zero_point > self.high).any():
            raise QuantizationError("a grid cannot represent zero exactly, expected its zero point among its values")

    @property
    def bits(self) -> int:
        """How many bits q takes."""
        return int(self.high - self.low).bit_length()  # a symmetric grid leaves out the least integer

    @property
    def symmetric(self) -> bool:
        """Whether zero is q = 0."""
        return not self.zero_point.any()

    @property
    def by_row(self) -> bool:
        """Whether the grid is another one in each row of the table of steps."""
        return self.axis is None and self.scale.size > 1

    def to_json(self) -> dict[str, Any]:
        """Returns all but the arrays; scales of whole tensors are written out."""
        values: dict[str, Any] = {"dtype": self.dtype, "bits": self.bits, "low": self.low, "high": self.high}
        if self.axis is None:
            scales, zeros = [float(scale) for scale in self.scale], [int(zero) for zero in self.zero_point]
            if self.by_row:
                return values | {"scale": scales, "zero_point": zeros}
            return values | {"scale": scales[0], "zero_point": zeros[0]}
        return values | {"axis": self.axis, "group_size": self.group_size}


@dataclass(frozen=True)
class ComponentPlan:
    """What becomes of one component.

    Attributes:
        network: hash of the sites and the shapes of their weights: a plan fits no other network.
        weights: grids of weights, by parameter name.
        activations: grids of activations, by the name of the fx node that makes them.
        rounded: weights as whole numbers, by parameter name, where nearest rounding would not give them.
        computes: sites that multiply whole numbers (the others dequantize their weight and compute in float).
        dynamic: of those, the sites whose data each call puts onto a grid for each of its rows, and none is planned.
        outputs: of those, the sites whose result goes onto a grid of its own at once.
        split: whether operations on concatenations are split first, see `fewstep.optimize.quantize.split_concat`.
        float_bias: whether sites that multiply whole numbers add a bias in float; else it is on their products' grid.
        reasons: why a tensor stays in float, by parameter or node name.
    """

    network: str
    weights: Mapping[str, Grid]
    activations: Mapping[str, Grid]
    rounded: Mapping[str, Array] = field(default_factory=dict)
    computes: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    split: bool = False
    float_bias: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)

    def weight_bits(self, sites: tuple[Site, ...]) -> float:
        """Returns the average bits of the weights of all sites; what stays in float counts 32."""
        bits = [
            site.parameters * (self.weights[site.weight].bits if site.weight in self.weights else 32) for site in sites
        ]
        return sum(bits) / max(1, sum(site.parameters for site in sites))


@dataclass(frozen=True)
class QuantPlan:
    """A plan for every component of a generator, for one target profile.

    Attributes:
        source: sha256 of the generator that it was made for.
        profile: name of the target profile.
        components: by name.
        quality: what sensitivity analysis measured and bought, JSON-ready; empty without mixed precision.
    """

    source: str
    profile: str
    components: Mapping[str, ComponentPlan]
    quality: Mapping[str, Any] = field(default_factory=dict)

    def digest(self, component: str) -> str:
        """Returns a hash of all that shapes the quantized graph of a component."""
        plan = self.components[component]
        arrays = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in _arrays(component, plan).items()}
        return value_sha256([_to_json(plan), arrays])

    def label(self, artifact: Artifact) -> Artifact:
        """Returns an artifact that says what its component's weights are stored in and what it computes with."""
        plan = self.components[artifact.component]
        bits = sorted({grid.bits for grid in plan.weights.values()})
        weights = "mixed" if len(bits) > 1 else f"int{bits[0]}" if bits else artifact.weights
        return replace(artifact, weights=weights, compute=INTEGERS if plan.computes else artifact.compute)

    def save(self, folder: Path) -> None:
        """Writes ``plan.json`` and ``plan.safetensors``, the same bytes for the same plan."""
        folder.mkdir(parents=True, exist_ok=True)
        head = {
            "version": VERSION,
            "source": self.source,
            "profile": self.profile,
            "components": {name: _to_json(plan) for name, plan in self.components.items()},
            "quality": self.quality,
        }
        (folder / PLAN).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        arrays: dict[str, Array] = {}
        for name, plan in self.components.items():
            arrays |= _arrays(name, plan)
        save_file(arrays, folder / ARRAYS)

    @classmethod
    def load(cls, folder: Path) -> QuantPlan:
        """Returns the plan that `save` wrote.

        Raises:
            QuantizationError: the folder has no plan, or one of another version.
        """
        try:
            head = read_json(folder / PLAN, error=QuantizationError, hint=HINT)
            arrays = load_file(folder / ARRAYS)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise QuantizationError(f"{folder} has no plan that can be read: {error}", hint=HINT) from error
        version = head.get("version") if isinstance(head, dict) else None
        if version != VERSION:
            raise QuantizationError(f"{folder / PLAN} has version {version!r}, expected {VERSION}", hint=HINT)
        check_plan(head, arrays, folder / PLAN)
        try:
            components = {name: _from_json(name, values, arrays) for name, values in head["components"].items()}
        except QuantizationError as error:
            raise QuantizationError(f"{folder / PLAN}: {error.message}", hint=error.hint or HINT) from error
        return cls(head["source"], head["profile"], components, head["quality"])


def network_sha256(sites: tuple[Site, ...]) -> str:
    """Returns a hash of a component's sites: what a plan is for."""
    return value_sha256([[s.name, s.op, s.data, s.weight, list(s.weight_shape)] for s in sites])


def _to_json(plan: ComponentPlan) -> dict[str, Any]:
    return {
        "network": plan.network,
        "split": plan.split,
        "float_bias": plan.float_bias,
        "weights": {name: grid.to_json() for name, grid in plan.weights.items()},
        "activations": {name: grid.to_json() for name, grid in plan.activations.items()},
        "rounded": sorted(plan.rounded),
        "computes": list(plan.computes),
        "dynamic": list(plan.dynamic),
        "outputs": list(plan.outputs),
        "reasons": dict(plan.reasons),
    }


def _arrays(component: str, plan: ComponentPlan) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for name, grid in plan.weights.items():
        if grid.axis is not None:
            arrays[f"{component}/{name}/scale"] = grid.scale
            arrays[f"{component}/{name}/zero_point"] = grid.zero_point
    arrays |= {f"{component}/{name}/rounded": q for name, q in plan.rounded.items()}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _from_json(component: str, values: Mapping[str, Any], arrays: Mapping[str, Array]) -> ComponentPlan:
    def grid(name: str, v: Mapping[str, Any]) -> Grid:
        if "axis" in v:
            scale, zero = arrays[f"{component}/{name}/scale"], arrays[f"{component}/{name}/zero_point"]
            return Grid(v["dtype"], v["low"], v["high"], scale, zero, v["axis"], v["group_size"])
        return Grid(
            v["dtype"],
            v["low"],
            v["high"],
            np.atleast_1d(np.array(v["scale"], dtype=np.float32)),
            np.atleast_1d(np.array(v["zero_point"], dtype=np.int32)),
        )

    return ComponentPlan(
        network=values["network"],
        split=values["split"],
        float_bias=values.get("float_bias", False),  # plans of before there was a choice
        weights={name: grid(name, v) for name, v in values["weights"].items()},
        activations={name: grid(name, v) for name, v in values["activations"].items()},
        rounded={name: arrays[f"{component}/{name}/rounded"] for name in values["rounded"]},
        computes=tuple(values["computes"]),
        dynamic=tuple(values.get("dynamic", ())),  # as above
        outputs=tuple(values["outputs"]),
        reasons=values["reasons"],
    )

"""What a target computes well in whole numbers: what a quantization plan has to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fewstep.errors import RecipeError


@dataclass(frozen=True)
class TargetProfile:
    """How a target wants its quantized graph.

    Attributes:
        name: of the profile.
        activation: type of quantized activations, uint8 or int8.
        symmetric: whether activations must have zero point 0.
        computes: operations with a kernel that multiplies whole numbers.
        outputs: of those, the ones whose kernel puts out whole numbers: without a grid for its result the operation is
            not fused, and is computed in float after dequantizing everything.
        unfolded: largest number of values for which a 2-D convolution is computed as one product of matrices, whose
            kernel puts out floats: nothing of its result is lost to a grid. Above, memory traffic eats the gain.
        min_rows: a product of fewer rows than this reads more weights than it computes: whole numbers save nothing.
        weight_bits: which bits weights can be stored in.
        computed_scales: whether a product that puts out floats takes a scale of its data that the graph computes. Those
            that put out whole numbers never do: their kernels want constants.
        floats: why other operations stay in float, by name.
        halves: whether scales are stored in half precision, so that a grid must have such scales to begin with.
        float_bias: whether biases stay in float, where integers of 32 bits cannot be added to the products.
        whole_kernels: whether inputs that share a scale are whole channels, with all of a convolution's kernel.
        groups: whether a weight that is multiplied in float may have scales of groups of inputs.
        weight_only: whether a weight that is multiplied in float can be stored as whole numbers at all.
        step_grids: whether an activation's grid may come from a table, by step.
        dynamic: operations with a kernel that finds the grid of each row of its data in each call, with the bits of the
            weights that it takes: see `fewstep.optimize.quantize.dynamic` for what a row is.
    """

    name: str
    activation: str
    symmetric: bool
    computes: frozenset[str]
    outputs: frozenset[str]
    unfolded: int
    min_rows: int
    weight_bits: tuple[int, ...]
    floats: Mapping[str, str]
    computed_scales: bool = True
    halves: bool = False
    float_bias: bool = False
    whole_kernels: bool = False
    groups: bool = True
    weight_only: bool = True
    step_grids: bool = True
    dynamic: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def needs_output_grid(self, op: str, unfolded: int, groups: int) -> bool:
        """Returns whether an operation that computes with whole numbers has to put out whole numbers."""
        as_product = op == "conv2d" and groups == 1 and unfolded <= self.unfolded
        return op in self.outputs and not as_product


_ORT_FLOATS = {
    "scaled_dot_product_attention": "ONNX Runtime's quantized softmax is 6 times slower than the float one",
    "group_norm": "ONNX Runtime has no quantized normalization",
    "layer_norm": "ONNX Runtime has no quantized normalization",
    "silu": "computed between two quantized operations, in float",
    "gelu": "computed between two quantized operations, in float",
    "add": "the residual stream is kept in float",
}

# Products of unsigned activations and signed weights: the one pair with a VNNI instruction.
_X86 = TargetProfile(
    name="x86",
    activation="uint8",
    symmetric=False,
    computes=frozenset({"linear", "conv1d", "conv2d", "conv3d"}),
    outputs=frozenset({"conv1d", "conv2d", "conv3d"}),
    unfolded=1 << 20,
    min_rows=2,
    weight_bits=(4, 8),
    floats=_ORT_FLOATS,
)
# Signed by signed: as fast on ARM, and the same integers on every processor.
_ARM = replace(_X86, name="arm", activation="int8")
# Explicit, symmetric Q/DQ; what is fused is the builder's decision.
_TENSORRT = replace(
    _ARM,
    name="tensorrt",
    symmetric=True,
    outputs=frozenset(),
    unfolded=0,
    min_rows=1,
    floats={},
    computed_scales=False,
)

# Core ML on Apple's neural engine: int8 by int8 with zero points of 0, as coremltools quantizes; all else is fp16.
_ANE = replace(
    _TENSORRT,
    name="ane",
    computes=frozenset({"linear", "conv2d"}),
    floats={"scaled_dot_product_attention": "Core ML computes attention in one operation, in fp16"},
    halves=True,
    float_bias=True,
    whole_kernels=True,
)

# XNNPACK, which computes for LiteRT and ExecuTorch: int8 to int8, and what has no such kernel in float.
_LITERT = replace(
    _ARM,
    name="litert",
    computes=frozenset({"linear", "conv2d"}),
    outputs=frozenset({"linear", "conv2d"}),
    unfolded=0,
    floats=dict.fromkeys(_ORT_FLOATS, "XNNPACK computes it in float"),
    computed_scales=False,
    groups=False,
    step_grids=False,
    dynamic={"linear": (4, 8), "conv2d": (8,)},
)
# Its delegate in ExecuTorch unpacks no stored weight for a product in float.
_EXECUTORCH = replace(_LITERT, name="executorch", weight_only=False, dynamic={})

_ALL = (_X86, _ARM, _TENSORRT, _ANE, _LITERT, _EXECUTORCH)
PROFILES: Mapping[str, TargetProfile] = {profile.name: profile for profile in _ALL}
# Targets that run graphs of one profile only.
REQUIRED: Mapping[str, str] = {
    "coreml": _ANE.name,
    "tensorrt": _TENSORRT.name,
    "litert": _LITERT.name,
    "executorch": _EXECUTORCH.name,
}


def get_profile(name: str) -> TargetProfile:
    """Returns a profile by name.

    Raises:
        RecipeError: no such profile.
    """
    try:
        return PROFILES[name]
    except KeyError:
        raise RecipeError(
            f"unknown target profile {name!r}, expected one of {', '.join(PROFILES)}", hint="edit the recipe"
        ) from None

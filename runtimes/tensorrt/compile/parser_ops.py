"""What TensorRT's ONNX parser takes: operators and the element types that each of them computes in.

From the operator support matrix of onnx-tensorrt, release 10.15 (``docs/operators.md``). Whole numbers of 8 and fewer
bits and FP8 are no types to compute in: they exist between QuantizeLinear and DequantizeLinear alone.
"""

from __future__ import annotations

from collections.abc import Mapping

VERSION = "10.15"
OPSETS = (9, 24)

_FLOAT = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_WHOLE = frozenset({"INT32", "INT64"})
_BOOL = frozenset({"BOOL"})
_NUMBERS = _FLOAT | _WHOLE
_ALL = _NUMBERS | _BOOL
_HALF = frozenset({"FLOAT", "FLOAT16"})
QUANTIZED = frozenset({"INT8", "FLOAT8E4M3FN", "INT4"})


def _table(*rows: tuple[frozenset[str], str]) -> dict[str, frozenset[str]]:
    return {op: types for types, ops in rows for op in ops.split()}


OPERATORS: Mapping[str, frozenset[str]] = _table(
    (
        _FLOAT,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh "
        "CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool "
        "GroupNormalization GRU HardSigmoid HardSwish Hardmax InstanceNormalization IsInf LayerNormalization LeakyRelu "
        "Log LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu QuantizeLinear "
        "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RMSNormalization RNN "
        "RotaryEmbedding Round Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu "
        "Attention",
    ),
    (
        _NUMBERS,
        "Abs Add ArgMax ArgMin DepthToSpace Div Gelu Max Mean Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 "
        "ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter "
        "ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK Trilu Upsample",
    ),
    (_NUMBERS | _BOOL, "Equal Greater GreaterOrEqual Less LessOrEqual IsNaN"),
    (
        _ALL,
        "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot "
        "Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Unsqueeze Where",
    ),
    (_ALL | {"UINT8"}, "Cast CastLike"),
    (_BOOL, "And Not Or Xor"),
    (_HALF, "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign"),
    (_FLOAT | QUANTIZED, "DequantizeLinear"),
)
"""Element types of inputs and outputs, by operator; sizes, axes and indices besides are whole numbers."""

# Operators whose inputs must all be of one type: a strongly typed network converts nothing by itself.
SAME_TYPE = frozenset("Add Sub Mul Div Pow Max Min Mean Sum Mod MatMul Gemm Conv ConvTranspose Concat PRelu".split())
# Inputs that are sizes, axes, indices or conditions, by operator.
PARAMETERS: Mapping[str, tuple[int, ...]] = {
    "Clip": (),
    "Expand": (1,),
    "Gather": (1,),
    "GatherElements": (1,),
    "GatherND": (1,),
    "OneHot": (0, 1),
    "Pad": (1, 3),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "ScatterElements": (1,),
    "ScatterND": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Where": (0,),
    "CumSum": (1,),
}
# Operators that put out conditions, sizes or indices whatever they take.
OTHER_OUTPUTS = frozenset(
    "Equal Greater GreaterOrEqual Less LessOrEqual IsNaN IsInf ArgMax ArgMin Shape Size NonZero Cast CastLike "
    "QuantizeLinear DequantizeLinear TopK".split()
)
RESIZE_MODES = frozenset({"nearest", "linear"})
RESIZE_COORDINATES = frozenset(
    {"half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"}
)

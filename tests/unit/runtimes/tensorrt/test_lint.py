"""Every rule that TensorRT's models are linted by, with a graph that breaks it and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from fewstep.runtimes.tensorrt.compile.lint import lint

FLOAT, INT8 = ir.DataType.FLOAT, ir.DataType.INT8
Array = np.ndarray[Any, Any]


class Graph:
    """A model made node by node."""

    def __init__(self, opset: int = 20, shape: Sequence[int | str] = (1, 4, 8, 8), dtype: ir.DataType = FLOAT) -> None:
        self.x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": opset}, name="g")

    def constant(self, name: str, array: Array | Sequence[float] | float) -> ir.Value:
        """Returns an initializer; plain numbers are float32."""
        array = array if isinstance(array, np.ndarray) else np.asarray(array, dtype=np.float32)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op: str,
        *inputs: ir.Value,
        dtype: ir.DataType = FLOAT,
        domain: str = "",
        outputs: int = 1,
        shape: Sequence[int | str] = (1, 4, 8, 8),
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """Returns the first result of a new node."""
        name = f"{op}_{len(self.graph)}"
        made = ir.node(op, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(made.outputs):
            value.name, value.type, value.shape = f"{name}_{i}", ir.TensorType(dtype), ir.Shape(shape)
        self.graph.append(made)
        return made.outputs[0]

    def grid(
        self,
        value: ir.Value,
        *,
        zero: Array | None = None,
        scale: ir.Value | None = None,
        dtype: ir.DataType = INT8,
    ) -> ir.Value:
        """Returns a value that went onto a grid and back."""
        scale = self.constant(f"{value.name}_scale", 0.1) if scale is None else scale
        zero_point = self.constant(f"{value.name}_zero", np.zeros((), np.int8) if zero is None else zero)
        q = self.node("QuantizeLinear", value, scale, zero_point, dtype=dtype)
        return self.node("DequantizeLinear", q, scale, zero_point)

    def weight(self, array: Array, scale: Array | float = 0.1, **attributes: int) -> ir.Value:
        """Returns a constant that is dequantized."""
        scales = self.constant("w_scale", np.asarray(scale, np.float32))
        zeros = self.constant("w_zero", np.zeros(scales.shape.numpy(), array.dtype))  # type: ignore[union-attr]
        return self.node(
            "DequantizeLinear", self.constant("w", array), scales, zeros, shape=array.shape, attributes=attributes
        )

    def rules(self, result: ir.Value) -> list[str]:
        """Returns the rules that the model breaks."""
        self.graph.outputs.append(result)
        return [finding.rule for finding in lint(ir.Model(self.graph, ir_version=10))]


def conv(g: Graph, data: ir.Value, weight: ir.Value) -> ir.Value:
    return g.node("Conv", data, weight, attributes={"pads": [1, 1, 1, 1]})


def integers(*shape: int, low: int = -127, high: int = 127) -> Array:
    return np.linspace(low, high, int(np.prod(shape))).round().astype(np.int8).reshape(shape)


def test_a_quantized_convolution_is_clean() -> None:
    g = Graph()
    weight = g.weight(integers(4, 4, 3, 3), np.full(4, 0.1), axis=0)
    assert g.rules(g.node("Relu", conv(g, g.grid(g.x), weight))) == []


def test_blocks_of_four_bits_are_clean() -> None:
    g = Graph(21, shape=(8, 64))
    q = integers(64, 16, low=-7, high=7).astype(ml_dtypes.int4)
    weight = g.weight(q, np.full((2, 16), 0.1), axis=0, block_size=32)
    assert g.rules(g.node("MatMul", g.x, weight)) == []


@pytest.mark.parametrize("op", ["MatMulIntegerToFloat", "QLinearConv", "BitShift"], ids=str)
def test_operator(op: str) -> None:
    g = Graph()
    domain = "com.microsoft" if op == "MatMulIntegerToFloat" else ""
    assert g.rules(g.node(op, g.x, domain=domain)) == ["operator"]


def test_a_graph_inside_an_operator_is_not_passed_over() -> None:
    g = Graph()
    inside = ir.Graph([], [], nodes=[], name="inside")
    attributes = {"then_branch": inside, "else_branch": inside}
    condition = g.constant("c", np.ones((), np.bool_))
    assert g.rules(g.node("If", condition, attributes=attributes)) == ["operator", "operator"][:1]


@pytest.mark.parametrize("opset", [8, 25])
def test_opset(opset: int) -> None:
    g = Graph(opset)
    assert g.rules(g.node("Relu", g.x)) == ["opset"]


@pytest.mark.parametrize("dtype", [ir.DataType.DOUBLE, ir.DataType.UINT8], ids=lambda d: d.name)
def test_type(dtype: ir.DataType) -> None:
    g = Graph(dtype=dtype)
    assert set(g.rules(g.node("Sigmoid", g.x, dtype=dtype))) == {"type"}


def test_a_value_of_unknown_type_is_not_passed_over() -> None:
    g = Graph()
    result = g.node("Sigmoid", g.x)
    result.type = None
    assert g.rules(result) == ["type"]


def test_whole_numbers_are_no_type_to_compute_in() -> None:
    g = Graph()
    q = g.node("QuantizeLinear", g.x, g.constant("s", 0.1), g.constant("z", np.zeros((), np.int8)), dtype=INT8)
    assert set(g.rules(g.node("Relu", q, dtype=INT8))) == {"type", "pairs"}


def test_strongly_typed() -> None:
    g = Graph()
    half = g.node("Cast", g.x, dtype=ir.DataType.FLOAT16, attributes={"to": int(ir.DataType.FLOAT16)})
    assert g.rules(g.node("Add", g.x, half)) == ["strongly typed"]


def test_static_shapes() -> None:
    g = Graph(shape=("batch", 4, 8, 8))
    assert g.rules(g.node("Relu", g.x, shape=("batch", 4, 8, 8))) == ["static shapes", "static shapes"]


def test_zero_point() -> None:
    g = Graph()
    assert g.rules(g.grid(g.x, zero=np.array(3, np.int8))) == ["zero point", "zero point"]


def test_a_computed_zero_point() -> None:
    g = Graph()
    computed = g.node("Identity", g.constant("z", np.zeros((), np.int8)), dtype=INT8)
    q = g.node("QuantizeLinear", g.x, g.constant("s", 0.1), computed, dtype=INT8)
    assert "zero point" in g.rules(g.node("DequantizeLinear", q, g.constant("s2", 0.1)))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scale(scale: float) -> None:
    g = Graph()
    assert g.rules(g.grid(g.x, scale=g.constant("s", scale))) == ["scale", "scale"]


def test_a_computed_scale() -> None:
    g = Graph()
    assert g.rules(g.grid(g.x, scale=g.node("Exp", g.constant("s", 0.1)))) == ["scale", "scale"]


def test_scale_of_doubles() -> None:
    g = Graph()
    assert g.rules(g.grid(g.x, scale=g.constant("s", np.array(0.1)))) == ["scale", "scale"]


def test_grid_of_unsigned_integers() -> None:
    g = Graph()
    rules = g.rules(g.grid(g.x, zero=np.zeros((), np.uint8), dtype=ir.DataType.UINT8))
    assert set(rules) == {"grid", "type"}, "unsigned 8 bits are inputs and outputs alone"


def test_a_bias_of_32_bits_is_not_dequantized() -> None:
    g = Graph()
    assert set(g.rules(g.weight(np.arange(4, dtype=np.int32)))) == {"grid", "type"}


def test_activations_of_four_bits() -> None:
    g = Graph(21)
    result = g.grid(g.x, zero=np.zeros((), ml_dtypes.int4), dtype=ir.DataType.INT4)
    assert set(g.rules(result)) == {"grid"}


def test_activations_have_one_scale() -> None:
    g = Graph()
    scale, zero = g.constant("s", [0.1] * 4), np.zeros(4, np.int8)
    assert g.rules(g.grid(g.x, scale=scale, zero=zero)) == ["granularity", "granularity"]


def test_scales_are_of_output_channels() -> None:
    g = Graph()
    weight = g.weight(integers(4, 4, 3, 3), np.full(4, 0.1), axis=1)
    assert g.rules(conv(g, g.grid(g.x), weight)) == ["granularity"]


@pytest.mark.parametrize(("op", "axis", "clean"), [("MatMul", 1, True), ("MatMul", 0, False), ("Gemm", 0, False)])
def test_scales_of_a_product(op: str, axis: int, clean: bool) -> None:
    g = Graph(shape=(8, 4))
    weight = g.weight(integers(4, 4), np.full(4, 0.1), axis=axis)
    assert g.rules(g.node(op, g.grid(g.x), weight)) == ([] if clean else ["granularity"])


def test_a_transposed_weight_of_gemm() -> None:
    g = Graph(shape=(8, 4))
    weight = g.weight(integers(4, 4), np.full(4, 0.1), axis=0)
    assert g.rules(g.node("Gemm", g.grid(g.x), weight, attributes={"transB": 1})) == []


def test_scales_that_do_not_fit() -> None:
    g = Graph()
    weight = g.weight(integers(4, 4, 3, 3), np.full(3, 0.1), axis=0)
    assert g.rules(conv(g, g.grid(g.x), weight)) == ["granularity"]


def test_blocks_of_eight_bits() -> None:
    g = Graph(21, shape=(8, 64))
    weight = g.weight(integers(64, 16), np.full((2, 16), 0.1), axis=0, block_size=32)
    assert g.rules(g.node("MatMul", g.x, weight)) == ["granularity"]


def test_blocks_that_do_not_divide() -> None:
    g = Graph(21, shape=(8, 64))
    q = integers(64, 16, low=-7, high=7).astype(ml_dtypes.int4)
    weight = g.weight(q, np.full((2, 16), 0.1), axis=0, block_size=24)
    assert g.rules(g.node("MatMul", g.x, weight)) == ["granularity"]


def test_weight_range() -> None:
    g = Graph()
    weight = g.weight(integers(4, 4, 3, 3, low=-128), np.full(4, 0.1), axis=0)
    assert g.rules(conv(g, g.grid(g.x), weight)) == ["weight range"]


def test_a_quantized_output() -> None:
    g = Graph()
    q = g.node("QuantizeLinear", g.x, g.constant("s", 0.1), g.constant("z", np.zeros((), np.int8)), dtype=INT8)
    assert g.rules(q) == ["pairs"]


def test_dequantizing_what_was_not_quantized() -> None:
    g = Graph(dtype=INT8)
    assert g.rules(g.node("DequantizeLinear", g.x, g.constant("s", 0.1))) == ["pairs"]


def test_placement() -> None:
    g = Graph()
    weight = g.constant("w", np.ones((4, 4, 3, 3), np.float32))
    assert g.rules(conv(g, g.grid(g.x), weight)) == ["placement"]


@pytest.mark.parametrize(
    "attributes",
    [{"mode": "cubic"}, {"mode": "nearest", "coordinate_transformation_mode": "tf_crop_and_resize"}, {"antialias": 1}],
    ids=str,
)
def test_resize(attributes: Mapping[str, Any]) -> None:
    g = Graph()
    empty, scales = g.constant("roi", []), g.constant("scales", [1.0, 1.0, 2.0, 2.0])
    assert g.rules(g.node("Resize", g.x, empty, scales, attributes=attributes)) == ["restriction"]


def test_second_output_of_layer_normalization() -> None:
    g = Graph()
    assert g.rules(g.node("LayerNormalization", g.x, g.constant("scale", [1.0] * 8), outputs=3)) == ["restriction"]


def test_scatter_that_adds() -> None:
    g = Graph()
    indices = g.constant("i", np.zeros((1, 4), np.int64))
    result = g.node("ScatterND", g.x, indices, g.constant("u", [1.0]), attributes={"reduction": "add"})
    assert g.rules(result) == ["restriction"]


def test_a_finding_says_where_and_what() -> None:
    g = Graph()
    g.graph.outputs.append(g.node("BitShift", g.x))
    (finding,) = lint(ir.Model(g.graph, ir_version=10))
    assert str(finding) == "operator: BitShift BitShift_0: TensorRT 10.15 has no such operator"

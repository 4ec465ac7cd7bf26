"""Short names of values, and the way back."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fewstep.runtimes.onnxruntime.compile.names import restore, shorten
from fewstep.runtimes.onnxruntime.compile.shrink import drop_defaults
from fewstep.runtimes.passes.short_names import ShortNames, lengthener, other_names

# As exporters call values, with numbers in between and leading zeros; and as short ones look.
_names = st.one_of(
    st.from_regex(r"[a-z_]{1,8}(_[0-9]{1,4}){0,2}(_cast_fp16)?", fullmatch=True),
    st.from_regex(r"[a-c][0-9A-Z]{0,2}_{0,2}", fullmatch=True),
)


@given(st.lists(st.sets(_names, max_size=60), max_size=3), st.sets(_names, max_size=20))
def test_names_come_back(graphs: list[set[str]], taken: set[str]) -> None:
    names = ShortNames()
    shortened = [names.shorten(sorted(graph), taken) for graph in graphs]
    lengthen = lengthener(names.table)
    for graph, short in zip(graphs, shortened, strict=True):
        assert short.keys() == graph
        assert len(set(short.values())) == len(graph) and not taken & set(short.values())
        assert {lengthen(value): value for value in short.values()} == short
        assert all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) for value in short.values()), "MIL's identifiers"
        others = [name for name, _ in zip(other_names(taken), range(100), strict=False)]
        assert len({*others, *short.values()}) == 100 + len(graph) and not taken & {*others}
        assert [lengthen(name) for name in others] == others


def test_common_stems_have_the_shortest_names() -> None:
    names = ShortNames()
    short = names.shorten([*(f"conv2d_{i}_cast_fp16" for i in range(40)), "conv2d_cast_fp16", "out_007"], {"a0"})
    assert (short["conv2d_0_cast_fp16"], short["conv2d_12_cast_fp16"], short["conv2d_39_cast_fp16"]) == (
        "a0_",  # a0 is taken
        "aC",
        "a13",
    )
    assert names.table == "conv2d_#_cast_fp16 conv2d_cast_fp16 out_007"
    assert lengthener(names.table)("a13") == "conv2d_39_cast_fp16"
    assert lengthener(names.table)("zz1") == "zz1"


def branching() -> onnx.ModelProto:
    """Returns a model with a branch that reads a value and a weight from around it, and attributes that say nothing."""
    fine, coarse = (
        helper.make_graph(
            [helper.make_node(op, ["linear_1", "weight"], ["a"])],
            name,
            [],
            [helper.make_tensor_value_info("a", TensorProto.FLOAT, [2, 3])],
        )
        for op, name in (("Add", "then"), ("Sub", "else"))
    )
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["view"], name="n0", allowzero=0),
        helper.make_node("Softmax", ["view"], ["linear_1"], name="n1", axis=-1),
        helper.make_node("If", ["choose"], ["select"], name="n2", then_branch=fine, else_branch=coarse),
        helper.make_node("Softmax", ["select"], ["out"], name="n3", axis=0),
    ]
    tensors = [
        helper.make_tensor("shape", TensorProto.INT64, [2], [2, 3]),
        helper.make_tensor("weight", TensorProto.FLOAT, [3], [0.5, 1.0, 2.0]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [6]),
        helper.make_tensor_value_info("choose", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [2, 3])]
    graph = helper.make_graph(nodes, "main", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, choose: bool) -> np.ndarray:  # type: ignore[type-arg]
    """Returns what ONNX Runtime computes."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": np.arange(6, dtype=np.float32), "choose": np.array(choose)})
    return np.asarray(out)


def test_a_model_computes_the_same_with_short_names_and_with_its_own_again() -> None:
    original = branching()
    model = ir.from_proto(branching())  # whose tensors are the message's
    drop_defaults(model)
    shorten(model, {"view", "linear_1", "select", "elsewhere"})
    short = ir.to_proto(model)
    onnx.checker.check_model(short, full_check=True)
    assert not any(node.name for node in short.graph.node)
    assert {name for node in short.graph.node for name in node.output} == {"a_", "b1", "c", "out"}, "a is a branch's"
    left = [sorted(a.name for a in node.attribute) for node in short.graph.node]
    assert left == [[], [], ["else_branch", "then_branch"], ["axis"]]
    restore(model)
    names = [name for node in ir.to_proto(model).graph.node for name in node.output]
    assert names == [name for node in original.graph.node for name in node.output]
    for choose in (False, True):
        for one in (short, ir.to_proto(model)):
            np.testing.assert_array_equal(run(one, choose), run(original, choose))
    untouched = ir.from_proto(branching())
    restore(untouched)
    assert ir.to_proto(untouched).graph.node == ir.to_proto(ir.from_proto(branching())).graph.node

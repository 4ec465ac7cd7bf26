"""What converters are given of a quantized program: float values, markers, and the whole numbers beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.fx import GraphModule

from fewstep.bundle.program import Program
from fewstep.optimize.quantize import quantize
from fewstep.recipe.quantization import Quantization
from fewstep.runtimes.parity.quantized_reference import judged, signed_reference
from fewstep.runtimes.passes.quantized_weights import (
    dequantized_weights,
    guard_weights,
    mark_points,
    marked,
    sign_grids,
    tag,
    unfold_weights,
)
from tests.support.quantized import W8A8, calls_of, feeds, plan_of, program_of, random, run
from tests.support.quantized_net import Net

X = random(1, 4, 8, 8)


def quantized(quantization: Quantization, profile: str = "x86") -> Program:
    program = program_of(Net(), X)
    return quantize(program, plan_of(program, quantization, calls_of(X), profile))


def graph(program: Program) -> GraphModule:
    module = program.exported.module()
    assert isinstance(module, GraphModule)
    return module


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [4, 8])
def test_stored_weights_are_what_the_network_multiplies_by(bits: int, granularity: str) -> None:
    program = quantized(Quantization(weights=bits, granularity=granularity, rounding="nearest"))
    module = graph(program)
    stored = unfold_weights(module)
    assert [weight.bits for weight in stored] == [8, 8]  # both are at an end of the network
    for weight in stored:
        scale = weight.scale if weight.axis is None else weight.scale.reshape(len(weight.values), -1, 1)
        groups = 1 if weight.axis is None else scale.shape[1]
        rows = weight.integers.reshape(len(weight.values), groups, -1).astype(np.float32) * scale
        np.testing.assert_array_equal(rows.reshape(weight.values.shape), weight.values)
    # 36 inputs of the convolution are two groups, 32 of the linear layer are one.
    assert {weight.values.ndim: weight.grouped for weight in stored} == {4: granularity == "group", 2: False}
    with torch.no_grad():
        torch.testing.assert_close(module(X)[0], run(program, X), rtol=0, atol=0)


def test_signed_grids_are_the_same_values() -> None:
    program = quantized(W8A8)
    module = graph(program)
    assert sign_grids(module) > 0
    assert not [n for n in module.graph.nodes if n.args and torch.uint8 in n.args]
    with torch.no_grad():
        torch.testing.assert_close(module(X)[0], run(program, X), rtol=0, atol=0)


def test_markers_change_nothing_and_say_which_point_they_are() -> None:
    program = quantized(W8A8, "litert")
    module = graph(program)
    points = mark_points(module)
    names = [n.name for n in graph(program).graph.nodes if "quantize_per_tensor" in n.name and n.name[0] == "q"]
    assert [point.name for point in points] == names
    clamps = [n for n in module.graph.nodes if n.target is torch.ops.aten.clamp.default]
    assert [marked(n.args[1]) for n in clamps] == list(range(len(points)))
    unfold_weights(module)
    wide = torch.linspace(-1e30, 1e30, 256).reshape(X.shape)
    with torch.no_grad():
        assert torch.isfinite(module(wide)[0]).all()


def test_guards_stand_around_products_and_change_nothing() -> None:
    program = quantized(Quantization(rounding="nearest"))
    module = graph(program)
    assert guard_weights(module, unfold_weights(module), 5) == 3  # nothing folds into the last one's output
    clamps = [n for n in module.graph.nodes if n.target is torch.ops.aten.clamp.default]
    assert sorted(marked(n.args[1]) or 0 for n in clamps) == [5, 6, 7]
    assert {n.args[0].target for n in clamps} > {torch.ops.aten.conv2d.default}
    with torch.no_grad():
        torch.testing.assert_close(module(X)[0], run(program, X), rtol=0, atol=0)


def test_tags_survive_float32_and_are_no_bounds_of_a_network() -> None:
    for point in (0, 1, 2, 1000, (1 << 20) - 1):
        assert marked(float(np.float32(tag(point)))) == point
    assert [marked(bound) for bound in (0.0, -1.0, -6.0, -3.4e38, float("-inf"), 1e30)] == [None] * 6


def test_weights_that_are_multiplied_in_float_are_told_apart() -> None:
    weight_only = dequantized_weights(graph(quantized(Quantization(rounding="nearest"))))
    assert [computes for _, computes in weight_only] == [False, False]
    both = dequantized_weights(graph(quantized(W8A8, "litert")))
    assert all(computes for name, computes in both if "weight" in name)


def test_reference_judges_itself_equal_and_a_flip_not() -> None:
    program = quantized(W8A8)
    expected = signed_reference(program, feeds(program, X))
    assert all(values.dtype == np.int8 for values in expected.values.values())
    exact = judged(expected, expected.values, expected.outputs)
    assert [p.differing for p in exact] == [0] * len(exact)
    name = next(iter(expected.values))
    wrong = {**expected.values, name: expected.values[name] ^ np.int8(1)}
    first = judged(expected, wrong, expected.outputs)[0]
    assert (first.equal, first.largest) == (0.0, 1)
    assert first.unexplained > 0.99 * first.values, "no value but a few lies next to the middle of two integers"


def test_an_integer_next_to_the_middle_of_two_may_be_either_of_them() -> None:
    program = quantized(W8A8)
    expected = signed_reference(program, feeds(program, X))
    name = next(iter(expected.values))
    right = expected.values[name]
    one = (right > -126).astype(np.int8)  # the others would be beyond the least
    middle = replace(expected, least={**expected.least, name: right - one})
    below = {**expected.values, name: right - one}
    assert judged(middle, below, expected.outputs)[0].unexplained == 0
    assert judged(expected, below, expected.outputs)[0].unexplained > 0
    further = {**expected.values, name: right - 2 * one}
    assert judged(middle, further, expected.outputs)[0].unexplained > 0

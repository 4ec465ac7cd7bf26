"""The quantized graph computes what PyTorch's own fake quantization of the same grids computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.bundle.contract import CONDITIONS
from fewstep.bundle.program import Program
from fewstep.errors import QuantizationError
from fewstep.optimize.quantize import ComponentPlan, Grid, PlanQuantizer, quantize
from fewstep.optimize.quantize.apply import float_graph
from fewstep.recipe.quantization import Quantization, SiteChoice
from fewstep.runtimes.pytorch.float64 import open_double
from fewstep.runtimes.pytorch.reference import open_program
from tests.support.quantized import W8A8, calls_of, feeds, plan_of, program_of, random, run

functional = torch.nn.functional
_ops = torch.ops.quantized_decomposed


def on_grid(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """PyTorch's own fake quantization on a grid."""
    if grid.group_size is not None:
        rows = Grid(grid.dtype, grid.low, grid.high, grid.scale.ravel(), grid.zero_point.ravel(), 0)
        return on_grid(x.reshape(grid.scale.size, -1), rows).reshape(x.shape)
    scale, zero = torch.from_numpy(grid.scale), torch.from_numpy(grid.zero_point)
    if grid.axis is None:
        return torch.fake_quantize_per_tensor_affine(x, float(scale[0]), int(zero[0]), grid.low, grid.high)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, grid.axis, grid.low, grid.high)


def bias_on_grid(bias: torch.Tensor, data: Grid, weight: Grid) -> torch.Tensor:
    """A bias of 32-bit integers on the grid of the products."""
    scale = torch.from_numpy(data.scale) * torch.from_numpy(weight.scale)
    return torch.round(bias.double() / scale.double()).float() * scale


class _One(nn.Module):
    """One layer and a ReLU behind it or not."""

    def __init__(self, layer: nn.Module, relu: bool = False) -> None:
        super().__init__()
        self.layer, self.relu = layer, relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return torch.relu(y) if self.relu else y


def plan_and_grids(program: Program, x: torch.Tensor, **changed: object) -> tuple[ComponentPlan, Grid, Grid]:
    plan = plan_of(program, replace(W8A8, **changed), calls_of(x))  # type: ignore[arg-type]
    (weight,) = plan.weights.values()
    _, sites = float_graph(program)
    (site,) = [site for site in sites if site.weight in plan.weights]
    return plan, plan.activations[site.data], weight


CONVOLUTIONS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "padded": {"padding": (2, 0)},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 4, "padding": 1},
    "no bias": {"bias": False, "padding": 1},
    "strides of each axis": {"stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d(name: str, bits: int) -> None:
    """Bit for bit: both sides run the same float convolution on the same numbers."""
    torch.manual_seed(1)
    layer = nn.Conv2d(8, 16, 3, **CONVOLUTIONS[name])  # type: ignore[arg-type]
    x = random(1, 8, 9, 10)
    module = _Middle(layer)
    program = program_of(module, x)
    plan, data, weight = plan_and_grids(program, x, weights=bits)
    assert weight.bits == bits
    assert (weight.axis, weight.group_size) == (0, None), "whole numbers are summed before they are scaled"
    assert bool(plan.outputs) == (layer.groups > 1), "what is not unfolded puts out whole numbers"
    found = run(quantize(program, plan), x)

    class Expected(nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            bias = None if layer.bias is None else bias_on_grid(layer.bias, data, weight)
            w, convolution = on_grid(layer.weight, weight), (layer.stride, layer.padding, layer.dilation, layer.groups)
            y = functional.conv2d(on_grid(h, data), w, bias, *convolution)
            return on_grid(y, next(g for g in plan.activations.values() if g is not data)) if plan.outputs else y

    module.layer = Expected()
    assert torch.equal(found, module(x))


@pytest.mark.parametrize("profile", ["x86", "arm", "tensorrt"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(profile: str, bias: bool) -> None:
    torch.manual_seed(2)
    layer, x = nn.Linear(24, 32, bias=bias), random(1, 5, 24)
    program = program_of(_One(layer), x)
    plan = plan_of(program, W8A8, calls_of(x), profile)
    (weight,), (data,) = plan.weights.values(), plan.activations.values()
    b = bias_on_grid(layer.bias, data, weight) if bias else None
    expected = functional.linear(on_grid(x, data), on_grid(layer.weight, weight), b)
    assert torch.equal(run(quantize(program, plan), x), expected)


def test_a_relu_is_taken_into_the_grid_of_the_result() -> None:
    torch.manual_seed(3)
    layer, x = nn.Conv2d(8, 8, 3, groups=2, padding=1), random(1, 8, 6, 6)
    program = program_of(_One(layer, relu=True), x)
    plan, data, weight = plan_and_grids(program, x, weights=8)
    (out,) = [g for g in plan.activations.values() if g is not data]
    assert int(out.zero_point[0]) == 0, "after a ReLU nothing is below zero"
    bias = bias_on_grid(layer.bias, data, weight) if layer.bias is not None else None
    y = functional.conv2d(on_grid(x, data), on_grid(layer.weight, weight), bias, 1, 1, 1, 2)
    assert torch.equal(run(quantize(program, plan), x), on_grid(torch.relu(y), out))


@pytest.mark.parametrize(("bits", "granularity"), [(8, "channel"), (8, "tensor"), (4, "group"), (4, "channel")])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed"])
def test_weight_only(kind: str, bits: int, granularity: str) -> None:
    torch.manual_seed(4)
    makers = {
        "linear": (lambda: nn.Linear(48, 16), random(1, 3, 48)),
        "conv2d": (lambda: nn.Conv2d(8, 8, 3), random(1, 8, 5, 5)),
        "transposed": (lambda: nn.ConvTranspose2d(8, 12, 2, stride=2), random(1, 8, 5, 5)),
    }
    make, x = makers[kind]
    module = _Middle(make())
    program = program_of(module, x)
    choice = Quantization(weights=bits, granularity=granularity, group_size=12, rounding="nearest")
    plan = plan_of(program, choice, lambda: ())
    (grid,) = plan.weights.values()
    assert grid.bits == bits
    grouped = granularity == "group" and kind != "transposed"
    assert (grid.group_size is not None) == grouped, "groups are of weights whose first axis is the outputs'"
    quantized = quantize(program, plan)
    with torch.no_grad():
        module.layer.weight.copy_(on_grid(module.layer.weight, grid))
        expected = module(x)
    assert torch.equal(run(quantized, x), expected)
    assert not plan.activations and not plan.computes


class _Middle(nn.Module):
    """A layer between two others, so that it is at no end. The others have a single weight, which stays in float."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(1, 1), layer, nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.after(self.layer(self.before(x[..., None])[..., 0])[..., None])[..., 0]
        return y


def test_embedding() -> None:
    torch.manual_seed(5)
    layer, ids = nn.Embedding(40, 16), torch.tensor([[3, 39, 0, 7]])
    program = program_of(_One(layer), ids, origins=[CONDITIONS])
    plan = plan_of(program, W8A8, calls_of(ids))
    (grid,) = plan.weights.values()
    assert not plan.computes, "nothing is multiplied"
    assert "no kernel of whole numbers for embedding" in next(r for r in plan.reasons.values())
    expected = functional.embedding(ids, on_grid(layer.weight, grid))
    assert torch.equal(run(quantize(program, plan), ids), expected)


def test_bias_is_32_bits_on_the_products_grid() -> None:
    torch.manual_seed(6)
    layer, x = nn.Conv2d(8, 16, 3, padding=1), random(1, 8, 6, 6)
    program = program_of(_One(layer), x)
    plan, data, weight = plan_and_grids(program, x)
    graph = quantize(program, plan).exported
    (node,) = [
        n for n in graph.graph.nodes if n.target is _ops.dequantize_per_channel.default and torch.int32 in n.args
    ]
    by_input = {**graph.graph_signature.inputs_to_buffers, **graph.graph_signature.inputs_to_parameters}
    q, scale, zero = (graph.state_dict[by_input[a.name]] for a in node.args[:3])
    assert q.dtype == torch.int32
    np.testing.assert_array_equal(scale.numpy(), data.scale * weight.scale)
    assert not zero.any()
    assert (q.double() * scale.double() - layer.bias.double()).abs().le(0.5 * scale.double() * (1 + 1e-6)).all()


def test_what_several_layers_read_is_on_one_grid() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(x)
            return self.q(x) * self.k(x)

    x = random(1, 4, 16)
    program = program_of(Shared(), x)
    plan = plan_of(program, W8A8, calls_of(x))
    assert len(plan.activations) == 1
    targets = [n.target for n in quantize(program, plan).exported.graph.nodes]
    assert targets.count(_ops.quantize_per_tensor.default) == 1


def test_a_weight_that_two_layers_read() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.layer(torch.tanh(self.layer(x)))
            return result

    x, module = random(1, 4, 16), Twice()
    program = program_of(module, x)
    plan = plan_of(program, W8A8, calls_of(x))
    (weight,) = plan.weights.values()
    _, sites = float_graph(program)
    y = x
    for i, site in enumerate(sites):
        data = plan.activations[site.data]
        y = functional.linear(
            on_grid(y, data), on_grid(module.layer.weight, weight), bias_on_grid(module.layer.bias, data, weight)
        )
        y = torch.tanh(y) if i == 0 else y
    assert torch.equal(run(quantize(program, plan), x), y)


def test_rounded_weights_are_taken_as_they_are() -> None:
    layer, x = nn.Linear(32, 16), random(1, 40, 32)
    program = program_of(_One(layer), x)
    plan = plan_of(program, replace(W8A8, rounding="gptq", weights=8), calls_of(x))
    (name, q), (grid,) = next(iter(plan.rounded.items())), plan.weights.values()
    bumped = replace(plan, rounded={name: np.clip(q + 1, grid.low, grid.high).astype(np.int8)})
    weight = torch.from_numpy(bumped.rounded[name].astype(np.float32) * grid.scale[:, None])
    (data,) = plan.activations.values()
    expected = functional.linear(on_grid(x, data), weight, bias_on_grid(layer.bias, data, grid))
    assert torch.equal(run(quantize(program, bumped), x), expected)


def test_names_override_one_layer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.b(torch.tanh(self.a(x)))
            return y

    x = random(1, 4, 32)
    program = program_of(Two(), x)
    named = replace(W8A8, names={"denoiser/b": SiteChoice(activations=32), "decoder/a": SiteChoice(weights=32)})
    plan = plan_of(program, named, calls_of(x))
    assert plan.computes == ("a",)
    assert set(plan.weights) == {"module.a.weight", "module.b.weight"}


def test_the_quantizer_refuses_what_it_did_not_annotate() -> None:
    x = random(1, 4, 32)
    program = program_of(_One(nn.Linear(32, 32)), x)
    plan = plan_of(program, W8A8, calls_of(x))
    module, sites = float_graph(program)
    with pytest.raises(QuantizationError, match="layer is in the plan and was not annotated"):
        PlanQuantizer(plan, sites).validate(module)


# ----------------------------------------------------------------------------------------------------- second execution


def test_double_agrees_with_float_where_nothing_is_quantized() -> None:
    torch.manual_seed(7)
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1))
    x = random(1, 4, 8, 8)
    program = program_of(module, x)
    with open_double(program) as double, open_program(program) as single:
        one, other = double.run(feeds(program, x))["y"], single.run(feeds(program, x))["y"]
    assert one.dtype == np.float32
    exact = module.double()(x.double()).numpy()
    # Sums of 36 products in float32: a few units of the last place.
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)
    np.testing.assert_allclose(one, exact, rtol=0, atol=1e-7, err_msg="double really computes in float64")


def test_double_rounds_on_the_same_grids() -> None:
    torch.manual_seed(8)
    x = random(1, 8, 6, 6)
    program = program_of(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=2)), x)
    plan = plan_of(program, W8A8, calls_of(x))
    quantized = quantize(program, plan)
    with open_double(quantized) as double, open_program(quantized) as single:
        one, other = double.run(feeds(program, x))["y"], single.run(feeds(program, x))["y"]
    out = plan.activations[float_graph(program)[1][-1].result]
    steps = np.abs(one - other) / out.scale[0]
    assert np.allclose(steps, np.rint(steps), atol=1e-3), "apart by whole steps of the last grid, or not at all"
    # A rounding that falls the other way: a value in 10^5 or so lies that near to a middle.
    assert (steps > 0.5).mean() <= 0.01
    double.close()
    with pytest.raises(AssertionError, match="closed"):
        double.run(feeds(program, x))

"""Activations by sensitivity: noise of one operation's grids, the choice of what computes in float, and its price."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.errors import QuantizationError
from fewstep.optimize.quantize.apply import float_graph
from fewstep.optimize.quantize.mixed_precision.float_fallback import kept_in_float
from fewstep.optimize.quantize.mixed_precision.sensitivity import measure_activation_noise
from fewstep.pipeline.compile import check_size
from fewstep.recipe.quantization import Quantization
from fewstep.recipe.recipe import PRESETS
from tests.support.quantized import W8A8, calls_of, plan_of, program_of, random

_SHAPE = (1, 8, 8, 8)


class _Network(nn.Module):
    """Convolutions side by side; the data of ``spiked`` has one value far from all others."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(8, 32, 3, padding=1)
        self.even = nn.Conv2d(32, 32, 3, padding=1)
        self.spiked = nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=in_place)
        self.register_buffer("spike", torch.zeros(1, 32, 8, 8))
        self.spike[0, 0, 0, 0] = 200.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns an output of the input's shape."""
        x = self.first(x)
        y = self.relu(self.even(x)) + self.spiked(x + self.spike)
        out: torch.Tensor = self.last(y)
        return out


def _program(*, in_place: bool = False) -> Program:
    return program_of(_Network(in_place=in_place), random(*_SHAPE))


_CALLS = calls_of(random(*_SHAPE))


@pytest.mark.parametrize("in_place", [False, True], ids=["pure", "in-place"])
def test_noise_is_that_of_the_network_with_one_operation_on_grids(in_place: bool) -> None:
    program = _program(in_place=in_place)
    module, sites = float_graph(program)
    grids = plan_of(program, W8A8, _CALLS, profile="x86").activations
    noise = measure_activation_noise(module, sites, grids, _CALLS)
    assert set(noise) == {site.name for site in sites}

    network = _Network().eval()
    of = {site.name.rsplit(".", 1)[-1]: site for site in sites}
    grid = grids[of["spiked"].data]

    def on_grid(x: torch.Tensor) -> torch.Tensor:
        scale, zero = float(grid.scale[0]), int(grid.zero_point[0])
        q = torch.clamp(torch.round(x / scale) + zero, grid.low, grid.high)
        return (q - zero) * scale

    error = signal = 0.0
    with torch.no_grad():
        for _, (x,) in _CALLS():
            a = network.first(x)
            kept = network.relu(network.even(a))
            whole = network.last(kept + network.spiked(a + network.spike))
            changed = network.last(kept + network.spiked(on_grid(a + network.spike)))
            error += float((changed - whole).double().square().sum())
            signal += float(whole.double().square().sum())
    # float32: `fake_quantize` multiplies by the scale's reciprocal, which sends few values to the neighbouring integer.
    assert noise[of["spiked"].name].mean == pytest.approx(error / signal, rel=0.02)


def test_what_hurts_most_for_its_price_computes_in_float() -> None:
    program = _program()
    module, sites = float_graph(program)
    grids = plan_of(program, W8A8, _CALLS).activations
    of = {site.name.rsplit(".", 1)[-1]: site for site in sites}
    price = of["spiked"].macs
    assert list(kept_in_float(module, sites, grids, _CALLS, price)) == [of["spiked"].name]
    assert kept_in_float(module, sites, grids, _CALLS, 0) == {}
    everything = kept_in_float(module, sites, grids, _CALLS, sum(site.macs for site in sites))
    assert set(everything) == {site.name for site in sites}

    share = (price + 1) / sum(site.macs for site in sites)
    plan = plan_of(program, replace(W8A8, float_products=share), _CALLS)
    whole = plan_of(program, W8A8, _CALLS)
    assert set(whole.computes) - set(plan.computes) == {of["spiked"].name}
    assert set(plan.weights) == set(whole.weights), "its weight stays in 8 bits"
    assert plan.reasons[of["spiked"].node].startswith("among the most sensitive for what they cost: 8-bit activations")


def test_files_above_the_budget_are_refused() -> None:
    recipe = replace(PRESETS["mixed"], quantization=Quantization(max_bytes=1000))
    artifacts = [Artifact("onnxruntime", c, f"{c}.onnx", "mixed", "fp32", 600) for c in ("denoiser", "decoder")]
    check_size(artifacts[:1], recipe)
    check_size(artifacts, PRESETS["w8"])
    check_size([artifacts[0], replace(artifacts[1], runtime="coreml")], recipe)
    with pytest.raises(QuantizationError, match="take 1200 bytes, 200 more than max_bytes, which is 1000") as caught:
        check_size(artifacts, recipe)
    assert caught.value.hint == "allow --max-size 1200B, or ask for 800B so that they fit"

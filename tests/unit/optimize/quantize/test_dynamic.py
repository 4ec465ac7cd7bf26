"""Grids that each call finds: which operations have them, what a row is, and what the graph computes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewstep.bundle.contract import LATENT
from fewstep.bundle.program import Program
from fewstep.bundle.samples import Sample
from fewstep.errors import RecipeError
from fewstep.numerics.metrics import sqnr_db
from fewstep.optimize.quantize import ComponentPlan, QuantPlan, quantize
from fewstep.optimize.quantize.decisions import decide
from fewstep.optimize.quantize.quantizable_ops import find_sites
from fewstep.recipe.quantization import Quantization, SiteChoice, for_targets
from fewstep.recipe.recipe import load_recipe
from fewstep.recipe.target_profiles import get_profile
from fewstep.runtimes.base import PointResult
from fewstep.runtimes.parity.quantized import OUTPUT_SQNR_DB, operation_checks
from fewstep.runtimes.parity.quantized_reference import integer_reference
from fewstep.runtimes.passes.quantized_weights import float_rows, float_source, unfold_weights
from fewstep.runtimes.pytorch.float64 import open_double
from tests.support.quantized import calls_of, feeds, plan_of, program_of, random, run

Array = npt.NDArray[Any]
DYNAMIC = Quantization(activations=8, dynamic=True, rounding="nearest")
CHOOSE = torch.ops.quantized_decomposed.choose_qparams_per_token_asymmetric.default


def dynamic_of(program: Program, quantization: Quantization = DYNAMIC) -> ComponentPlan:
    return plan_of(program, quantization, calls_of(*(torch.zeros(s.shape) for s in program.spec.inputs)), "litert")


def quantized(program: Program) -> Program:
    return quantize(program, dynamic_of(program))


# ---------------------------------------------------------------------------------------------- what the graph computes


def on_grids(rows: Array) -> Array:
    """Returns rows [R, N] on grids from their least to their largest value, zero among them; float64, by the text."""
    rows = rows.astype(np.float64)
    low, high = np.minimum(rows.min(1, keepdims=True), 0), np.maximum(rows.max(1, keepdims=True), 0)
    scale = np.where(high > low, (high - low) / 255, 1)
    zero = np.clip(np.rint(-128 - low / scale), -128, 127)
    found: Array = scale * (np.clip(np.rint(rows / scale) + zero, -128, 127) - zero)
    return found


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1 << 16), st.sampled_from(["linear", "point", "strided", "image"]), st.floats(0.01, 100))
def test_rows_are_vectors_pixels_and_images(seed: int, kind: str, size: float) -> None:
    x = size * (random(2, 8, 6, 6, seed=seed) * random(2, 1, 6, 6, seed=seed + 1) + 0.1)
    torch.manual_seed(seed)
    layer: nn.Module
    if kind == "linear":
        x, layer = x.flatten(2).transpose(1, 2).contiguous(), nn.Linear(8, 32, bias=False)
        grids = on_grids(x.numpy().reshape(-1, 8)).reshape(x.shape)
    elif kind == "point":
        layer = nn.Conv2d(8, 32, 1, bias=False)
        last = x.numpy().transpose(0, 2, 3, 1)
        grids = on_grids(last.reshape(-1, 8)).reshape(last.shape).transpose(0, 3, 1, 2)
    else:
        size_of = {"strided": {"kernel_size": 1, "stride": 2}, "image": {"kernel_size": 3, "padding": 1}}[kind]
        layer = nn.Conv2d(8, 32, **size_of, bias=False)  # type: ignore[arg-type]
        grids = on_grids(x.numpy().reshape(2, -1)).reshape(x.shape)
    program = program_of(layer, x)
    result = run(quantized(program), x)
    weight = quantize(program, plan_of(program, Quantization(rounding="nearest"), calls_of(x), "litert"))
    expected = run(weight, torch.from_numpy(grids.astype(np.float32)))
    # float32 finds scales that are 1e-7 off float64's: a value in a thousand may fall to the other side of a rounding,
    # which leaves 19 dB above what rounding costs.
    cost_db = sqnr_db(run(weight, x).numpy(), result.numpy())
    assert sqnr_db(expected.numpy(), result.numpy()) >= cost_db + 19
    assert cost_db < 60


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        result: torch.Tensor = self.out(heads)
        return result


TOKENS = random(1, 24, 32)


def test_one_tensor_goes_onto_its_grids_once() -> None:
    program = quantized(program_of(_Attention(), TOKENS))
    found = [node for node in program.exported.graph.nodes if node.target is CHOOSE]
    assert len(found) == 2, "for q, k and v together, and for the last layer"


def test_biases_are_added_in_float_and_nothing_is_calibrated() -> None:
    program = program_of(_Attention(), TOKENS)
    plan = dynamic_of(program)
    assert plan.computes == plan.dynamic == ("q", "k", "v", "out")
    assert not plan.activations
    stored = quantize(program, plan).exported.state_dict | dict(quantize(program, plan).exported.named_buffers())
    assert not [name for name, value in stored.items() if "bias" in name and value.dtype == torch.int32]


def test_double_precision_is_the_same_network() -> None:
    program = quantized(program_of(_Attention(), TOKENS))
    with open_double(program) as session:
        other = session.run(feeds(program, TOKENS))["y"]
    assert 60 < sqnr_db(run(program, TOKENS).numpy(), other) < 160, "another execution of the same grids, and no copy"


class _Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 32, 3, padding=1)
        self.wide, self.point = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x)) * torch.linspace(0.01, 1, 8)
        return self.wide(x) + self.point(x)


def test_readers_of_one_tensor_have_rows_of_their_own() -> None:
    image = random(1, 4, 8, 8)
    program = quantized(program_of(_Forked(), image))
    nodes = {node.name: node for node in program.exported.graph.nodes}
    arounds = [nodes[name].args[0].target for name in ("conv2d_1", "conv2d_2")]
    assert arounds == [torch.ops.aten.reshape.default, torch.ops.aten.permute.default]


def test_a_tensor_may_be_on_a_calibrated_grid_and_on_those_of_each_call() -> None:
    image = random(1, 4, 8, 8)
    program = program_of(_Forked(), image)
    mixed = Quantization(activations=8, dynamic=True, rounding="nearest", names={"*/wide": SiteChoice(dynamic=False)})
    found = quantize(program, plan_of(program, mixed, calls_of(image), "litert"))
    nodes = {node.name: node for node in found.exported.graph.nodes}
    fixed, own = (nodes[name].args[0] for name in ("conv2d_1", "conv2d_2"))
    assert fixed.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default
    assert own.target is torch.ops.aten.permute.default
    assert float_source(nodes["conv2d_2"]) is fixed.args[0].args[0], "and neither goes through the other's"


# -------------------------------------------------------------------------------------------------------- the decisions


def reasons(module: nn.Module, x: torch.Tensor, quantization: Quantization, origin: str = LATENT) -> dict[str, str]:
    program = program_of(module, x, origins=[origin])
    found = decide(
        program,
        find_sites(program, program.exported.module()),  # type: ignore[arg-type]
        quantization,
        get_profile("litert"),
        frozenset({"text_encoder"}),
    )
    return {d.site.name: d.activation_reason or "" for d in found}


def test_one_row_and_the_prompt_compute_in_whole_numbers_too() -> None:
    row = reasons(nn.Linear(64, 64), random(1, 64), DYNAMIC)
    assert row == {"linear": ""}
    assert "1 row" in reasons(nn.Linear(64, 64), random(1, 64), Quantization(activations=8))["linear"]
    assert reasons(nn.Linear(64, 64), random(1, 8, 64), DYNAMIC, "text_encoder.hidden") == {"linear": ""}


def test_what_has_no_kernel_stays_in_float() -> None:
    image = random(1, 64, 8, 8)
    grouped = reasons(nn.Conv2d(64, 64, 3, padding=1, groups=2), image, DYNAMIC)
    assert grouped == {"conv2d": "litert has no kernel that finds grids in each call for conv2d in groups"}
    narrow = Quantization(weights=4, activations=8, dynamic=True)
    layers = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)))
    assert reasons(layers, image, narrow)["1"] == (
        "litert has no kernel that finds grids in each call for conv2d of 4 bits"
    )
    assert reasons(layers, image, narrow)["0"] == "", "the first and the last have 8 bits"


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x) + self.shared(x) + nn.functional.embedding(torch.tensor([1]), self.shared.weight)


def test_a_weight_that_is_read_in_float_is_stored_once() -> None:
    found = reasons(_Twice(), TOKENS, DYNAMIC)
    assert found["own"] == ""
    assert found["shared"] == "its weight is read in float too"


def test_an_operation_may_be_calibrated_beside_others() -> None:
    program = program_of(_Attention(), TOKENS)
    mixed = Quantization(activations=8, dynamic=True, rounding="nearest", names={"*/out": SiteChoice(dynamic=False)})
    plan = plan_of(program, mixed, calls_of(TOKENS), "litert")
    assert plan.dynamic == ("q", "k", "v")
    assert set(plan.outputs) == {"out"}
    assert len(plan.activations) == 2
    assert sqnr_db(run(program, TOKENS).numpy(), run(quantize(program, plan), TOKENS).numpy()) > 25


# ------------------------------------------------------------------------------------------------------------- the plan


def test_a_plan_keeps_what_is_dynamic(tmp_path: Path) -> None:
    plan = dynamic_of(program_of(_Attention(), TOKENS))
    saved = QuantPlan("0" * 64, "litert", {"denoiser": plan})
    saved.save(tmp_path)
    loaded = QuantPlan.load(tmp_path)
    assert loaded.components["denoiser"].dynamic == plan.dynamic
    assert loaded.digest("denoiser") == saved.digest("denoiser")
    values = json.loads((tmp_path / "plan.json").read_text())
    del values["components"]["denoiser"]["dynamic"]
    (tmp_path / "plan.json").write_text(json.dumps(values))
    assert QuantPlan.load(tmp_path).components["denoiser"].dynamic == (), "plans of before there was a choice"


@pytest.mark.parametrize("targets", [["onnxruntime"], ["litert", "onnxruntime"], ["coreml"], ["executorch"]])
def test_other_targets_are_refused(targets: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        for_targets(load_recipe("w8a8-dynamic").quantization, targets)
    assert caught.value.message == (
        f"the recipe puts activations onto grids of each call, and fewstep has no such kernels for {targets[-1]}"
    )
    assert caught.value.hint == "use w8a8, whose grids are calibrated, or build for litert"


def test_litert_takes_its_own_profile() -> None:
    chosen = for_targets(load_recipe("w8a8-dynamic").quantization, ["litert"])
    assert chosen is not None
    assert (chosen.profile, chosen.dynamic) == ("litert", True)


# ------------------------------------------------------------------------------------------------------- the comparison


def test_what_a_kernel_hides_is_compared_by_its_result() -> None:
    program = quantized(program_of(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), TOKENS))
    expected = integer_reference(program, feeds(program, TOKENS))
    first, last = expected.products.values()
    assert not expected.values
    assert not expected.outputs, "the output is a product's own result, with its limit"
    np.testing.assert_array_equal(first.data, TOKENS.numpy())
    assert (first.result >= 0).all(), "after the ReLU"
    np.testing.assert_array_equal(last.result, run(program, TOKENS).numpy())
    assert 25 < first.noise_db < 60
    assert first.weight != last.weight


def test_limit_lets_one_rounding_in_a_thousand_fall() -> None:
    sample = Sample("", 0, 1, 1.0, (), (), np.zeros(1, np.float32))

    def limit(noise_db: float) -> float:
        (check,) = operation_checks(
            "denoiser", sample, 0, [PointResult("n", "m", 9, 0, 0, sqnr_db=70.0, noise_db=noise_db)]
        )
        return check.limit

    # Rounding has the power 1/12 of a step's square; a value that fell has a whole step's.
    assert limit(40.0) == pytest.approx(40 + 10 * math.log10(1 / 12 / 0.001))
    assert limit(90.0) == OUTPUT_SQNR_DB
    assert limit(math.inf) == OUTPUT_SQNR_DB


def test_kernels_that_find_grids_get_floats() -> None:
    module = quantized(program_of(_Attention(), TOKENS)).exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    stored = unfold_weights(module)
    assert [weight.dynamic for weight in stored] == [True] * 4
    float_rows(module)
    assert not [node for node in module.graph.nodes if "quantized_decomposed" in str(node.target)]
    with torch.no_grad():
        (result,) = module(TOKENS)
    # 8 bits of weights are left, none of activations.
    program = program_of(_Attention(), TOKENS)
    plan = plan_of(program, Quantization(rounding="nearest"), calls_of(TOKENS), "litert")
    np.testing.assert_allclose(result.numpy(), run(quantize(program, plan), TOKENS).numpy(), rtol=1e-5, atol=1e-5)

"""Rounding of weights: grids, second moments of inputs, GPTQ, AdaRound and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.errors import CalibrationError, ExportError
from fewstep.optimize.rounding.brecq import reconstruct
from fewstep.optimize.rounding.gptq_adaround import AdaRoundSettings, adaround, gptq, output_error
from fewstep.optimize.rounding.hessians import HessianAccumulator, Layer, hessians
from fewstep.optimize.rounding.weight_qparams import Grid, dequantize, make_grid, nearest

GRANULARITIES = ("tensor", "channel", 5, 64)
QUICK = AdaRoundSettings(iterations=150)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(inputs: int, count: int, seed: int = 0) -> torch.Tensor:
    """Returns inputs [count, inputs] whose neighbours are alike and whose sizes differ."""
    mix = randn(inputs, inputs, seed=seed + 1) * torch.linspace(0.05, 2, inputs)
    return randn(count, inputs, seed=seed) @ mix + 0.5


def error_of(integers: torch.Tensor, grid: Grid, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return output_error(dequantize(integers, grid) - weight, hessian)


# --------------------------------------------------------------------------------------------------------------- grids


@given(
    st.integers(1, 6),
    st.integers(1, 70),
    st.integers(2, 8),
    st.sampled_from(GRANULARITIES),
    st.booleans(),
    st.integers(-20, 20),
    st.integers(0, 99),
)
def test_nearest_is_within_half_a_step(
    rows: int, columns: int, bits: int, granularity: str | int, symmetric: bool, power: int, seed: int
) -> None:
    weight = randn(rows, columns, seed=seed) * 2.0**power
    grid = make_grid(weight, bits, granularity, symmetric=symmetric)
    scale, _ = grid.of_columns(columns)
    error = (dequantize(nearest(weight, grid), grid) - weight).abs()
    # Half a step, and float32's rounding of quotient and product, which grows with the integer (at most 256). An
    # asymmetric range starts at a rounded zero point: the end may lie up to half a step beyond it, half a step more.
    limit = (0.5 if symmetric else 1.0) + 256 * 3 * 2**-24
    assert (error <= scale * limit).all()
    groups = {"tensor": 1, "channel": 1}.get(
        str(granularity), -(-columns // int(granularity)) if isinstance(granularity, int) else 1
    )
    assert grid.scale.shape == (1 if granularity == "tensor" else rows, groups)
    assert (grid.scale > 0).all()
    assert ((grid.zero >= grid.low) & (grid.zero <= grid.high)).all()


@given(st.sampled_from(GRANULARITIES), st.booleans(), st.integers(0, 50))
def test_lp_is_no_worse_than_minmax_in_its_own_measure(granularity: str | int, symmetric: bool, seed: int) -> None:
    weight = randn(4, 60, seed=seed).pow(3)
    errors = []
    for method in ("minmax", "lp"):
        grid = make_grid(weight, 4, granularity, symmetric=symmetric, method=method)
        errors.append(float((dequantize(nearest(weight, grid), grid) - weight).double().abs().pow(2.4).mean()))
    assert errors[1] <= errors[0] * (1 + 1e-5)  # sums in float32 there, float64 here


def test_torch_quantizes_alike() -> None:
    weight = randn(8, 32)
    grid = make_grid(weight, 8, "channel", symmetric=False)
    oracle = torch.fake_quantize_per_channel_affine(weight, grid.scale[:, 0], grid.zero[:, 0], 0, 0, 255)
    steps = (oracle - dequantize(nearest(weight, grid), grid)).abs() / grid.scale
    # torch multiplies by the reciprocal of the scale: a number that is half way may go the other way.
    assert ((steps < 1e-3) | (steps - 1).abs().lt(1e-3)).all()
    assert (steps < 1e-3).float().mean() > 0.99


def test_narrow_grids_and_zeros() -> None:
    weight = randn(3, 10)
    wide, narrow = make_grid(weight, 8), make_grid(weight, 8, narrow=True)
    assert (wide.low, narrow.low, narrow.high) == (-128, -127, 127)
    assert nearest(-weight.abs(), narrow).min() == -127
    zeros = make_grid(torch.zeros(2, 4), 4, method="lp")
    assert torch.equal(dequantize(nearest(torch.zeros(2, 4), zeros), zeros), torch.zeros(2, 4))


def test_grids_that_cannot_be_are_refused() -> None:
    with pytest.raises(ExportError, match="weights of 1 bits by 'minmax' are asked for, expected 2 to 8"):
        make_grid(randn(2, 2), 1)
    with pytest.raises(ExportError, match="granularity is 'row', expected tensor, channel or the size of a group"):
        make_grid(randn(2, 2), 4, "row")
    with pytest.raises(ExportError, match="values that are not finite"):
        make_grid(torch.full((2, 2), float("nan")), 4)


# ------------------------------------------------------------------------------------------------------------- moments

LAYERS = {
    "linear": (torch.nn.Linear(6, 8), (2, 3, 6)),
    "conv": (torch.nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    "strided": (torch.nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 8)),
    "grouped": (torch.nn.Conv2d(6, 9, 3, groups=3), (2, 6, 6, 6)),
    "depthwise": (torch.nn.Conv2d(6, 6, 3, groups=6, padding=1), (1, 6, 6, 6)),
    "one-dimensional": (torch.nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("numbers", [1 << 24, 50], ids=["whole", "in bands"])
def test_the_quadratic_form_is_the_error_of_the_output(
    name: str, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.optimize.rounding.hessians._PATCH_NUMBERS", numbers)
    module, shape = LAYERS[name]
    total = HessianAccumulator(Layer.of(module))
    weight, outputs, change = module.weight.detach(), [], randn(*module.weight.shape, seed=5)
    for seed in range(3):
        x = randn(*shape, seed=seed)
        total.add(x)
        with torch.no_grad():
            delta = torch.func.functional_call(module, {"weight": weight + change}, (x,)) - module(x)
        outputs.append(delta if name == "linear" else delta.movedim(1, -1))
    outputs = [o.reshape(-1, o.shape[-1]) for o in outputs]
    expected = float(torch.cat(outputs).double().pow(2).sum(dim=1).mean())
    # float32 sums
    assert output_error(change.flatten(1), total.result()) == pytest.approx(expected, rel=1e-4)


def test_moments_of_a_graph_are_those_of_its_layers() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
    graph = torch.export.export(net, (randn(1, 3, 5, 5),)).module()
    assert isinstance(graph, torch.fx.GraphModule)

    def calls() -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
        for seed in range(3):
            yield 0, (randn(1, 3, 5, 5, seed=seed),)

    relu = next(n.name for n in graph.graph.nodes if "relu" in n.name)
    found = hessians(graph, {"last": (Layer.of(net[2]), relu)}, calls)["last"]
    x = torch.cat([net[1](net[0](inputs[0])) for _, inputs in calls()]).movedim(1, -1).reshape(-1, 4)
    assert torch.allclose(found[0], x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(CalibrationError, match="no inputs to round its weight for"):
        hessians(graph, {"last": (Layer.of(net[2]), relu)}, lambda: [])


def test_what_is_no_plain_layer_is_refused() -> None:
    for module in (
        torch.nn.ReLU(),
        torch.nn.Conv2d(2, 2, 3, padding_mode="circular"),
        torch.nn.Conv2d(2, 2, 3, padding="same"),
    ):
        with pytest.raises(CalibrationError, match=r"is no linear layer or convolution padded with zeros"):
            Layer.of(module)
    total = HessianAccumulator(Layer())
    total.add(torch.full((2, 3), float("inf")))
    with pytest.raises(CalibrationError, match="inputs of a layer are not finite"):
        total.result()


# ------------------------------------------------------------------------------------------------------------ rounding


def test_gptq_and_adaround_beat_nearest_on_correlated_inputs() -> None:
    gains: dict[str, list[float]] = {"gptq": [], "adaround": []}
    for seed in range(6):
        x, weight = correlated(48, 400, seed), randn(24, 48, seed=seed + 50)
        hessian = x.T @ x / len(x)
        grid = make_grid(weight, 4, (16, "channel")[seed % 2])
        plain = error_of(nearest(weight, grid), grid, weight, hessian)
        for name, rounded in (
            ("gptq", gptq(weight, hessian, grid, block=16)),
            ("adaround", adaround(weight, hessian, grid, AdaRoundSettings(iterations=400))),
        ):
            gains[name].append(plain / error_of(rounded, grid, weight, hessian))
    # On inputs this alike both take off most of the error, for every seed.
    assert min(gains["gptq"]) > 2, gains
    assert min(gains["adaround"]) > 1.5, gains


def test_gptq_with_independent_inputs_is_nearest() -> None:
    weight = randn(8, 40)
    grid = make_grid(weight, 4, 8, symmetric=False)
    assert torch.equal(gptq(weight, torch.diag(torch.linspace(0.1, 1, 40)), grid), nearest(weight, grid))


def test_gptq_does_not_depend_on_its_block() -> None:
    weight, x = randn(8, 40), correlated(40, 200)
    grid = make_grid(weight, 3, symmetric=False)
    results = [gptq(weight, x.T @ x, grid, block=block) for block in (1, 7, 40, 128)]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_gptq_finds_the_best_rounding_of_two_weights() -> None:
    # Brute force over all integers: the second weight has a closed form once the first is rounded.
    x = correlated(2, 100)
    hessian = x.T @ x / 100
    weight = torch.tensor([[0.4, -0.3]])
    grid = make_grid(weight, 3)
    found = error_of(gptq(weight, hessian, grid, damp=0.0, ordered=False), grid, weight, hessian)
    first = int(nearest(weight, grid)[0, 0])
    best = min(
        error_of(torch.tensor([[first, b]], dtype=torch.int8), grid, weight, hessian)
        for b in range(grid.low, grid.high + 1)
    )
    assert found == pytest.approx(best, rel=1e-9)


def test_gptq_of_groups_and_of_inputs_that_are_zero() -> None:
    module = torch.nn.Conv2d(6, 4, 3, groups=2, padding=1)
    total = HessianAccumulator(Layer.of(module))
    x = randn(4, 6, 8, 8).cumsum(dim=2) * 0.1
    x[:, 1] = 0
    total.add(x)
    weight = module.weight.detach().flatten(1)
    grid = make_grid(weight, 4)
    rounded = gptq(weight, total.result(), grid)
    assert (dequantize(rounded, grid)[:2, 9:18] == 0).all(), "channel 1 belongs to the first group and is never on"
    plain = error_of(nearest(weight, grid), grid, weight, total.result())
    assert error_of(rounded, grid, weight, total.result()) < plain


@given(st.integers(2, 8), st.booleans(), st.sampled_from(["channel", 8]), st.integers(0, 30))
def test_adaround_rounds_down_or_up(bits: int, symmetric: bool, granularity: str | int, seed: int) -> None:
    weight, x = randn(3, 16, seed=seed), correlated(16, 50, seed)
    grid = make_grid(weight, bits, granularity, symmetric=symmetric)
    hessian = x.T @ x / 50
    rounded = adaround(weight, hessian, grid, AdaRoundSettings(iterations=20))
    scale, zero = grid.of_columns(16)
    above = rounded.float() - (torch.floor(weight / scale) + zero).clamp(grid.low, grid.high)
    assert set(above.unique().tolist()) <= {0.0, 1.0}
    assert error_of(rounded, grid, weight, hessian) <= error_of(nearest(weight, grid), grid, weight, hessian)


def test_rounding_is_the_same_bit_for_bit() -> None:
    weight, x = randn(16, 32), correlated(32, 100)
    grid = make_grid(weight, 4)
    for method in (gptq, partial(adaround, settings=QUICK)):
        results = [method(weight.clone(), (x.T @ x).clone(), grid) for _ in range(2)]
        assert torch.equal(*results)


def test_hessians_that_do_not_fit_are_refused() -> None:
    weight = randn(4, 6)
    with pytest.raises(CalibrationError, match=r"a Hessian is \[5, 5\] for a weight \[4, 6\], expected \[6, 6\]"):
        gptq(weight, torch.eye(5), make_grid(weight, 4))
    with pytest.raises(CalibrationError, match="singular even when damped"):
        gptq(weight, torch.full((6, 6), 1.0), make_grid(weight, 4), damp=0.0)


# -------------------------------------------------------------------------------------------------------------- blocks


class Residual(torch.nn.Module):
    """Two convolutions with an activation between, and a way past them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(6, 12, 3, padding=1), torch.nn.Conv2d(12, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.nn.functional.silu(self.first(x)))


def block_case() -> dict[str, Any]:
    torch.manual_seed(0)
    module = Residual().requires_grad_(False)
    weights = {f"{name}.weight": module.get_submodule(name).weight for name in ("first", "second")}
    grids = {name: make_grid(w.flatten(1), 3) for name, w in weights.items()}
    x = randn(24, 6, 6, 6).cumsum(dim=3) * 0.4
    block = partial(torch.func.functional_call, module)
    return {"block": block, "weights": weights, "grids": grids, "inputs": [x], "target": module(x)}


def test_a_block_comes_closer_to_its_output_than_its_layers_rounded_to_nearest() -> None:
    case = block_case()
    found = reconstruct(**case, settings=AdaRoundSettings(iterations=300), seed=0)
    assert found.error < 0.7 * found.nearest_error, (found.error, found.nearest_error)
    given = {
        name: dequantize(q, case["grids"][name]).reshape(case["weights"][name].shape)
        for name, q in found.integers.items()
    }
    again = case["block"](given, tuple(case["inputs"])) - case["target"]
    assert found.error == pytest.approx(float(again.double().pow(2).mean()), rel=1e-5)  # batches sum in another order
    for name, q in found.integers.items():
        scale, _ = case["grids"][name].of_columns(q.shape[1])
        floor = torch.floor(case["weights"][name].flatten(1) / scale)
        assert set((q - floor).clamp(-1, 2).unique().tolist()) <= {0.0, 1.0}


def test_blocks_are_the_same_bit_for_bit_and_follow_their_seed() -> None:
    one, two, other = (reconstruct(**block_case(), settings=QUICK, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(q, two.integers[name]) for name, q in one.integers.items())
    assert any(not torch.equal(q, other.integers[name]) for name, q in one.integers.items())


def test_blocks_want_as_many_inputs_as_outputs() -> None:
    case = block_case()
    case["target"] = case["target"][:5]
    with pytest.raises(CalibrationError, match=r"a block has \[5, 24\] samples of its inputs and output"):
        reconstruct(**case, seed=0)


def test_layers_of_the_built_in_generator(repository: Path) -> None:
    """A convolution and a linear layer of the trained denoiser, on what a picture of its own makes them see."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(repository / "apps/stickers/weights/unet").eval()
    names = ("mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.ff.net.2")
    totals = {name: HessianAccumulator(Layer.of(unet.get_submodule(name))) for name in names}
    for name, total in totals.items():
        unet.get_submodule(name).register_forward_hook(lambda _, x, __, total=total: total.add(x[0]))
    width = unet.config.cross_attention_dim
    with torch.no_grad():
        for seed, t in enumerate((999, 759, 499, 259)):
            guidance = torch.zeros(1, unet.config.time_cond_proj_dim)
            unet(randn(1, 4, 16, 16, seed=seed), t, randn(1, 24, width, seed=seed + 9), timestep_cond=guidance)
    for name, total in totals.items():
        weight, hessian = unet.get_submodule(name).weight.detach().flatten(1), total.result()
        grid = make_grid(weight, 4, method="lp")
        plain = error_of(nearest(weight, grid), grid, weight, hessian)
        assert error_of(gptq(weight, hessian, grid), grid, weight, hessian) < 0.7 * plain, name
        assert error_of(adaround(weight, hessian, grid, QUICK), grid, weight, hessian) < 0.9 * plain, name

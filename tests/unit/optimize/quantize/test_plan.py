"""Grids, and the plan: what it says, that it is the same bytes each time, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewstep.bundle.contract import CONDITIONS, LATENT, TIMESTEP
from fewstep.bundle.manifest import INTEGERS, Artifact
from fewstep.bundle.program import Program
from fewstep.calibration.estimate import Range
from fewstep.errors import CalibrationError, QuantizationError
from fewstep.optimize.quantize import ComponentPlan, Grid, QuantPlan, quantize
from fewstep.optimize.quantize.apply import float_graph
from fewstep.optimize.quantize.plan import ARRAYS, PLAN
from fewstep.optimize.quantize.qparams import activation_grid, rows_grid, weight_grid
from fewstep.optimize.quantize.quantizer import spread, to_integers
from fewstep.optimize.rounding.weight_qparams import dequantize
from fewstep.recipe.quantization import Quantization, SiteChoice
from fewstep.recipe.target_profiles import get_profile
from tests.support.quantized import W8A8, calls_of, plan_of, program_of, random, run

FINITE = st.floats(-1e4, 1e4, width=32)


# -------------------------------------------------------------------------------------------------------------- grids


@given(st.lists(FINITE, min_size=1, max_size=40), st.sampled_from(["x86", "arm", "tensorrt"]))
def test_activations_come_back_to_half_a_step(values: list[float], profile: str) -> None:
    x = torch.tensor(values)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    grid = activation_grid(Range(low, high), get_profile(profile))
    assert grid.bits == 8
    assert grid.dtype == ("uint8" if profile == "x86" else "int8")
    scale, zero = float(grid.scale[0]), int(grid.zero_point[0])
    q = to_integers(x, grid)
    # A symmetric grid of a range with one end is half empty, never short. The zero point is rounded, which can move an
    # end of the range by half a step: what is clipped there is off by one step and not by half of one.
    steps = 0.5 if profile == "tensorrt" else 1.0
    error = (scale * (q.double() - zero) - x.double()).abs()
    assert float(error.max()) <= steps * scale * (1 + 1e-5)
    inside = (q > grid.low) & (q < grid.high)
    assert (error[inside] <= 0.5 * scale * (1 + 1e-5)).all()
    assert to_integers(torch.zeros(1), grid).item() == zero, "zero is represented exactly"
    if profile == "tensorrt":
        assert grid.symmetric


@given(
    st.integers(1, 6), st.integers(1, 24), st.sampled_from([2, 4, 8]), st.sampled_from(["tensor", "channel", "group"])
)
def test_weights_come_back_to_half_a_step(outputs: int, inputs: int, bits: int, granularity: str) -> None:
    weight = random(outputs, inputs, seed=outputs * 100 + inputs)
    grid = weight_grid(weight, bits, axis=0, granularity=granularity, group_size=8)
    assert grid.symmetric
    assert (grid.low, grid.high) == (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    assert grid.bits == bits
    q = to_integers(weight, grid)
    scale = spread(torch.from_numpy(grid.scale), grid, weight.shape)
    error = ((scale * q - weight).abs() / scale).broadcast_to(weight.shape)
    inside = (q > grid.low) & (q < grid.high)
    # Ranges are shrunk to the least error: what is clipped may be further away, what is inside is not.
    assert (error[inside] <= 0.5 * (1 + 1e-5)).all()
    # The form that rounding methods take says the same.
    rows = rows_grid(grid, inputs)
    torch.testing.assert_close(dequantize(q, rows), scale * q, rtol=0, atol=0)


@pytest.mark.parametrize(("inputs", "asked", "taken"), [(64, 32, 32), (48, 32, 24), (7, 32, 7), (11, 4, 1)])
def test_groups_come_out_even(inputs: int, asked: int, taken: int) -> None:
    grid = weight_grid(random(3, inputs), 4, axis=0, granularity="group", group_size=asked)
    assert grid.group_size == taken
    assert grid.scale.shape == (3, inputs // taken)


def test_a_grid_along_another_axis() -> None:
    weight = random(6, 4, 3, 3)
    grid = weight_grid(weight, 8, axis=1, granularity="channel", group_size=32)
    assert grid.scale.shape == (4,)
    same = weight_grid(weight.transpose(0, 1), 8, axis=0, granularity="channel", group_size=32)
    np.testing.assert_array_equal(grid.scale, same.scale)
    assert torch.equal(to_integers(weight, grid), to_integers(weight.transpose(0, 1), same).transpose(0, 1))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"scale": np.array([0.0], np.float32)}, "a grid has the scale 0.0, expected finite numbers above 0"),
        ({"scale": np.array([np.nan], np.float32)}, "a grid has the scale nan"),
        ({"zero_point": np.array([200], np.int32)}, "cannot represent zero exactly"),
        ({"high": 200}, "no int8 grid goes from -128 to 200"),
        ({"low": 127}, "no int8 grid goes from 127 to 127"),
        ({"zero_point": np.array([0, 0], np.int32)}, "no int8 grid goes"),
    ],
)
def test_grids_that_are_none(change: dict[str, object], text: str) -> None:
    good = Grid("int8", -128, 127, np.array([0.1], np.float32), np.array([3], np.int32))
    with pytest.raises(QuantizationError, match=re.escape(text)):
        replace(good, **change)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- plan


class _Small(nn.Module):
    """A convolution on each side of a norm, attention between, and a layer that sees the time alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.norm, self.inner = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.time = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + self.time(t)[:, :, None, None]
        h = self.inner(torch.nn.functional.silu(self.norm(x)))
        tokens = h.flatten(2).transpose(1, 2)
        q = self.q(tokens)[:, None]
        h = h + self.out(torch.nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]).transpose(1, 2).view_as(h)
        result: torch.Tensor = self.last(h)
        return result


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of(_Small(), random(1, 4, 4, 4), random(1, 16), origins=[LATENT, TIMESTEP])


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return random(1, 4, 4, 4, seed=5), random(1, 16, seed=6)


@pytest.fixture(scope="module")
def plan(program: Program, inputs: tuple[torch.Tensor, torch.Tensor]) -> ComponentPlan:
    mixed = replace(
        W8A8, rounding="gptq", ops={"linear": SiteChoice(weights=4, activations=32, granularity="group", group_size=8)}
    )
    return plan_of(program, mixed, calls_of(*inputs))


def whole(plan: ComponentPlan) -> QuantPlan:
    return QuantPlan("ab" * 32, "x86", {"denoiser": plan}, {"bits": {"first": 4.0}})


def test_plan_round_trip_is_byte_identical(plan: ComponentPlan, tmp_path: Path) -> None:
    made = whole(plan)
    made.save(tmp_path / "a")
    again = QuantPlan.load(tmp_path / "a")
    again.save(tmp_path / "b")
    whole(plan).save(tmp_path / "c")
    for other in ("b", "c"):
        for name in (PLAN, ARRAYS):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name
    assert again.digest("denoiser") == made.digest("denoiser")
    assert (again.source, again.profile, again.quality) == (made.source, made.profile, made.quality)


def test_a_loaded_plan_makes_the_same_graph(
    program: Program, inputs: tuple[torch.Tensor, torch.Tensor], plan: ComponentPlan, tmp_path: Path
) -> None:
    whole(plan).save(tmp_path)
    once, again = quantize(program, plan), quantize(program, QuantPlan.load(tmp_path).components["denoiser"])
    assert [str(n.target) for n in once.exported.graph.nodes] == [str(n.target) for n in again.exported.graph.nodes]
    for name, value in once.exported.state_dict.items():
        assert torch.equal(value, again.exported.state_dict[name]), name
    assert torch.equal(run(once, *inputs), run(again, *inputs)), "bit for bit"


def test_a_digest_follows_every_choice(plan: ComponentPlan) -> None:
    digest = whole(plan).digest("denoiser")
    name, grid = next((n, g) for n, g in plan.weights.items() if g.axis is not None)
    coarser = replace(grid, scale=grid.scale * np.float32(2))
    key = next(iter(plan.rounded))
    changed = [
        replace(plan, weights={**plan.weights, name: coarser}),
        replace(plan, rounded={**plan.rounded, key: plan.rounded[key] + 1}),
        replace(plan, computes=plan.computes[1:]),
        replace(plan, activations=dict(list(plan.activations.items())[1:])),
        replace(plan, reasons={}),
    ]
    digests = [whole(other).digest("denoiser") for other in changed]
    assert len({digest, *digests}) == len(changed) + 1


def test_every_tensor_has_a_grid_or_a_reason(program: Program, plan: ComponentPlan) -> None:
    module, sites = float_graph(program)
    for site in sites:
        assert (site.weight in plan.weights) != (site.weight in plan.reasons), site.name
        assert (site.name in plan.computes) != (site.node in plan.reasons), site.name
        if site.name in plan.computes:
            assert site.data in plan.activations
    assert "time path" in plan.reasons["module.time.weight"]
    assert plan.reasons[next(s.node for s in sites if s.name == "q")] == "the recipe computes in float"
    operations = {"group_norm": "normalization", "scaled_dot_product_attention": "softmax", "silu": "in float",
                  "add": "residual stream"}  # fmt: skip
    for node in module.graph.nodes:
        for name, reason in operations.items():
            if node.op == "call_function" and f".{name}." in f".{node.target}.".replace("aten.", ""):
                assert node.name in plan.activations or reason in plan.reasons[node.name], node.name
    assert plan.weight_bits(sites) == pytest.approx(
        sum(s.parameters * (plan.weights[s.weight].bits if s.weight in plan.weights else 32) for s in sites)
        / sum(s.parameters for s in sites)
    )


def test_the_plan_says_what_a_reader_wants(plan: ComponentPlan, tmp_path: Path) -> None:
    whole(plan).save(tmp_path)
    head = json.loads((tmp_path / PLAN).read_text())
    values = head["components"]["denoiser"]
    assert values["weights"]["module.q.weight"]["bits"] == 4
    assert values["weights"]["module.q.weight"]["group_size"] == 8
    assert all({"dtype", "bits", "scale", "zero_point"} <= grid.keys() for grid in values["activations"].values())
    assert "rounded" in values and "module.q.weight" in values["rounded"]


def test_labels_of_artifacts(plan: ComponentPlan) -> None:
    artifact = Artifact("onnxruntime", "denoiser", "x/model.onnx", "fp16", "fp32", 1)
    assert (whole(plan).label(artifact).weights, whole(plan).label(artifact).compute) == ("mixed", INTEGERS)
    four = replace(plan, weights={n: g for n, g in plan.weights.items() if g.bits == 4}, computes=())
    assert (whole(four).label(artifact).weights, whole(four).label(artifact).compute) == ("int4", "fp32")
    none = replace(plan, weights={}, computes=())
    assert whole(none).label(artifact) == artifact


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda folder: (folder / PLAN).unlink(), "No such file"),
        (lambda folder: (folder / ARRAYS).unlink(), "has no plan that can be read"),
        (lambda folder: (folder / PLAN).write_text("{"), "is not JSON"),
        (lambda folder: (folder / PLAN).write_text("[]"), "has version None, expected 1"),
        (lambda folder: (folder / PLAN).write_text('{"version": 1}'), "'source' is a required property"),
        (lambda folder: (folder / PLAN).write_text('{"version": 99}'), "has version 99, expected 1"),
        (lambda folder: (folder / ARRAYS).write_bytes(b"\x00"), "has no plan that can be read"),
    ],
    ids=["no plan", "no arrays", "no JSON", "no table", "nothing in it", "version", "broken arrays"],
)
def test_plans_that_cannot_be_read(plan: ComponentPlan, tmp_path: Path, spoil: object, text: str) -> None:
    whole(plan).save(tmp_path)
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(QuantizationError) as caught:
        QuantPlan.load(tmp_path)
    assert text in caught.value.message
    assert "again" in str(caught.value.hint)
    assert "fewstep quantize" not in str(caught.value.hint), "there is no such command"


def test_a_plan_for_another_network(plan: ComponentPlan) -> None:
    class Other(_Small):
        def __init__(self) -> None:
            super().__init__()
            self.other, self.q = self.q, None

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.last(self.other(self.first(x).flatten(2).transpose(1, 2)).transpose(1, 2).view(1, 16, 4, 4))

    other = program_of(Other(), random(1, 4, 4, 4), random(1, 16), origins=[LATENT, TIMESTEP])
    with pytest.raises(QuantizationError) as caught:
        quantize(other, plan)
    assert "the plan of denoiser is for another network: it has no weight" in caught.value.message
    assert caught.value.hint == "make a plan for this generator"


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "lp", "kl", "cosine", "l1", "ema"])
def test_every_ranges_method_makes_a_plan(program: Program, inputs: tuple[torch.Tensor, ...], method: str) -> None:
    made = plan_of(program, replace(W8A8, ranges=method), calls_of(*inputs))
    assert len(made.activations) == 5, "what five layers take, and no more"
    result, reference = run(quantize(program, made), *inputs), run(program, *inputs)
    error = (result - reference).pow(2).mean() / reference.pow(2).mean()
    # 8 bits of a value within a few standard deviations: 40 dB at each of the places, less what they add up to.
    assert float(error) < 10 ** (-25 / 10), method


# ---------------------------------------------------------------------------------------------------------- bad calls


def test_no_calibration_calls(program: Program) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration call, expected at least one for each step"):
        plan_of(program, W8A8, lambda: ())


def test_calls_that_are_not_finite(program: Program, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    broken = inputs[0].clone()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="has values that are not finite at step 0"):
        plan_of(program, W8A8, calls_of(broken, inputs[1]))


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_rounding_without_calls(program: Program, rounding: str) -> None:
    with pytest.raises(CalibrationError):
        plan_of(program, Quantization(rounding=rounding), lambda: ())


@pytest.mark.parametrize("steps", [(0, 2), (1, 2), (0, 1)])
def test_a_step_without_calls(
    program: Program, inputs: tuple[torch.Tensor, torch.Tensor], steps: tuple[int, ...]
) -> None:
    from fewstep.optimize.quantize.planner import plan_component

    def calls() -> list[tuple[int, tuple[torch.Tensor, ...]]]:
        return [(step, inputs) for step in steps]

    expected = rf"calibration has calls of steps \[{steps[0]}, {steps[1]}\], expected every one of \[0, 1, 2\]"
    with pytest.raises(CalibrationError, match=expected) as caught:
        plan_component(program, W8A8, get_profile("x86"), calls, steps=range(3))
    assert "every step" in str(caught.value.hint)


def test_conditions_are_no_excuse() -> None:
    """A component that runs once has step 0 and nothing else."""
    program = program_of(nn.Linear(32, 32), random(1, 4, 32), origins=[CONDITIONS])
    made = plan_of(program, W8A8, calls_of(random(1, 4, 32)))
    assert set(made.weights) == {"module.weight"}

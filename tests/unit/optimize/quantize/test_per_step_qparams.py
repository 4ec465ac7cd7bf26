"""Grids of activations for all steps, for groups of them, or for each."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from fewstep.bundle.program import Program
from fewstep.calibration.estimate import Range, estimate, squared_error
from fewstep.calibration.histogram import BINS, Histogram, bin_of
from fewstep.calibration.ranges import StepRanges
from fewstep.errors import QuantizationError
from fewstep.export.specialize.at_step import at_row
from fewstep.numerics.metrics import sqnr_db
from fewstep.optimize.quantize import ComponentPlan, QuantPlan, quantize
from fewstep.optimize.quantize.per_step_qparams import SHARED, SHARED_LOSS, StepGrids
from fewstep.optimize.quantize.planner import plan_component
from fewstep.optimize.quantize.qparams import activation_grid
from fewstep.recipe.target_profiles import get_profile
from fewstep.runtimes.onnxruntime.compile import lower as ort_lower
from fewstep.runtimes.onnxruntime.debug import compare_tensors as ort_points
from fewstep.runtimes.pytorch.float64 import open_double
from tests.support.quantized import W8A8, Calls, feeds, program_of, random, run

X86 = get_profile("x86")
SCALES = (1.0, 5.0, 5.0, 0.2)
EACH = StepGrids([[k] for k in range(4)])


def seen(values: np.ndarray) -> Histogram:
    """Returns what calibration keeps of some values."""
    low, high = float(values.min()), float(values.max())
    counts = np.bincount(bin_of(values, low, high), minlength=BINS)
    return Histogram(low, high, counts, 1, low, high)


def ranges() -> StepRanges:
    """Returns ranges of a tensor that grows and shrinks from step to step."""
    normal = np.random.default_rng(0).standard_normal(4000)
    found = {("x", k): seen(scale * np.roll(normal, k)) for k, scale in enumerate(SCALES)}
    return StepRanges(("x",), (0, 1, 2, 3), found)


def test_one_grid_or_one_for_each_row() -> None:
    seen_ranges = ranges()
    one = SHARED.grid(seen_ranges, "x", "mse", X86)
    expected = activation_grid(estimate(seen_ranges.merged("x"), "mse"), X86)
    assert not one.by_row and one.to_json() == expected.to_json()
    each = EACH.grid(seen_ranges, "x", "mse", X86)
    alone = [activation_grid(estimate(seen_ranges.at("x", k), "mse"), X86) for k in range(4)]
    np.testing.assert_array_equal(each.scale, np.concatenate([grid.scale for grid in alone]))
    np.testing.assert_array_equal(each.zero_point, np.concatenate([grid.zero_point for grid in alone]))
    assert each.by_row


def test_a_row_that_was_not_calibrated_has_the_grid_of_all_steps() -> None:
    seen_ranges = ranges()
    found = StepGrids([[0], [1, 2], [], [3]]).grid(seen_ranges, "x", "minmax", X86)
    both = activation_grid(estimate(seen_ranges.merged("x", [1, 2]), "minmax"), X86)
    whole = SHARED.grid(seen_ranges, "x", "minmax", X86)
    assert (found.scale[1], found.scale[2]) == (both.scale[0], whole.scale[0])


def test_steps_that_are_alike_share_a_grid() -> None:
    grouped = StepGrids(EACH.rows, grouped=True)
    found = grouped.grid(ranges(), "x", "mse", X86)
    assert found.scale[1] == found.scale[2]
    assert len(set(found.scale.tolist())) == 3
    # What grouping costs is what it may cost.
    error = functools.partial(squared_error, bits=8, symmetric=False)
    pair = [ranges().at("x", k) for k in (1, 2)]
    together = estimate(ranges().merged("x", [1, 2]), "mse")
    assert sum(error(h, together) for h in pair) <= SHARED_LOSS * sum(error(h, estimate(h, "mse")) for h in pair)
    alike = {("x", k): seen(np.linspace(-1, 1, 999)) for k in range(4)}
    assert not grouped.grid(StepRanges(("x",), (0, 1, 2, 3), alike), "x", "mse", X86).by_row


def test_error_of_a_range_is_that_of_rounding() -> None:
    values = np.random.default_rng(1).uniform(-1, 1, 20_000)
    found = squared_error(seen(values), Range(-1, 1), bits=8, symmetric=False)
    assert found == pytest.approx((2 / 255) ** 2 / 12, rel=0.02)  # uniform over a step: its square by 12
    assert squared_error(seen(np.ones(3)), Range(0, 0), bits=8, symmetric=False) == 1


class _Net(torch.nn.Module):
    """Layers whose data a step's number scales; the input itself is on a grid, before the step is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.a, self.b = (torch.nn.Linear(16, 16, bias=i > 0) for i in range(3))
        self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.tail = torch.nn.Linear(16, 16)
        self.register_buffer("table", torch.tensor(SCALES)[:, None])

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(self.head(x) * self.table.index_select(0, step)))
        h = self.conv(h.reshape(1, 8, 8, 16)).reshape(1, 64, 16)
        result: torch.Tensor = self.tail(self.b(h))
        return result


class _Grouped(torch.nn.Module):
    """Convolutions whose kernel puts out whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Conv2d(16, 16, 3, padding=1, groups=2) for _ in range(2))
        self.register_buffer("table", torch.tensor(SCALES)[:, None, None, None])

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.b(torch.relu(self.a(x * self.table.index_select(0, step))))
        return result


@functools.cache
def net() -> tuple[Program, Calls]:
    """Returns a program that takes a step, and calls of each."""
    torch.manual_seed(0)
    x = random(1, 64, 16)
    program = program_of(_Net(), x, torch.tensor([0]), origins=["latent", "step"])

    def calls() -> list[tuple[int, tuple[torch.Tensor, ...]]]:
        return [(k, (x + 0.1 * i, torch.tensor([k]))) for k in range(4) for i in range(2)]

    return program, calls


def plan(step_grids: StepGrids) -> ComponentPlan:
    """Returns the plan of the program."""
    program, calls = net()
    return plan_component(program, W8A8, X86, calls, step_grids=step_grids)[0]


def test_every_backend_computes_with_the_grids_of_the_step(tmp_path: Path) -> None:
    program, _ = net()
    x = random(1, 64, 16)
    each, shared = (quantize(program, plan(grids)) for grids in (EACH, SHARED))
    small = (x, torch.tensor([3]))
    exact = run(program, *small).numpy()
    # At a fifth of the values, a grid for five times as much loses more than two bits.
    assert sqnr_db(exact, run(each, *small).numpy()) >= sqnr_db(exact, run(shared, *small).numpy()) + 12
    path = tmp_path / ort_lower.lower(each, tmp_path, "fp32").path
    for k in range(4):
        given = feeds(each, x, torch.tensor([k]))
        points = ort_points.compare_integers(each, path, given)
        assert len(points) >= 5 and all(p.equal >= 0.999 and p.largest <= 1 for p in points), k
        with open_double(each) as session:
            assert sqnr_db(run(each, x, torch.tensor([k])).numpy(), session.run(given)["y"]) >= 35


def test_kernels_that_want_constants_have_them_in_a_graph_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = random(1, 16, 16, 16)
    program = program_of(_Grouped(), x, torch.tensor([0]), origins=["latent", "step"])
    calls = [(k, (x, torch.tensor([k]))) for k in range(4)]
    kinds = {}
    for constant in (False, True):
        made = plan_component(program, W8A8, X86, lambda: calls, step_grids=StepGrids(EACH.rows, constant=constant))[0]
        assert all(grid.by_row == constant for grid in made.activations.values())
        quantized = quantize(program, made)
        for row in (0, 3):
            alone = at_row(quantized, row)
            np.testing.assert_array_equal(run(alone, x).numpy(), run(quantized, x, torch.tensor([row])).numpy())
        model = tmp_path / ort_lower.lower(alone if constant else quantized, tmp_path, "fp32").path
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(model), options)
        kinds[constant] = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert kinds[False].count("QLinearConv") == kinds[True].count("QLinearConv") == 2


def test_a_plan_with_grids_by_step_is_read_back(tmp_path: Path) -> None:
    made = QuantPlan("0" * 64, "x86", {"denoiser": plan(EACH)})
    made.save(tmp_path)
    again = QuantPlan.load(tmp_path)
    assert again.digest("denoiser") == made.digest("denoiser")
    assert all(grid.by_row for grid in again.components["denoiser"].activations.values())


def test_a_graph_without_a_step_is_refused() -> None:
    program, _ = net()
    spec = program.spec
    blind = Program(
        "denoiser", "unet", program.exported, type(spec)(spec.inputs, spec.outputs, {"x0": "latent", "x1": "timestep"})
    )
    with pytest.raises(QuantizationError, match="the graph does not take the step"):
        quantize(blind, plan(EACH))

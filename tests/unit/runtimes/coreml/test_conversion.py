"""What coremltools converts only with our help: each case is a network that it refuses, or converts to another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fewstep.bundle.contract import ComponentSpec, TensorSpec
from fewstep.bundle.program import Program
from fewstep.errors import ExportError
from fewstep.numerics.metrics import sqnr_db
from fewstep.runtimes.coreml import runtime as coreml
from fewstep.runtimes.coreml.compile.decompositions import _halves
from fewstep.runtimes.coreml.compile.lower import lower
from fewstep.runtimes.coreml.debug.bisect import bisect
from fewstep.runtimes.coreml.mil import open_package

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
WEIGHT, BIAS, ROW = torch.linspace(-1, 1, 64).reshape(8, 8), torch.ones(8), torch.linspace(0, 1, 8).reshape(1, 1, 8)
SMALL = torch.tensor([1.0, 0.01, 0.0]).reshape(3, 1)  # the last row is nothing but zeros
SCALE, SHIFT = (torch.linspace(low, 2, 3).reshape(1, 3, 1, 1) for low in (0.5, -1))


class Applied(torch.nn.Module):
    """A function of two tensors as a module."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.function(a, b)


def program_of(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], names: tuple[str, str, str] = ("a", "b", "y")
) -> Program:
    given = (torch.from_numpy(X), torch.from_numpy(X[::-1].copy()))
    exported = torch.export.export(Applied(function).eval(), given)
    shape = tuple(function(*given).shape)
    a, b, y = names
    inputs = (TensorSpec(a, "float32", X.shape), TensorSpec(b, "float32", X.shape))
    return Program("denoiser", "unet", exported, ComponentSpec(inputs, (TensorSpec(y, "float32", shape),), {}))


def quality(program: Program, folder: Path) -> float:
    given = dict(zip((spec.name for spec in program.spec.inputs), (X, X[::-1].copy()), strict=True))
    path = folder / lower(program, folder, "fp32").path
    (output,) = program.spec.outputs
    with coreml.open_exact(path, program.spec) as session:
        result = session.run(given)[output.name]
    reference = program.exported.module()(*(torch.from_numpy(value) for value in given.values()))
    assert bisect(program, path, given, limit_db=100.0) is None
    return sqnr_db(reference.detach().numpy(), result)


@pytest.mark.parametrize(
    "function",
    [
        # Without help it becomes the exact GELU: 74 dB.
        pytest.param(lambda a, b: functional.gelu(a, approximate="tanh") * b, id="gelu by tanh"),
        pytest.param(lambda a, b: functional.gelu(a) * b, id="exact gelu"),
        pytest.param(lambda a, b: torch.where(a > b, a, 0.5), id="where with a number last"),
        pytest.param(lambda a, b: torch.where(a > b, -0.5, b), id="where with a number first"),
        pytest.param(lambda a, b: torch.where((a > b) & (a > 0) | (b > 1), a, b), id="operators of truth values"),
        pytest.param(lambda a, b: a.new_ones((3, 1)) * 0.5 + a * b, id="ones like another tensor"),
        pytest.param(lambda a, b: torch.where((a > b) & a.new_ones((), dtype=torch.bool), a, b), id="a single one"),
        # Without help the epsilon counts for more, or for less.
        pytest.param(lambda a, b: functional.rms_norm(a * SMALL, (8,), BIAS, 1e-3) + b, id="rms norm of small values"),
        pytest.param(lambda a, b: functional.rms_norm(300 * a, (3, 8)) + b, id="rms norm of large values"),
        pytest.param(lambda a, b: functional.group_norm((a * b).reshape(1, 6, 2, 2, 2), 3), id="group norm of a video"),
        pytest.param(
            lambda a, b: functional.interpolate((a * b).reshape(1, 2, 3, 2, 4), scale_factor=(2.0, 2.0, 3.0)),
            id="enlargement of a video",
        ),
        pytest.param(lambda a, b: 1 / (a * a + 0.1) + b, id="reciprocal"),
        pytest.param(lambda a, b: torch.ops.aten._euclidean_dist(a[0], b[1] + 3), id="distances"),
        pytest.param(lambda a, b: torch.concatenate([a, b], dim=-1) * 2, id="concatenate"),
        pytest.param(
            lambda a, b: functional.interpolate(a[None], scale_factor=2.0, mode="nearest-exact") + b.mean(),
            id="exact nearest enlargement",
        ),
        pytest.param(lambda a, b: functional.linear(a[0], WEIGHT, BIAS) + ROW + b[:1], id="a table of one row"),
    ],
)
def test_operation(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    # fp32 on both sides, one operation deep: 1e-6 of the values is 120 dB.
    assert quality(program_of(function), tmp_path) >= 110


def test_batch_norms_of_products_and_sums_are_exact(tmp_path: Path) -> None:
    program = program_of(lambda a, b: a[..., None] * SCALE + SHIFT + b[..., None])
    # The epsilon of coremltools' batch norm alone would leave 111 dB here.
    assert quality(program, tmp_path) >= 130
    package = open_package(tmp_path / "Unet.mlpackage")
    assert "batch_norm" in {operation.type for operation in package.functions["main"].block.operations}


def test_rms_norms_compute_in_fp16(tmp_path: Path) -> None:
    program = program_of(lambda a, b: functional.rms_norm(300 * a, (8,), eps=1e-6) + b)
    package = open_package((tmp_path / lower(program, tmp_path, "fp16").path).parent)
    types = {
        o.outputs[0][1].dtype.name
        for o in package.functions["main"].block.operations
        if o.type not in ("cast", "const")
    }  # type: ignore[union-attr]
    assert types <= {"fp16", "int32", "bool", "string"}


@given(st.floats(1e-8, 1e-2))
def test_an_epsilon_is_a_product_of_halves(value: float) -> None:
    first, second = _halves(value)
    assert np.float16(first) == first
    assert np.float16(second) == second
    assert abs(first * second - value) <= 2.0**-17 * value


def test_gelu_stays_one_operation(tmp_path: Path) -> None:
    program = program_of(lambda a, b: functional.gelu(a, approximate="tanh") + b)
    package = open_package((tmp_path / lower(program, tmp_path, "fp32").path).parent)
    operations = [o.type for o in package.functions["main"].block.operations if o.type != "const"]
    assert operations == ["gelu", "add"]


def test_names_with_dots_are_names_with_underscores(tmp_path: Path) -> None:
    program = program_of(lambda a, b: a - 2 * b, ("encoder.latent.mean", "encoder.latent.std", "a.b.c"))
    assert quality(program, tmp_path) >= 110
    package = open_package(tmp_path / "Unet.mlpackage")
    assert {feature.name for feature in package.inputs["main"]} == {"encoder_latent_mean", "encoder_latent_std"}


def test_inputs_may_be_read_in_another_order(tmp_path: Path) -> None:
    assert quality(program_of(lambda a, b: torch.tanh(b) - 2 * a), tmp_path) >= 110


def test_names_that_would_be_the_same_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"a\.b and a_b would both be a_b on Core ML"):
        lower(program_of(torch.add, ("a.b", "a_b", "y")), tmp_path, "fp32")

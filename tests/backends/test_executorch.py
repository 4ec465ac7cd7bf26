"""ExecuTorch computes what PyTorch computes; needs executorch, in an environment of its own: `make test-backends`."""

from __future__ import annotations

from dataclasses import replace
from importlib import util
from pathlib import Path

import pytest
import torch

from fewstep.bundle.program import Program
from fewstep.errors import ContractError, ExportError
from fewstep.numerics.metrics import sqnr_db
from fewstep.optimize.quantize import quantize
from fewstep.recipe.recipe import Limits
from fewstep.runtimes import get_runtime
from fewstep.runtimes.passes.quantized_weights import QUANTIZE
from tests.backends.networks import INPUTS, net
from tests.support.quantized import W8A8, calls_of, feeds, plan_of, program_of, random, run

if util.find_spec("executorch") is None:
    pytest.skip("executorch is not installed: `make test-backends` runs these tests", allow_module_level=True)

from fewstep.runtimes.executorch.compile.lower import convert, prepared

EXECUTORCH = get_runtime("executorch")


def compiled(program: Program, folder: Path) -> Path:
    artifact = EXECUTORCH.compile(program, folder, "fp32")
    path = folder / artifact.path
    assert artifact.bytes == path.stat().st_size
    return path


def quality_db(program: Program, path: Path) -> float:
    with EXECUTORCH.open(path, program.spec, 1) as session:
        outputs = session.run(feeds(program, *INPUTS))
    return sqnr_db(run(program, *INPUTS).numpy(), outputs["y"])


def test_float_network_keeps_the_limit_of_lowering(tmp_path: Path) -> None:
    assert quality_db(net(), compiled(net(), tmp_path)) >= Limits().component_sqnr_db


def test_what_xnnpack_has_kernels_for_is_delegated() -> None:
    _, left = convert("denoiser", prepared(net()), INPUTS)
    assert dict(left) == {"aten.embedding.default": 1, "aten.native_layer_norm.default": 1}


def test_whole_numbers_are_those_of_the_plan(tmp_path: Path) -> None:
    program = net("executorch", 8, 8)
    path = compiled(program, tmp_path)
    assert EXECUTORCH.compare_integers is not None
    found = EXECUTORCH.compare_integers(program, path, feeds(program, *INPUTS))
    assert len([p for p in found if p.sqnr_db is None]) == 12
    for point in found:
        assert point.equal >= 0.999 and point.largest <= 1, point
    assert path.stat().st_size < 45_000  # 75 kB in float


class _Skip(torch.nn.Module):
    """One quantized tensor is read by a norm and by a concatenation that another delegate computes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.GroupNorm(4, 16)
        self.tokens, self.last = torch.nn.LayerNorm(16), torch.nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.first(x)
        tokens = self.tokens(self.norm(skip).flatten(2).transpose(1, 2))
        result: torch.Tensor = self.last(torch.cat([tokens.transpose(1, 2).unflatten(2, (8, 8)), skip], 1))
        return result


def test_quantized_skip_leaves_a_delegate_in_its_own_layout(tmp_path: Path) -> None:
    image = INPUTS[0]
    program = program_of(_Skip(), image, origins=["latent"])
    program = quantize(program, plan_of(program, W8A8, calls_of(image), "executorch"))
    with EXECUTORCH.open(compiled(program, tmp_path), program.spec, 1) as session:
        result = session.run(feeds(program, image))["y"]
    last = [node for node in program.exported.graph.nodes if node.target is QUANTIZE][-1]
    # One step of the output's grid, where sums in another order tip a rounding; the rest is float32's noise.
    assert abs(result - run(program, image).numpy()).max() <= 1.001 * float(last.args[1])


def test_weights_that_are_only_stored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="stored as integers and multiplied in float") as caught:
        compiled(net("litert", 8), tmp_path)
    assert "profile 'executorch'" in str(caught.value)


def test_other_interface_and_damage_are_refused(tmp_path: Path) -> None:
    path, spec = compiled(net(), tmp_path), net().spec
    fewer = replace(spec, inputs=spec.inputs[:1])
    with pytest.raises(ContractError, match="program has 2 inputs, the manifest has 1"):
        EXECUTORCH.open(path, fewer, 1)
    session = EXECUTORCH.open(path, spec, 1)
    session.close()
    with pytest.raises(ContractError, match="closed"):
        session.run(feeds(net(), *INPUTS))
    path.write_bytes(b"not a program" * 10)
    with pytest.raises(ContractError, match="ExecuTorch cannot load it"):
        EXECUTORCH.open(path, spec, 1)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_both_gelus_are_what_was_asked_for(approximate: str, tmp_path: Path) -> None:
    x = random(1, 64, 32)
    program = program_of(torch.nn.GELU(approximate), x, origins=["latent"])
    with EXECUTORCH.open(compiled(program, tmp_path), program.spec, 1) as session:
        result = session.run(feeds(program, x))["y"]
    assert sqnr_db(run(program, x).numpy(), result) >= Limits().component_sqnr_db


class _Video(torch.nn.Module):
    """A video's decoder in small: a convolution of three axes, patches put together, an enlargement, a copy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv3d(4, 16, 3, padding=1)
        self.register_buffer("mix", random(16, 16).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.first(x).view(1, 2, 2, 2, 2, 3, 8, 8).permute(0, 1, 5, 2, 6, 3, 7, 4)
        video = patches.reshape(1, 2, 6, 16, 16)
        frames = torch.ops.aten.upsample_nearest2d.default(video[0].transpose(0, 1), [32, 32])
        mixed = torch.mm(frames.reshape(-1, 16), self.mix).clone()
        shuffled = torch.nn.functional.pixel_shuffle(
            mixed.reshape(1, 64, 192).transpose(1, 2)[:, :4].unflatten(2, (8, 8)), 2
        )
        return torch.cat([mixed.flatten(), shuffled.flatten()]).clone()


def test_videos_are_lowered(tmp_path: Path) -> None:
    x = random(1, 4, 3, 8, 8)
    program = program_of(_Video(), x, origins=["latent"])
    with EXECUTORCH.open(compiled(program, tmp_path), program.spec, 1) as session:
        result = session.run(feeds(program, x))["y"]
    assert sqnr_db(run(program, x).numpy(), result) >= Limits().component_sqnr_db


def test_what_stops_a_run_is_told(tmp_path: Path) -> None:
    x = random(1, 4, 3, 8, 8)
    program = program_of(torch.nn.Conv3d(4, 4, 3, groups=2), x, origins=["latent"])
    with (
        EXECUTORCH.open(compiled(program, tmp_path), program.spec, 1) as session,
        pytest.raises(ContractError, match="ExecuTorch cannot run it") as caught,
    ):
        session.run(feeds(program, x))
    assert caught.value.hint == "what it wrote to stderr names the operation"


class _Unsupported(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.lu_factor(x @ x.transpose(-1, -2))[0]


def test_operation_that_stops_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"denoiser cannot be lowered to ExecuTorch: .*lu"):
        compiled(program_of(_Unsupported(), random(1, 4, 4)), tmp_path)

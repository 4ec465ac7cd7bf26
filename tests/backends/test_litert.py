"""LiteRT computes what PyTorch computes; needs litert-torch, in an environment of its own: `make test-backends`."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.bundle.program import Program
from fewstep.errors import ContractError, ExportError
from fewstep.numerics.metrics import sqnr_db
from fewstep.optimize.quantize import quantize
from fewstep.recipe.quantization import Quantization, SiteChoice
from fewstep.recipe.recipe import Limits
from fewstep.runtimes import get_runtime
from fewstep.runtimes.base import PointResult
from fewstep.runtimes.executors.remote import Guest, Launch, remote_runtime
from tests.backends.networks import INPUTS, net
from tests.support.quantized import W8A8, calls_of, feeds, plan_of, program_of, random, run

if util.find_spec("litert_torch") is None:
    pytest.skip("litert-torch is not installed: `make test-backends` runs these tests", allow_module_level=True)

from fewstep.runtimes.litert.compile.flatbuffer import LiteRTModel
from fewstep.runtimes.litert.compile.int_weights import ROWS
from fewstep.runtimes.litert.compile.lower import lower

LITERT = get_runtime("litert")


def compiled(program: Program, folder: Path, weights: str = "fp32") -> Path:
    artifact = LITERT.compile(program, folder, weights)
    path = folder / artifact.path
    assert artifact.bytes == path.stat().st_size
    return path


def quality_db(program: Program, path: Path) -> float:
    with LITERT.open(path, program.spec, 1) as session:
        outputs = session.run(feeds(program, *INPUTS))
    return sqnr_db(run(program, *INPUTS).numpy(), outputs["y"])


def test_float_network_keeps_the_limit_of_lowering(tmp_path: Path) -> None:
    assert quality_db(net(), compiled(net(), tmp_path)) >= Limits().component_sqnr_db


@pytest.mark.parametrize("bits", [8, 4])
def test_stored_weights_keep_the_limit_and_shrink_the_file(bits: int, tmp_path: Path) -> None:
    program = net("litert", bits)
    path = compiled(program, tmp_path, "fp16")
    assert quality_db(program, path) >= 80  # w8's and w4's own limit
    model = LiteRTModel(path.read_bytes())
    stored = [model.shape(t) for t, values in model.constants.items() if values.dtype == np.int8]
    kinds = {tensor.type for tensor in model.graph.tensors}
    assert (17 in kinds) == (bits == 4)  # TensorType.INT4
    assert bits == 4 or len(stored) == 7
    assert path.stat().st_size < 34_000  # 74 kB in float


def points(path: Path, program: Program) -> list[PointResult]:
    assert LITERT.compare_integers is not None
    return LITERT.compare_integers(program, path, feeds(program, *INPUTS))


def test_whole_numbers_are_those_of_the_plan(tmp_path: Path) -> None:
    program = net("litert", 8, 8)
    path = compiled(program, tmp_path, "fp16")
    found = points(path, program)
    assert len([p for p in found if p.sqnr_db is None]) == 12
    for point in found:
        assert point.equal >= 0.999 and point.largest <= 1, point
    model = LiteRTModel(path.read_bytes())
    float_products = [o for o in model.graph.operators if model.kind(o) in (3, 9) and model.grid(o.inputs[0]) is None]
    assert not float_products, "a convolution or linear layer computes in float"


class _Attention(torch.nn.Module):
    """Its result goes onto a grid once heads are beside one another; the converter puts them so behind the marker."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts, self.last = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in self.parts(x).chunk(3, -1))
        heads = torch.nn.functional.scaled_dot_product_attention(*parts)
        result: torch.Tensor = self.last(heads.transpose(1, 2).flatten(2))
        return result


def test_whole_numbers_are_found_before_the_file_moves_them(tmp_path: Path) -> None:
    tokens = random(1, 24, 32)
    program = program_of(_Attention(), tokens, origins=["latent"])
    program = quantize(program, plan_of(program, W8A8, calls_of(tokens), "litert"))
    assert LITERT.compare_integers is not None
    path = compiled(program, tmp_path, "fp16")
    found = LITERT.compare_integers(program, path, feeds(program, tokens))
    model = LiteRTModel(path.read_bytes())
    held = {model.name(t): model.shape(t) for t in range(len(model.graph.tensors))}
    assert held["quantize_per_tensor_2"] == (4, 24, 8)
    assert len([p for p in found if p.sqnr_db is None]) == 4
    for point in found:
        assert point.equal >= 0.999 and point.largest <= 1, point


def test_whole_numbers_are_compared_in_another_process(tmp_path: Path) -> None:
    program = net("litert", 8, 8)
    path = compiled(program, tmp_path, "fp16")
    guest = Guest(Launch((sys.executable,), "another process"), "litert")
    try:
        there = remote_runtime(LITERT, guest)
        assert there.compare_integers is not None
        found = there.compare_integers(program, path, feeds(program, *INPUTS))
    finally:
        guest.close()
    assert found == points(path, program)


def test_a_wrong_scale_is_found_where_it_is(tmp_path: Path) -> None:
    program = net("litert", 8, 8)
    path = compiled(program, tmp_path, "fp16")
    model = LiteRTModel(path.read_bytes())
    names = [model.name(t) for t in range(len(model.graph.tensors))]
    at = names.index("quantize_per_tensor_5")
    model.graph.tensors[at].quantization.scale = model.graph.tensors[at].quantization.scale * 1.05
    path.write_bytes(model.content())
    wrong = [p.tensor for p in points(path, program) if p.sqnr_db is None and p.equal < 0.999]
    assert wrong == ["quantize_per_tensor_5"]


@pytest.mark.parametrize("bits", [8, 4])
def test_kernels_find_the_grids_of_each_call(bits: int, tmp_path: Path) -> None:
    program = net("litert", bits, 8, dynamic=True)
    path = compiled(program, tmp_path, "fp16")
    assert quality_db(program, path) >= 80  # a rounding that falls the other way would show as 60
    found = points(path, program)
    # With 4 bits, the two convolutions in between have no kernel.
    assert [p.module_path for p in found if p.noise_db is not None] == (
        ["first", "middle", "up", "down", "point", "last"] if bits == 8 else ["first", "up", "down", "last"]
    )
    for point in found:
        assert point.sqnr_db is not None and point.sqnr_db >= 80, point
    model = LiteRTModel(path.read_bytes())
    kinds = [model.graph.tensors[int(o.inputs[1])].type for o in model.graph.operators if model.kind(o) in ROWS]
    assert kinds.count(9) == (6 if bits == 8 else 2)  # TensorType.INT8
    assert kinds.count(17) == (0 if bits == 8 else 2)  # TensorType.INT4


def test_calibrated_grids_stand_beside_those_of_each_call(tmp_path: Path) -> None:
    chosen = Quantization(
        activations=8, dynamic=True, rounding="nearest", names={"*/middle": SiteChoice(dynamic=False)}
    )
    program = quantize(net(), plan_of(net(), chosen, calls_of(*INPUTS), "litert"))
    found = points(compiled(program, tmp_path, "fp16"), program)
    assert len([p for p in found if p.sqnr_db is None]) == 2, "the data and the result of the middle"
    assert len([p for p in found if p.noise_db is not None]) == 5
    for point in found:
        assert point.equal >= 0.999 and (point.sqnr_db is None or point.sqnr_db >= 80), point


def test_a_wrong_scale_shows_in_what_the_kernel_makes_of_it(tmp_path: Path) -> None:
    program = net("litert", 8, 8, dynamic=True)
    path = compiled(program, tmp_path, "fp16")
    model = LiteRTModel(path.read_bytes())
    (down,) = (o for o in model.graph.operators if model.kind(o) == 9 and model.shape(int(o.inputs[1])) == (32, 48))
    weight = model.graph.tensors[int(down.inputs[1])]
    weight.quantization.scale = weight.quantization.scale * 1.01
    path.write_bytes(model.content())
    assert [p.module_path for p in points(path, program) if p.sqnr_db is not None and p.sqnr_db < 80] == ["down"]


def test_a_product_that_is_not_in_the_file_is_an_error(tmp_path: Path) -> None:
    path = compiled(net("litert"), tmp_path, "fp16")
    with pytest.raises(ExportError, match=r"_values is multiplied by 0 operations, expected 1"):
        points(path, net("litert", 8, 8, dynamic=True))


def test_long_biases_stay_constants_where_kernels_find_grids(tmp_path: Path) -> None:
    tokens = random(1, 8, 32)
    program = program_of(torch.nn.Linear(32, 256), tokens, origins=["latent"])
    chosen = Quantization(activations=8, dynamic=True, rounding="nearest")
    program = quantize(program, plan_of(program, chosen, calls_of(tokens), "litert"))
    bias = next(value for name, value in program.exported.state_dict.items() if "bias" in name)
    bias.copy_(bias.half())  # what other constants would be stored as
    with LITERT.open(compiled(program, tmp_path, "fp16"), program.spec, 1) as session:
        result = session.run(feeds(program, tokens))["y"]
    assert sqnr_db(run(program, tokens).numpy(), result) >= 80


def test_signature_has_the_manifests_names_and_others_are_refused(tmp_path: Path) -> None:
    path = compiled(net(), tmp_path)
    spec = net().spec
    other = replace(spec, outputs=tuple(replace(output, name="y_other") for output in spec.outputs))
    with pytest.raises(ContractError, match=r"model has \['y'\], the manifest has \['y_other'\]"):
        LITERT.open(path, other, 1)
    path.write_bytes(b"not a model")
    with pytest.raises(ContractError, match="LiteRT cannot load it"):
        LITERT.open(path, spec, 1)


def test_names_need_not_be_pythons(tmp_path: Path) -> None:
    image = random(1, 4, 8, 8)
    program = program_of(torch.nn.Conv2d(4, 4, 1), image, origins=["latent"])
    first, last = replace(program.spec.inputs[0], name="hidden.0"), replace(program.spec.outputs[0], name="lambda")
    spec = replace(program.spec, inputs=(first,), outputs=(last,), bindings={"hidden.0": "latent"})
    path = compiled(replace(program, spec=spec), tmp_path)
    with LITERT.open(path, spec, 1) as session:
        result = session.run({"hidden.0": image.numpy()})["lambda"]
    assert sqnr_db(run(program, image).numpy(), result) >= Limits().component_sqnr_db


def test_closed_session_and_wide_number_are_refused(tmp_path: Path) -> None:
    session = LITERT.open(compiled(net(), tmp_path), net().spec, 1)
    wide = {"x0": INPUTS[0].numpy(), "x1": np.array([1 << 40])}
    with pytest.raises(ContractError, match="beyond LiteRT's int32"):
        session.run(wide)
    session.close()
    with pytest.raises(ContractError, match="closed"):
        session.run(feeds(net(), *INPUTS))


class _Square(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (2, 2)).pow(2)


def test_squares_of_five_axes_are_lowered(tmp_path: Path) -> None:
    x = random(1, 4, 8, 8)
    program = program_of(_Square(), x, origins=["latent"])
    with LITERT.open(compiled(program, tmp_path), program.spec, 1) as session:
        result = session.run(feeds(program, x))["y"]
    assert sqnr_db(run(program, x).numpy(), result) >= Limits().component_sqnr_db


class _GroupedQueries(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = x.shape
        repeated = x[:, :, None].expand(batch, heads, 2, length, width).reshape(batch, 2 * heads, length, width)
        return repeated.transpose(2, 3)


@pytest.mark.parametrize("heads", [1, 2])
def test_repeated_heads_keep_their_places(heads: int, tmp_path: Path) -> None:
    x = random(1, heads, 16, 8)
    program = program_of(_GroupedQueries(), x, origins=["latent"])
    with LITERT.open(compiled(program, tmp_path), program.spec, 1) as session:
        np.testing.assert_array_equal(session.run(feeds(program, x))["y"], run(program, x).numpy())


class _TurnedWeights(torch.nn.Module):
    """Weights of one shape that are transposed views: the converter takes them for one another."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(random(16, 16, seed=i).t() for i in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = torch.mm(x, weight) / 4
        return x


def test_transposed_weights_keep_their_values(tmp_path: Path) -> None:
    x = random(24, 16)
    program = program_of(_TurnedWeights(), x, origins=["latent"])
    with LITERT.open(compiled(program, tmp_path), program.spec, 1) as session:
        result = session.run(feeds(program, x))["y"]
    assert sqnr_db(run(program, x).numpy(), result) >= Limits().component_sqnr_db


class _Written(torch.nn.Module):
    """As in-place writes are traced: a value wherever a mask is set, and columns of what has no values yet."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (x + self.mask).softmax(-1)
        scores = torch.index_put(scores, (scores < 0.1,), torch.tensor(0.25))
        turned = torch.slice_scatter(torch.empty_like(scores), scores[..., 1::2], -1, 0, step=2)
        return torch.slice_scatter(turned, -scores[..., 0::2], -1, 1, step=2)


def test_what_is_written_in_place_is_chosen(tmp_path: Path) -> None:
    x = random(1, 8, 8)
    program = program_of(_Written(), x, origins=["latent"])
    with LITERT.open(compiled(program, tmp_path), program.spec, 1) as session:
        result = session.run(feeds(program, x))["y"]
    assert sqnr_db(run(program, x).numpy(), result) >= Limits().component_sqnr_db
    (mask,) = program.exported.buffers()
    assert mask.isinf().any(), "the network's own constants are as before"


class _Unsupported(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_operation_that_stops_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"denoiser cannot be lowered to LiteRT: .*bessel"):
        lower(program_of(_Unsupported(), random(1, 4, 4)), tmp_path, "fp32")


def test_scales_of_groups_are_refused_with_the_profile_to_use(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="scales of groups") as caught:
        lower(net("x86", 4), tmp_path, "fp16")
    assert "profile 'litert'" in str(caught.value)

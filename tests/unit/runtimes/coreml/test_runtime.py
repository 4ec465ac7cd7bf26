from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep
from fewstep.bundle.contract import ComponentSpec, TensorSpec
from fewstep.bundle.program import Program
from fewstep.errors import ContractError, ExportError, RuntimeMissingError
from fewstep.numerics.metrics import psnr_db, sqnr_db
from fewstep.optimize.palettize import kmeans, palettized, row_groups
from fewstep.proof.user_calls import WHOLE
from fewstep.runtimes import get_runtime
from fewstep.runtimes.coreml import runtime as coreml
from fewstep.runtimes.coreml.compile.lower import convert, lower, quiet_coremltools
from fewstep.runtimes.coreml.compile.mixed_precision import choose_fp32_operations
from fewstep.runtimes.coreml.mil import open_package
from fewstep.runtimes.coreml.mil.program import Constant
from fewstep.runtimes.parity.harness import COMPRESSION, LOWERING, LOWERING_FP16
from tests.support import tiny
from tests.support.coreml_packages import SPECIFICATION, WEIGHTS, change, faulty

with quiet_coremltools() as ct:
    from fewstep.runtimes.coreml.compile.mil_pass_compress import pack
    from fewstep.runtimes.coreml.debug.bisect import bisect


class Network(torch.nn.Module):
    """A convolution, a time path, an attention-like product and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 32, 3, padding=1)
        self.norm = torch.nn.GroupNorm(4, 32)
        self.time = torch.nn.Linear(32, 32)
        self.project = torch.nn.Linear(32, 64)
        self.register_buffer("frequencies", torch.exp(-torch.arange(16) / 4.0))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep[:, None].float() * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        x = torch.nn.functional.silu(self.norm(self.conv(sample))) + time[:, :, None, None]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.project(tokens).transpose(1, 2)


SPEC = ComponentSpec(
    (TensorSpec("sample", "float32", (1, 4, 8, 8)), TensorSpec("timestep", "int64", (1,))),
    (TensorSpec("out", "float32", (1, 64, 64)),),
    {"sample": "latent", "timestep": "timestep"},
    "loop",
)


def traced(module: torch.nn.Module, spec: ComponentSpec, feeds: tuple[Mapping[str, Any], ...] = ()) -> Program:
    inputs = tuple(torch.ones(t.shape, dtype=getattr(torch, t.dtype)) for t in spec.inputs)
    return Program("denoiser", "unet", torch.export.export(module.eval(), inputs), spec, feeds=feeds)


def feed(time: int = 961) -> dict[str, Any]:
    rng = np.random.default_rng(time)
    sample = rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
    return {"sample": sample, "timestep": np.array([time], dtype=np.int64)}


def reference(program: Program, inputs: Mapping[str, Any]) -> Any:
    with torch.no_grad():
        values = [torch.from_numpy(inputs[t.name]) for t in program.spec.inputs]
        result = program.exported.module()(*values)
    return (result[0] if isinstance(result, (tuple, list)) else result).numpy()


def quality(program: Program, path: Path, open_session: Callable[..., Any] = coreml.open_exact) -> float:
    with open_session(path, program.spec) as session:
        outputs = session.run(feed())
    return sqnr_db(reference(program, feed()), outputs[program.spec.outputs[0].name])


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    module = Network()
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.copy_(tensor.data.half().float())
    return traced(module, SPEC, (feed(),))


@pytest.fixture(scope="module")
def package(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coreml")
    return folder / lower(program, folder, "fp16").path


def test_fp16_package_keeps_both_limits(program: Program, package: Path) -> None:
    # The limits of DESIGN for lowering in fp32 and in fp16.
    assert quality(program, package) >= 100
    assert quality(program, package, coreml.open_session) >= 50
    assert package.parent.name == "Unet.mlpackage"


@pytest.mark.slow
def test_fp32_package(program: Program, tmp_path: Path) -> None:
    artifact = lower(program, tmp_path, "fp32")
    assert (artifact.weights, artifact.compute) == ("fp32", "fp32")
    assert quality(program, tmp_path / artifact.path) >= 100


@pytest.mark.slow
def test_ios17_package(program: Program, tmp_path: Path) -> None:
    artifact = lower(program, tmp_path, "fp16", target="iOS17")
    assert open_package((tmp_path / artifact.path).parent).specification == 8
    assert quality(program, tmp_path / artifact.path) >= 100


def test_the_time_path_stays_in_fp32(program: Program, package: Path) -> None:
    operations = open_package(package.parent).functions["main"].block.operations
    types = {o.type: o.outputs[0][1].dtype.name for o in operations if o.type in ("sin", "cos", "conv")}  # type: ignore[union-attr]
    assert types == {"sin": "fp32", "cos": "fp32", "conv": "fp16"}


@pytest.mark.slow
def test_the_same_program_gives_the_same_bytes(program: Program, package: Path, tmp_path: Path) -> None:
    again = tmp_path / lower(program, tmp_path, "fp16").path
    assert again.read_bytes() == package.read_bytes()
    assert (again.parent / WEIGHTS).read_bytes() == (package.parent / WEIGHTS).read_bytes()


class Large(torch.nn.Module):
    """Has values beyond fp16's range in the middle, and none at its ends."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.relu(x * self.factor) * self.factor / self.factor**2)


def test_overflow_is_found_and_kept_in_fp32(tmp_path: Path) -> None:
    x = np.linspace(-4, 4, 32, dtype=np.float32).reshape(1, 32)
    spec = ComponentSpec(
        (TensorSpec("x", "float32", (1, 32)),), (TensorSpec("y", "float32", (1, 32)),), {"x": "latent"}
    )
    program = traced(Large(4096.0), spec, ({"x": x},))

    def variant(kept: frozenset[str] | None) -> Any:
        return convert(program, "fp32") if kept is None else convert(program, "fp16", fp32_operations=kept)

    kept = choose_fp32_operations(program, variant)
    assert kept, "x * 4096 * 4096 is beyond 65504"
    path = tmp_path / lower(program, tmp_path, "fp16").path
    with coreml.open_session(path, spec) as session:
        assert sqnr_db(reference(program, {"x": x}), session.run({"x": x})["y"]) >= 50


def test_unsupported_op_is_named(tmp_path: Path) -> None:
    class Unsupported(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    spec = ComponentSpec((TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (4,)),), {"x": "latent"})
    with pytest.raises(ExportError, match=r"denoiser cannot be lowered to Core ML .*bessel_j0"):
        lower(traced(Unsupported(), spec), tmp_path, "fp32")


# ------------------------------------------------------------------------------------------------------------- sessions


def test_contract_of_the_manifest_is_checked(package: Path) -> None:
    other = replace(SPEC, outputs=(TensorSpec("out", "float32", (1, 64, 65)),))
    with pytest.raises(ContractError, match=r"out is float32 \[1, 64, 64\], expected float32 \[1, 64, 65\]"):
        coreml.open_exact(package, other)


def test_core_ml_itself_runs_on_macos_only(package: Path) -> None:
    with pytest.raises(RuntimeMissingError, match="macOS"):
        coreml.open_core_ml(package, SPEC)
    assert "evaluator" in coreml.executor()


def test_the_branch_of_macos(package: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Core ML's place is taken by the evaluator: the same session class, the same types at the interface."""

    class Model:
        def __init__(self, path: str, compute_units: Any, function_name: str | None) -> None:
            assert (compute_units, function_name) == (ct.ComputeUnit.ALL, None)
            self.session = coreml.open_evaluator(Path(path) / coreml.ENTRY, SPEC, "fp16")._session

        def predict(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
            assert feeds["timestep"].dtype == np.int32
            return self.session.run(feeds)

    monkeypatch.setattr(coreml.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(coreml.platform, "mac_ver", lambda: ("15.2", ("", "", ""), "arm64"))
    monkeypatch.setattr(ct.models, "MLModel", Model)
    assert coreml.executor() == "Core ML on macOS 15.2"
    assert quality(program, package, coreml.open_session) >= 50
    with pytest.raises(ContractError, match="unknown compute units 'GPU'"):
        coreml.open_core_ml(package, SPEC, "GPU")


def test_numbers_beyond_int32_are_refused(package: Path) -> None:
    with coreml.open_exact(package, SPEC) as session, pytest.raises(ContractError, match="beyond Core ML's int32"):
        session.run({**feed(), "timestep": np.array([2**40])})


def test_the_runtime_is_in_the_table() -> None:
    runtime = get_runtime("coreml")
    assert runtime.open_exact is not None
    assert runtime.availability().runs


# --------------------------------------------------------------------------------------------------------------- faults


def blob_of(package: Path, wanted: str) -> tuple[int, int]:
    """Returns where the data of a weight begins in the weight file and its bytes."""
    model = ct.proto.Model_pb2.Model()
    model.ParseFromString((package.parent / SPECIFICATION).read_bytes())
    function = model.mlProgram.functions["main"]
    for operation in function.block_specializations[function.opset].operations:
        for value in operation.attributes.values():
            if value.WhichOneof("value") == "blobFileValue" and wanted in operation.outputs[0].name:
                data = (package.parent / WEIGHTS).read_bytes()
                _, _, size, start = struct.unpack_from("<IIQQ", data, value.blobFileValue.offset)
                return start, size
    raise AssertionError(f"no weight {wanted}")


def test_a_healthy_package_does_not_depart(program: Program, package: Path) -> None:
    assert bisect(program, package, feed(), limit_db=100.0) is None


def test_a_scaled_weight_is_found(program: Program, package: Path, tmp_path: Path) -> None:
    path = faulty(package, tmp_path)
    start, size = blob_of(path, "conv_weight")
    data = bytearray((path.parent / WEIGHTS).read_bytes())
    halves = np.frombuffer(bytes(data[start : start + size]), np.float16) * np.float16(1.25)
    data[start : start + size] = halves.tobytes()
    (path.parent / WEIGHTS).write_bytes(data)
    assert quality(program, path) < 50
    found = bisect(program, path, feed(), limit_db=100.0)
    assert found is not None
    assert (found.op_type, found.module_path) == ("conv", "conv")


def test_a_dropped_bias_is_found(program: Program, package: Path, tmp_path: Path) -> None:
    path = faulty(package, tmp_path)

    def drop(operations: Any) -> None:
        linear = [o for o in operations if o.type == "linear"][-1]
        del linear.inputs["bias"]

    change(path, drop)
    assert quality(program, path) < 50
    found = bisect(program, path, feed(), limit_db=100.0)
    assert found is not None
    assert (found.op_type, found.module_path) == ("linear", "project")


@pytest.mark.slow
def test_swapped_axes_are_found(program: Program, package: Path, tmp_path: Path) -> None:
    path = faulty(package, tmp_path)

    def swap(operations: Any) -> None:
        # [1, 64, 64]: transposed or not, the shape is the same, so that only its values tell.
        transpose = [o for o in operations if o.type == "transpose"][-1]
        name = transpose.inputs["perm"].arguments[0].name
        perm = next(o for o in operations if o.outputs and o.outputs[0].name == name)
        ints = perm.attributes["val"].immediateValue.tensor.ints
        ints.values[:] = [0, 1, 2]

    change(path, swap)
    assert quality(program, path) < 50
    found = bisect(program, path, feed(), limit_db=100.0)
    assert found is not None
    assert found.op_type == "transpose"


def palette_program(bits: int) -> Program:
    torch.manual_seed(0)
    module = Network()
    for tensor in [*module.parameters(), *module.buffers()]:
        values = tensor.data.half().double().numpy()
        if values.ndim > 1 and values.size >= 1024:
            values = palettized(values, bits)
        tensor.data.copy_(torch.from_numpy(values))
    return traced(module, SPEC, (feed(),))


def test_a_flipped_palette_entry_is_found(tmp_path: Path) -> None:
    program = palette_program(4)
    path = tmp_path / lower(program, tmp_path, "fp16").path
    assert quality(program, path) >= 100
    operations = open_package(path.parent).functions["main"].block.operations
    packed = next(o for o in operations if o.type == "constexpr_lut_to_dense" and "project" in o.outputs[0][0])
    (bound,) = packed.inputs["lut"]
    assert isinstance(bound, Constant)
    palette = bound.read()
    data = bytearray((path.parent / WEIGHTS).read_bytes())
    at = bytes(data).find(palette.tobytes())
    assert at >= 0
    flipped = palette.copy()
    flipped[..., -1, :] *= -1  # the largest entry of each palette
    data[at : at + palette.nbytes] = flipped.tobytes()
    (path.parent / WEIGHTS).write_bytes(data)
    assert quality(program, path) < 60
    found = bisect(program, path, feed(), limit_db=100.0)
    assert found is not None
    assert (found.op_type, found.module_path) == ("linear", "project")


# ---------------------------------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("bits", [4, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (8, 6, 2))])
def test_palettes_are_stored_without_loss(bits: int, tmp_path: Path) -> None:
    program = palette_program(bits)
    path = tmp_path / lower(program, tmp_path, "fp16").path
    assert quality(program, path) >= 100
    found = {
        o.type: o.inputs["indices"][0]
        for o in open_package(path.parent).functions["main"].block.operations
        if o.type.startswith("constexpr_")
    }
    assert list(found) == ["constexpr_lut_to_dense"]


@settings(max_examples=20, deadline=None)
@given(bits=st.sampled_from([1, 2, 3, 4, 6]), rows=st.sampled_from([16, 24, 40]), seed=st.integers(0, 2**32 - 1))
def test_palettes_have_few_halves(bits: int, rows: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((rows, 8))
    values = palettized(weight, bits, 8)
    assert np.array_equal(values, values.astype(np.float16))
    for at in row_groups(rows, 8):
        assert len(np.unique(values[at])) <= 1 << bits
        # No value is nearer to another entry than to its own.
        palette = np.unique(values[at])
        nearest = np.abs(weight[at][..., None] - palette).min(axis=-1)
        assert np.allclose(np.abs(weight[at] - values[at]), nearest, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 32), seed=st.integers(0, 2**32 - 1))
def test_kmeans_is_no_worse_than_where_it_starts(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(400)

    def error(centres: Any) -> float:
        return float((np.abs(values[:, None] - centres).min(axis=1) ** 2).sum())

    centres = kmeans(values, count)
    assert len(centres) <= count
    assert np.array_equal(np.sort(centres), centres)
    dense = np.quantile(values, (np.arange(count - count // 2) + 0.5) / (count - count // 2))
    start = np.concatenate([dense, np.linspace(values.min(), values.max(), count // 2)])
    assert error(centres) <= error(start) + 1e-9


@settings(max_examples=20, deadline=None)
@given(
    entries=st.sampled_from([2, 3, 16, 40, 200]),
    zeros=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_packed_weights_decode_to_the_same_bits(entries: int, zeros: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = np.unique(rng.standard_normal(entries).astype(np.float32)).astype(np.float16)
    weight = np.where(rng.random((32, 64)) < zeros, np.float16(0), table[rng.integers(0, len(table), (32, 64))])
    packed = pack(weight)
    assert packed is not None
    assert packed.bytes <= 0.9 * weight.nbytes
    if packed.mask is None:
        assert packed.lut is not None and packed.indices is not None
        parts = zip(np.split(packed.indices, len(packed.lut)), packed.lut, strict=True)
        dense = np.concatenate([table[part] for part, table in parts])
    else:
        values = packed.values if packed.lut is None else packed.lut[0][packed.indices]
        dense = np.zeros_like(weight)
        dense[packed.mask] = values
    assert np.array_equal(dense.view(np.uint16) & 0x7FFF, weight.view(np.uint16) & 0x7FFF)
    assert np.array_equal(dense, weight)


@pytest.mark.slow
def test_sparse_weights_with_palettes(tmp_path: Path) -> None:
    program = palette_program(4)
    state = program.exported.state_dict
    for tensor in state.values():
        if tensor.ndim > 1 and tensor.numel() >= 1024:
            kept = tensor.abs() >= tensor.abs().flatten().quantile(0.8)
            tensor.data.copy_(torch.where(kept, tensor, torch.zeros(())))
    path = tmp_path / lower(program, tmp_path, "fp16").path
    kinds = {o.type for o in open_package(path.parent).functions["main"].block.operations}
    assert "constexpr_sparse_to_dense" in kinds
    assert quality(program, path) >= 100


class _Annotate:
    """Says of every convolution and linear layer: int8 weights per channel and, if wanted, int8 activations."""

    def __init__(self, activations: bool) -> None:
        from torchao.quantization.pt2e.quantizer import Quantizer

        self.__class__ = type("_Annotate", (_Annotate, Quantizer), {})
        self.activations = activations

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver
        from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec

        weight = QuantizationSpec(
            torch.int8, PerChannelMinMaxObserver, -127, 127, qscheme=torch.per_channel_symmetric, ch_axis=0
        )
        data = QuantizationSpec(torch.int8, HistogramObserver, -128, 127, qscheme=torch.per_tensor_affine)
        for node in model.graph.nodes:
            if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
                chosen = {node.args[1]: weight} | ({node.args[0]: data} if self.activations else {})
                node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=chosen, _annotated=True)
        return model

    def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        return model

    def prepare_obs_or_fq_callback(self, *_: object) -> None:
        return None

    def validate(self, model: torch.fx.GraphModule) -> None:
        return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torchao, about its own internals
def test_a_graph_with_quantized_weights_converts(program: Program, tmp_path: Path) -> None:
    quantized = observed(program, activations=False)
    path = tmp_path / lower(quantized, tmp_path, "fp16").path
    kinds = [o.type for o in open_package(path.parent).functions["main"].block.operations]
    assert any(kind.startswith("constexpr_") for kind in kinds)
    # Scales are halves in a package that computes in fp16: 2^-12 of each weight, 60 dB and more.
    assert quality(quantized, path) >= 60


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torchao, about its own internals
def test_activations_on_grids_that_halves_cannot_hold_are_refused(program: Program, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"quantize_per_tensor has torch.int8 and the scale .* expected 8 bits and a half"
    ):
        lower(observed(program, activations=True), tmp_path, "fp16")
    assert not any(tmp_path.iterdir())


def observed(program: Program, *, activations: bool) -> Program:
    """Returns a program quantized by torchao's own observers, with scales of any float."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(program.exported.module(), _Annotate(activations))
    inputs = tuple(torch.from_numpy(v) for v in feed().values())
    prepared(*inputs)
    return replace(program, exported=torch.export.export(convert_pt2e(prepared), inputs))


# -------------------------------------------------------------------------------------------------------------- builds


def test_a_bundle_in_table_form_decodes_in_tiles_and_is_verified(tmp_path: Path) -> None:
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    source = str(tiny.turbo_folder(tmp_path / "source"))
    out = tmp_path / "bundle"
    # Latents of 8 x 8 fit in one tile.
    bundle = fewstep.build(
        source, "fp16", ("coreml",), out, steps=[1, 2], shape="16x16", decoder_tile=16, options=options
    )
    manifest = bundle.manifest
    assert manifest.contract.form == "table"
    assert {"denoiser", "denoiser_conditions"} <= manifest.components.keys()
    assert {artifact.compute for artifact in manifest.artifacts} == {"fp16"}
    assert manifest.artifact("coreml", "decoder", "tile-8x8").path.startswith("coreml/VAEDecoder")
    verified = fewstep.verify(fewstep.Bundle.open(out), prompts=1, seeds=1)
    assert verified.report
    assert {check.error for check in verified.report.checks} == {LOWERING, LOWERING_FP16, COMPRESSION, WHOLE}


@pytest.mark.slow
def test_shapes_are_functions_of_one_package(tmp_path: Path) -> None:
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    source = str(tiny.turbo_folder(tmp_path / "source"))
    bundle = fewstep.build(
        source, "fp32", ("coreml",), tmp_path / "bundle", steps=[1], shape="16x24,16x16", options=options
    )
    graphs = [a for a in bundle.manifest.artifacts if a.component == "decoder"]
    assert [(a.variant, a.function) for a in graphs] == [("", "main"), ("16x16", "main_16x16")]
    assert bundle.generate("cat", seed=1).output.shape == (16, 24, 3)
    assert bundle.shaped("16x16").generate("cat", seed=1).output.shape == (16, 16, 3)


@pytest.mark.slow
def test_batches_and_tiles_are_functions_of_one_package(tmp_path: Path) -> None:
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    source = str(tiny.turbo_folder(tmp_path / "source"))
    bundle = fewstep.build(
        source,
        "fp32",
        ("coreml",),
        tmp_path / "bundle",
        steps=[1],
        shape="16x24",
        decoder_tile=16,
        batch=2,
        options=options,
    )
    assert bundle.manifest.parity is not None and bundle.manifest.parity["passed"]
    functions: dict[str, set[str]] = {name: set() for name in bundle.manifest.components}
    for artifact in bundle.manifest.artifacts:
        functions[artifact.component].add(artifact.function)
    assert functions["denoiser"] == {"main", "main_2x16x24"}
    # 8 x 12 elements make tiles of 8 and 6 across, and 2 more of the rows that come after the first stride.
    assert functions["decoder"] == {f"tile_{height}x{width}" for height in (8, 2) for width in (8, 6)}
    one, two = bundle.generate("cat", seed=1), bundle.generate_batch(["cat", "dog"], [1, 2])[0]
    assert psnr_db(one.output, two.output) >= 100  # the same operations, for one picture and for two

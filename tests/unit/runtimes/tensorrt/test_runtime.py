"""TensorRT: models that are lint-clean and compute what PyTorch does, and what is said where no engine can be built."""

from __future__ import annotations

import ast
import ctypes
import os
import re
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from fewstep.bundle.program import Program
from fewstep.errors import ContractError, ExportError, RecipeError, RuntimeMissingError
from fewstep.numerics.metrics import sqnr_db
from fewstep.optimize.quantize.apply import quantize
from fewstep.recipe.quantization import Quantization, for_targets
from fewstep.recipe.recipe import load_recipe
from fewstep.runtimes import get_runtime
from fewstep.runtimes.tensorrt import runtime as adapter
from fewstep.runtimes.tensorrt.build_engine import build_engine
from fewstep.runtimes.tensorrt.compile.lint import lint
from fewstep.runtimes.tensorrt.compile.lower import lower
from fewstep.runtimes.tensorrt.cudart import Cuda
from fewstep.runtimes.tensorrt.engine import EngineSession
from tests.support.quantized import W8A8, calls_of, feeds, plan_of, program_of, random, run

W4 = Quantization(weights=4, granularity="group", group_size=16, rounding="nearest", samples=4)
engine_only = pytest.mark.skipif(adapter.missing() is not None, reason=f"no TensorRT engine here: {adapter.missing()}")


class Net(torch.nn.Module):
    """Convolutions, a normalization, linear layers with and without bias, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.GroupNorm(8, 32)
        self.second, self.last = torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.Conv2d(64, 4, 1)
        self.mix, self.wide = torch.nn.Linear(32, 32), torch.nn.Linear(32, 64, bias=False)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        hidden = self.second(torch.nn.functional.silu(self.norm(self.first(x_NCHW))))
        tokens = self.wide(self.mix(hidden.flatten(2).transpose(1, 2))).softmax(-1)
        result: torch.Tensor = self.last(tokens.transpose(1, 2).unflatten(2, (8, 8)))
        return result


X = random(1, 4, 8, 8)


def program(quantization: Quantization | None = None, profile: str = "tensorrt") -> Program:
    torch.manual_seed(0)
    traced = program_of(Net(), X)
    if quantization is None:
        return traced
    return quantize(traced, plan_of(traced, quantization, calls_of(X), profile))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in ir.load(path).graph]


@pytest.mark.parametrize(
    ("quantization", "weights", "exact_db", "shipped_db"),
    [
        # Other kernels sum in another order: 120 dB; halves round each result by 2^-11, in some ten layers.
        pytest.param(None, "fp32", 120, 120, id="fp32"),
        pytest.param(None, "fp16", 120, 55, id="fp16"),
        pytest.param(None, "bf16", 120, None, id="bf16"),
        pytest.param(W8A8, "fp16", 120, 120, id="w8a8"),
        pytest.param(W4, "fp32", 120, 120, id="w4"),
    ],
)
def test_compiled_models_compute_what_pytorch_does(
    tmp_path: Path, quantization: Quantization | None, weights: str, exact_db: float, shipped_db: float | None
) -> None:
    traced = program(quantization)
    artifact = lower(traced, tmp_path, weights)
    path = tmp_path / artifact.path
    assert artifact.runtime == "tensorrt"
    assert lint(ir.load(path)) == []
    expected = run(traced, X).numpy()
    with adapter.open_exact(path, traced.spec, 1) as session:
        assert sqnr_db(expected, session.run(feeds(traced, X))["y"]) > exact_db
    if shipped_db is not None:  # ONNX Runtime has no bf16 on the CPU
        with adapter.open_session(path, traced.spec, 1) as session:
            assert sqnr_db(expected, session.run(feeds(traced, X))["y"]) > shipped_db
    assert {"build_engine.py", "build_engine.sh"} <= {p.name for p in path.parent.iterdir()}


def test_what_is_quantized_is_symmetric_and_explicit(tmp_path: Path) -> None:
    traced = program(W8A8)
    path = tmp_path / lower(traced, tmp_path, "fp32").path
    model = ir.load(path)
    grids = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert sum(node.op_type == "QuantizeLinear" for node in grids) >= 4
    for node in grids:
        zero = node.inputs[2].const_value.numpy()  # type: ignore[union-attr]
        assert zero.dtype == np.int8 and not zero.any()
    assert not {"MatMulIntegerToFloat", "QLinearConv"} & set(operators(path))
    found = adapter._compare_integers(traced, path, feeds(traced, X))
    assert len(found) >= 5
    assert all(point.equal >= 0.999 and point.largest <= 1 for point in found)


def test_four_bits_are_stored_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / lower(program(W4), tmp_path, "fp32").path
    blocks = [n for n in ir.load(path).graph if n.attributes.get_int("block_size", 0)]
    assert len(blocks) == 2, "the two linear layers; TensorRT has no blocks for convolutions"
    for node in blocks:
        weight = node.inputs[0]
        assert weight is not None and weight.dtype == ir.DataType.INT4


def test_a_layer_that_is_called_twice(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Linear(8, 64, bias=False)
            self.back = torch.nn.Linear(64, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.table(torch.tanh(self.back(self.table(x))))
            return result

    torch.manual_seed(0)
    plain = program_of(Twice(), X)
    traced = quantize(plain, plan_of(plain, W8A8, calls_of(X), "tensorrt"))
    path = tmp_path / lower(traced, tmp_path, "fp32").path
    with adapter.open_session(path, traced.spec, 1) as session:
        assert sqnr_db(run(traced, X).numpy(), session.run(feeds(traced, X))["y"]) > 120


def test_a_plan_of_another_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"denoiser breaks rules of TensorRT: .*zero point") as caught:
        lower(program(W8A8, "x86"), tmp_path, "fp32")
    assert "profile tensorrt" in str(caught.value.hint)


def test_halves_that_do_not_hold_a_constant(tmp_path: Path) -> None:
    class Large(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.linspace(1, 1e6, 8)

    traced = program_of(Large(), X)
    with pytest.raises(ExportError, match="beyond FLOAT16's 65504"):
        lower(traced, tmp_path, "fp16")
    assert lower(traced, tmp_path, "bf16").compute == "bf16"


def test_targets_bring_their_profile() -> None:
    w8a8 = load_recipe("w8a8").quantization
    assert w8a8 is not None
    chosen = for_targets(w8a8, ["tensorrt"])
    assert chosen is not None and chosen.profile == "tensorrt"
    assert for_targets(chosen, ["onnxruntime", "tensorrt"]) == chosen, "ONNX Runtime takes any"
    assert for_targets(w8a8, ["onnxruntime"]) == w8a8
    assert for_targets(None, ["tensorrt"]) is None
    with pytest.raises(RecipeError, match="the recipe's profile is 'arm', and tensorrt runs graphs of 'tensorrt' only"):
        for_targets(replace(w8a8, profile="arm"), ["tensorrt"])
    with pytest.raises(RecipeError, match="a bundle has one plan for all of its targets"):
        for_targets(w8a8, ["tensorrt", "coreml"])


@pytest.mark.skipif(adapter.missing() is None, reason="an engine can be built here")
def test_nothing_pretends_that_an_engine_was_built() -> None:
    from fewstep.pipeline.execution_notes import stand_in_notes

    state = get_runtime("tensorrt").availability()
    assert state.compiles and not state.runs and state.stand_in == "ONNX Runtime"
    assert "no engine is built here: tensorrt is not installed" in state.detail
    assert "pip install 'fewstep[tensorrt]'" in str(state.remedy)
    assert "no TensorRT engine was built" in adapter.executor()
    (note,) = stand_in_notes("tensorrt")
    assert note.startswith("tensorrt itself did not run: ONNX Runtime computed its artifacts")
    assert stand_in_notes("onnxruntime") == []


def test_a_gpu_without_tensorrt_is_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "Cuda", lambda: None)
    monkeypatch.setattr(adapter.util, "find_spec", lambda name: None)
    assert adapter.missing.__wrapped__() == "tensorrt is not installed"


# --------------------------------------------------------------------------------------------- the CUDA runtime, faked


class FakeCudart:
    """Memory of this machine in place of a GPU's."""

    def __init__(self, devices: int = 1, status: int = 0) -> None:
        self.devices, self.status = devices, status
        self.blocks: dict[int, Any] = {}
        self.cudaGetErrorString = _Told()

    def cudaGetDeviceCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return self.status

    def cudaMalloc(self, pointer: Any, size: ctypes.c_size_t) -> int:
        block = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(block)
        self.blocks[ctypes.addressof(block)] = block
        return 0

    def cudaFree(self, pointer: ctypes.c_void_p) -> int:
        assert pointer.value is not None
        del self.blocks[pointer.value]
        return 0

    def cudaMemcpy(self, to: ctypes.c_void_p, source: ctypes.c_void_p, size: ctypes.c_size_t, kind: int) -> int:
        ctypes.memmove(to, source, size.value)
        return 0

    def cudaStreamCreate(self, handle: Any) -> int:
        handle._obj.value = 7
        return 0

    def cudaStreamSynchronize(self, stream: ctypes.c_void_p) -> int:
        return 0

    def cudaStreamDestroy(self, stream: ctypes.c_void_p) -> int:
        return 0


class _Told:
    restype: object = None

    def __call__(self, status: int) -> bytes:
        return b"no CUDA-capable device is detected"


def test_arrays_go_to_the_gpu_and_back() -> None:
    library = FakeCudart()
    cuda = Cuda(library)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    address = cuda.allocate(array.nbytes)
    cuda.upload(array, address)
    np.testing.assert_array_equal(cuda.download(address, (2, 3), np.dtype(np.float32)), array)
    cuda.free(address)
    assert not library.blocks


def test_no_gpu() -> None:
    with pytest.raises(RuntimeMissingError, match="no NVIDIA GPU"):
        Cuda(FakeCudart(devices=0))
    with pytest.raises(RuntimeMissingError, match=r"cudaGetDeviceCount failed: no CUDA-capable device .* \(100\)"):
        Cuda(FakeCudart(status=100))


# ---------------------------------------------------------------------------------------------- names of the bindings

# Names that tensorrt_cu12_bindings 11.4.0.106 (PyPI, cp311) exports; FEWSTEP_TENSORRT_BINDINGS=wheel checks them again.
KNOWN = frozenset(
    "Builder BuilderFlag LayerInformationFormat Logger NetworkDefinitionCreationFlag OnnxParser ProfilingVerbosity "
    "Runtime WARNING STRONGLY_TYPED TF32 DETAILED JSON create_network parse_from_file num_errors get_error desc "
    "create_builder_config clear_flag profiling_verbosity create_timing_cache set_timing_cache get_timing_cache "
    "serialize build_serialized_network num_layers deserialize_cuda_engine create_execution_context num_io_tensors "
    "get_tensor_name get_tensor_shape get_tensor_dtype set_tensor_address execute_async_v3 create_engine_inspector "
    "get_engine_information".split()
)
_PYTHON = {"nptype", "__version__"}  # defined in the bindings' Python files
_OBJECTS = {"tensorrt", "builder", "parser", "config", "network", "_engine", "_context", "inspector", "Logger"}


def used_names(repository: Path) -> set[str]:
    """Returns the names that are looked up on TensorRT's modules and objects."""
    found = set()
    for name in ("build_engine.py", "engine.py"):
        for node in ast.walk(ast.parse((repository / "runtimes" / "tensorrt" / name).read_text())):
            if isinstance(node, ast.Attribute):
                value = node.value
                chain = [value.attr] if isinstance(value, ast.Attribute) else []
                chain += [value.id] if isinstance(value, ast.Name) else []
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
                    chain += ["tensorrt"] if value.func.attr in ("Runtime", "get_error", "get_timing_cache") else []
                if set(chain) & (_OBJECTS | {"BuilderFlag", "ProfilingVerbosity", "LayerInformationFormat"}):
                    found.add(node.attr)
                if chain == ["NetworkDefinitionCreationFlag"]:
                    found.add(node.attr)
    return found


def test_only_names_of_the_bindings_are_used(repository: Path) -> None:
    used = used_names(repository)
    assert {"STRONGLY_TYPED", "execute_async_v3", "get_error", "TF32"} <= used, "the names are found at all"
    assert used - KNOWN - _PYTHON == set()


@pytest.mark.skipif(
    "FEWSTEP_TENSORRT_BINDINGS" not in os.environ, reason="pip download --no-deps tensorrt-cu12-bindings"
)
def test_the_bindings_have_these_names() -> None:
    with zipfile.ZipFile(os.environ["FEWSTEP_TENSORRT_BINDINGS"]) as wheel:
        library = wheel.read("tensorrt_bindings/tensorrt.so")
        python = wheel.read("tensorrt_bindings/__init__.py").decode()
    names = {name.decode() for name in re.findall(rb"[A-Za-z_][A-Za-z0-9_]{2,60}", library)}
    assert names >= KNOWN
    assert all(name in python for name in _PYTHON)


# --------------------------------------------------------------------------------------- what needs TensorRT, and fakes


def fake_tensorrt(monkeypatch: pytest.MonkeyPatch, *, parses: bool = True, plan: bytes | None = b"plan") -> None:
    """Puts a module in TensorRT's place that builds nothing, to see what is made of its answers."""
    error = types.SimpleNamespace(desc=lambda: "no importer for BitShift")
    parser = types.SimpleNamespace(parse_from_file=lambda path: parses, num_errors=1, get_error=lambda i: error)
    cache = types.SimpleNamespace(serialize=lambda: b"times")
    config = types.SimpleNamespace(
        clear_flag=lambda flag: None,
        create_timing_cache=lambda data: cache,
        set_timing_cache=lambda cache, ignore_mismatch: None,
        get_timing_cache=lambda: cache,
    )
    builder = types.SimpleNamespace(
        create_network=lambda flags: types.SimpleNamespace(num_layers=3, flags=flags),
        create_builder_config=lambda: config,
        build_serialized_network=lambda network, config: plan,
    )

    class Logger:
        WARNING = 2

        def __init__(self, level: int) -> None:
            pass

    module: Any = types.ModuleType("tensorrt")
    module.__version__ = "11.0"
    module.Logger = Logger
    module.Builder = lambda logger: builder
    module.OnnxParser = lambda network, logger: parser
    module.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
    module.BuilderFlag = types.SimpleNamespace(TF32=0)
    module.ProfilingVerbosity = types.SimpleNamespace(DETAILED=1)
    module.Runtime = lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda data: None)
    monkeypatch.setitem(sys.modules, "tensorrt", module)


def test_what_is_recorded_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt(monkeypatch)
    known = build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", tmp_path / "timing.cache")
    assert (known["tensorrt"], known["layers"], known["bytes"]) == ("11.0", 3, 4)
    assert (tmp_path / "model.engine").read_bytes() == b"plan"
    assert (tmp_path / "timing.cache").read_bytes() == b"times"
    assert '"tensorrt": "11.0"' in (tmp_path / "model.engine.json").read_text()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"parses": False}, "TensorRT's parser refuses it: no importer for BitShift"),
        ({"plan": None}, "TensorRT finds no engine for it"),
    ],
    ids=["parser", "builder"],
)
def test_what_tensorrt_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], message: str
) -> None:
    fake_tensorrt(monkeypatch, **answers)
    with pytest.raises(RuntimeError, match=message):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", tmp_path / "timing.cache")
    assert list(tmp_path.iterdir()) == [], "nothing half is left"


def test_an_engine_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt(monkeypatch)
    (tmp_path / "model.engine").write_bytes(b"old")
    with pytest.raises(ContractError, match=r"model\.engine: TensorRT cannot load it") as caught:
        EngineSession(tmp_path / "model.engine", program().spec, Cuda(FakeCudart()))
    assert "it is built again" in str(caught.value.hint)


@engine_only
@pytest.mark.parametrize(
    ("quantization", "weights", "least_db"),
    [(None, "fp32", 80.0), (None, "fp16", 50.0), (None, "bf16", 30.0), (W8A8, "fp32", 30.0), (W4, "fp32", 80.0)],
    ids=["fp32", "fp16", "bf16", "w8a8", "w4"],
)
def test_engines_compute_what_pytorch_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: Quantization | None,
    weights: str,
    least_db: float,
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    traced = program(quantization)
    path = tmp_path / lower(traced, tmp_path, weights).path
    with adapter.open_session(path, traced.spec) as session:
        found = session.run(feeds(traced, X))["y"]
        again = session.run(feeds(traced, X))["y"]
    np.testing.assert_array_equal(found, again)
    assert sqnr_db(run(traced, X).numpy(), found) > least_db


@engine_only
def test_an_engine_tells_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.runtimes.tensorrt.engine import engine_of

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    traced = program(W8A8)
    engine = engine_of(tmp_path / lower(traced, tmp_path, "fp32").path)
    session = EngineSession(engine, traced.spec)
    layers = session.layers()
    session.close()
    assert any("Int8" in str(layer) for layer in layers), "whole numbers are multiplied, and not what they stand for"
    before = engine.stat().st_mtime_ns
    assert engine_of(tmp_path / "unet" / "model.onnx").stat().st_mtime_ns == before, "built once"

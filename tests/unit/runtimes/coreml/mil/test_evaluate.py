from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.errors import BundleError, ContractError
from fewstep.runtimes.coreml.compile.lower import quiet_coremltools
from fewstep.runtimes.coreml.mil import Evaluator, known_operations, open_package
from fewstep.runtimes.coreml.mil.dtypes import DTYPES, unpack
from fewstep.runtimes.coreml.mil.ops.elementwise import erf
from fewstep.runtimes.coreml.mil.program import Block, Constant, Function, MilProgram, Operation, TensorType
from tests.unit.runtimes.coreml.mil.build import ct, mb, save_program

SPECIFICATION = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a package with a weight file: y = relu(x Wᵀ + b) + 1."""
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((64, 48)).astype(np.float32), rng.standard_normal(64).astype(np.float32)

    def build(x: object) -> object:
        return mb.add(x=mb.relu(x=mb.linear(x=x, weight=weight, bias=bias, name="project")), y=1.0, name="y")

    return save_program(tmp_path_factory.mktemp("mil") / "small.mlpackage", {"x": (2, 48)}, build)


def altered(package: Path, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    """Returns a copy of a package after a change."""
    copy = tmp_path / "altered.mlpackage"
    for file in (f for f in package.rglob("*") if f.is_file()):
        target = copy / file.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    change(copy)
    return copy


def respecified(change: Callable[[object], None]) -> Callable[[Path], None]:
    """Returns a change of a package by a change of its specification, in coremltools' own protobuf classes."""

    def apply(copy: Path) -> None:
        model = ct.proto.Model_pb2.Model()
        path = copy / SPECIFICATION
        model.ParseFromString(path.read_bytes())
        change(model)
        path.write_bytes(model.SerializeToString())

    return apply


def operations(model: object) -> object:
    function = model.mlProgram.functions["main"]  # type: ignore[attr-defined]
    return function.block_specializations[function.opset].operations


def test_evaluates_a_saved_package(package: Path) -> None:
    program = open_package(package)
    x = np.linspace(-1, 1, 96, dtype=np.float32).reshape(2, 48)
    y = Evaluator(program).run({"x": x})["y"]
    constants = {
        o.outputs[0][0]: o.attributes["val"].read()
        for o in program.functions["main"].block.operations
        if o.type == "const"
    }
    weight = next(v for v in constants.values() if np.shape(v) == (64, 48))
    bias = next(v for v in constants.values() if np.shape(v) == (64,))
    assert np.allclose(y, np.maximum(x @ weight.T + bias, 0) + 1, atol=1e-6)


def test_truncated_weights_are_named(package: Path, tmp_path: Path) -> None:
    def cut(copy: Path) -> None:
        path = copy / WEIGHTS
        path.write_bytes(path.read_bytes()[:-100])

    copy = altered(package, tmp_path, cut)
    with pytest.raises(BundleError, match=r"weight\.bin is cut off"):
        Evaluator(open_package(copy)).run({"x": np.zeros((2, 48), np.float32)})


@pytest.mark.parametrize("gone", [SPECIFICATION, "Manifest.json", WEIGHTS])
def test_missing_files_are_named(package: Path, tmp_path: Path, gone: str) -> None:
    copy = altered(package, tmp_path, lambda copy: (copy / gone).unlink())
    with pytest.raises(BundleError, match=gone.split("/")[-1]):
        Evaluator(open_package(copy)).run({"x": np.zeros((2, 48), np.float32)})


def test_a_newer_specification_is_refused(package: Path, tmp_path: Path) -> None:
    def newer(model: object) -> None:
        model.specificationVersion = 99  # type: ignore[attr-defined]

    with pytest.raises(BundleError, match="specification version 99, expected 6 to 9"):
        open_package(altered(package, tmp_path, respecified(newer)))


def test_a_damaged_specification_is_refused(package: Path, tmp_path: Path) -> None:
    def cut(copy: Path) -> None:
        path = copy / SPECIFICATION
        path.write_bytes(path.read_bytes()[:-7])

    with pytest.raises(BundleError, match="ends inside a field"):
        open_package(altered(package, tmp_path, cut))


def test_paths_that_leave_the_package_are_refused(package: Path, tmp_path: Path) -> None:
    def outside(copy: Path) -> None:
        values = json.loads((copy / "Manifest.json").read_text())
        values["itemInfoEntries"][values["rootModelIdentifier"]]["path"] = "../../secret"
        (copy / "Manifest.json").write_text(json.dumps(values))

    with pytest.raises(BundleError, match="leaves the bundle"):
        open_package(altered(package, tmp_path, outside))


def test_an_unknown_operation_is_named(package: Path, tmp_path: Path) -> None:
    def rename(model: object) -> None:
        next(o for o in operations(model) if o.type == "relu").type = "relu7"  # type: ignore[attr-defined]

    copy = altered(package, tmp_path, respecified(rename))
    with pytest.raises(ContractError, match="unknown operation relu7"):
        Evaluator(open_package(copy))


def test_an_unknown_input_of_an_operation_is_named(package: Path, tmp_path: Path) -> None:
    def add(model: object) -> None:
        relu = next(o for o in operations(model) if o.type == "relu")  # type: ignore[attr-defined]
        relu.inputs["slope"].CopyFrom(relu.inputs["x"])

    copy = altered(package, tmp_path, respecified(add))
    with pytest.raises(ContractError, match=r"relu .*slope"):
        Evaluator(open_package(copy)).run({"x": np.zeros((2, 48), np.float32)})


def test_results_must_have_the_declared_shape(package: Path, tmp_path: Path) -> None:
    def lie(model: object) -> None:
        relu = next(o for o in operations(model) if o.type == "relu")  # type: ignore[attr-defined]
        relu.outputs[0].type.tensorType.dimensions[1].constant.size = 65

    copy = altered(package, tmp_path, respecified(lie))
    with pytest.raises(ContractError, match=r"relu .* \[2, 64\], the program declares fp32 \[2, 65\]"):
        Evaluator(open_package(copy)).run({"x": np.zeros((2, 48), np.float32)})


def test_fp16_rounds_each_result_once_and_strict_names_overflow(tmp_path: Path) -> None:
    def build(x: object) -> object:
        return mb.mul(x=mb.mul(x=x, y=300.0, name="large"), y=300.0, name="larger")

    program = open_package(save_program(tmp_path / "p.mlpackage", {"x": (1, 3)}, build, fp16=True))
    x = np.array([[1.0, 0.1, 2.0]], np.float32)
    assert np.isinf(Evaluator(program, precision="fp16").run({"x": x})["larger"]).any()
    assert np.allclose(Evaluator(program).run({"x": x})["larger"], x * 9e4)
    with pytest.raises(ContractError, match=r"larger.* not finite .*from inputs up to 600"):
        Evaluator(program, precision="fp16", strict=True).run({"x": x})


def test_states_last_between_calls(tmp_path: Path) -> None:
    fp16 = ct.converters.mil.mil.types.fp16

    @mb.program(
        input_specs=[mb.TensorSpec((3,), dtype=fp16), mb.StateTensorSpec((3,), dtype=fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(x: Any, memory: Any) -> Any:
        total = mb.add(x=mb.read_state(input=memory), y=x)
        return mb.coreml_update_state(state=memory, value=total, name="total")

    path = tmp_path / "state.mlpackage"
    with quiet_coremltools():
        ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True).save(str(path))
    evaluator = Evaluator(open_package(path))
    state = evaluator.make_state()
    feeds = {"x": np.array([1, 2, 3], np.float16)}
    results = [next(iter(evaluator.run(feeds, state=state).values())) for _ in range(3)]
    assert [list(r) for r in results] == [[1, 2, 3], [2, 4, 6], [3, 6, 9]]


def test_dead_values_are_freed(tmp_path: Path) -> None:
    def build(x: object) -> object:
        for _ in range(20):
            x = mb.sin(x=x)
        return x

    import tracemalloc

    program = open_package(save_program(tmp_path / "chain.mlpackage", {"x": (256, 1024)}, build))
    x = np.zeros((256, 1024), np.float32)
    tracemalloc.start()
    Evaluator(program).run({"x": x})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * x.nbytes  # one result, the next, and what an operation works with


@given(st.integers(1, 8), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_packed_integers(bits: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    packed = ct.optimize._utils.pack_elements_into_bits(values, bits)
    assert np.array_equal(unpack(packed, bits, count), values)


@given(st.floats(-30, 30))
def test_erf(x: float) -> None:
    import math

    assert abs(float(erf(np.array([x]))[0]) - math.erf(x)) < 1e-11


def test_the_vocabulary_of_diffusion_networks_is_known() -> None:
    wanted = """add concat conv cos expand_dims gather gelu greater_equal layer_norm linear matmul mul pad real_div
        reduce_mean relu reshape scaled_dot_product_attention select sigmoid silu sin slice_by_index softmax split sqrt
        square sub tanh transpose upsample_nearest_neighbor cast quantize dequantize read_state write_state
        constexpr_affine_dequantize constexpr_blockwise_shift_scale constexpr_lut_to_dense constexpr_lut_to_sparse
        constexpr_sparse_to_dense constexpr_sparse_blockwise_shift_scale constexpr_cast"""
    assert set(wanted.split()) <= known_operations()


@pytest.mark.parametrize(("constant", "error"), [(2.0, None), (0.5, "'y' has fractions, and the result is int32")])
def test_a_product_of_whole_numbers_takes_whole_constants_of_another_type(constant: float, error: str | None) -> None:
    whole, half = (TensorType(DTYPES[name], (2, 2)) for name in ("int32", "fp16"))
    y = Constant(half, lambda: np.full((2, 2), constant, np.float16))
    product = Operation("matmul", "product", {"x": ("x",), "y": (y,)}, (("z", whole),), {})
    block = Block((), ("z",), (product,))
    program = MilProgram(8, {"main": Function("main", (("x", whole),), block, "CoreML7")}, "main")
    feeds = {"x": np.array([[1, 2], [3, 4]], np.int32)}
    if error is None:
        assert Evaluator(program).run(feeds)["z"].tolist() == [[6, 6], [14, 14]]
    else:
        with pytest.raises(ContractError, match=error):
            Evaluator(program).run(feeds)


def test_what_an_author_wrote_beside_a_model_is_read(package: Path, tmp_path: Path) -> None:
    def write(model: Any) -> None:
        model.description.metadata.userDefined["a.key"] = "value"

    assert open_package(altered(package, tmp_path, respecified(write))).metadata["a.key"] == "value"

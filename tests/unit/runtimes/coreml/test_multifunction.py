"""Graphs of a component as functions of one Core ML package, which share their weights."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("coremltools")

import fewstep
from fewstep.bundle.bundle import write_manifest
from fewstep.bundle.contract import DENOISER
from fewstep.bundle.manifest import Artifact
from fewstep.errors import BundleError, ContractError, ExportError, RuntimeMissingError
from fewstep.numerics.metrics import psnr_db
from fewstep.runtimes import get_runtime
from fewstep.runtimes.coreml import runtime as coreml
from fewstep.runtimes.coreml.compile.lower import MODEL, WEIGHTS
from fewstep.runtimes.coreml.compile.multifunction import FunctionsWriter, lower_variants, read_model
from fewstep.runtimes.coreml.mil import Evaluator, open_package
from fewstep.runtimes.coreml.mil.names import METADATA
from fewstep.runtimes.coreml.mil.weight_file import Blob, BlobFile, BlobWriter
from fewstep.runtimes.sampling.sampler import open_sampler
from fewstep.runtimes.sampling.step_graphs import RowSession, row_spec
from tests.support import tiny
from tests.support.quantized import painter, program_of, random, small
from tests.unit.runtimes.coreml.mil.build import ct, mb, save_program

ROWS = ("row_0", "row_1")
WEIGHT = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((2, 32)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- weight files


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from((1, 2, 3, 4)), st.integers(0, 4), st.integers(0, 200)), max_size=12))
def test_blobs_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, made: list[Any]) -> None:
    path = tmp_path_factory.mktemp("blobs") / "weight.bin"
    blobs = [Blob(number, bytes([fill]) * size, 0) for number, fill, size in made]
    with BlobWriter(path) as writer:
        places = [writer.place(blob) for blob in blobs]
    assert [BlobFile(path).blob(place) for place in places] == blobs
    assert len(set(places)) == len(set(blobs)), "equal blobs are one, others are not"
    assert all(place % 64 == 0 for place in places)


def test_core_ml_tools_reads_what_was_written(tmp_path: Path) -> None:
    storage = pytest.importorskip("coremltools.libmilstoragepython")
    halves, whole = WEIGHT.astype(np.float16), np.arange(77, dtype=np.int8)
    with BlobWriter(tmp_path / "weight.bin") as writer:
        places = [writer.place(Blob(1, halves.tobytes(), 0)), writer.place(Blob(4, whole.tobytes(), 0))]
    reader = storage._BlobStorageReader(str(tmp_path / "weight.bin"))
    np.testing.assert_array_equal(reader.read_fp16_data(places[0]).view(np.float16), halves.reshape(-1))
    np.testing.assert_array_equal(reader.read_int8_data(places[1]), whole)


# ---------------------------------------------------------------------------------------------------------- functions


def package(path: Path, shift: float, weight: np.ndarray[Any, Any] = WEIGHT) -> Path:
    """Returns a package that multiplies by a weight, takes the mean from the rows twice and adds a number."""

    def build(x: Any) -> Any:
        y = mb.linear(x=x, weight=weight)
        y = mb.sub(x=y, y=mb.reduce_mean(x=y, axes=[-1], keep_dims=True))
        y = mb.sub(x=y, y=mb.reduce_mean(x=mb.square(x=y), axes=[-1], keep_dims=True))
        return mb.add(x=y, y=np.float32(shift), name="out")

    return save_program(path, {"x": X.shape}, build)


def merged(folder: Path) -> tuple[Path, list[int]]:
    """Returns a package of two functions with one weight, and what each has added."""
    with FunctionsWriter() as writer:
        added = [writer.add(name, package(folder / f"{i}.mlpackage", float(i))) for i, name in enumerate(ROWS)]
        writer.save(folder / "both.mlpackage")
    return folder / "both.mlpackage", added


def test_functions_compute_what_their_packages_do_and_share_the_weight(tmp_path: Path) -> None:
    path, added = merged(tmp_path)
    program = open_package(path)
    assert (program.default, tuple(program.functions)) == (ROWS[0], ROWS)
    for i, name in enumerate(ROWS):
        alone = Evaluator(open_package(tmp_path / f"{i}.mlpackage")).run({"x": X})
        ours = Evaluator(open_package(path, name)).run({"x": X})
        np.testing.assert_array_equal(ours["out"], alone["out"])
        np.testing.assert_array_equal(Evaluator(program).run({"x": X}, function=name)["out"], alone["out"])
    assert added[0] > WEIGHT.nbytes > 1000 + added[1]
    assert (path / WEIGHTS).stat().st_size == (tmp_path / "0.mlpackage" / WEIGHTS).stat().st_size


def test_core_ml_tools_loads_the_functions_and_its_own_are_the_same(tmp_path: Path) -> None:
    path, _ = merged(tmp_path)
    described = ct.models.utils.MultiFunctionDescriptor()
    for i, name in enumerate(ROWS):
        described.add_function(str(tmp_path / f"{i}.mlpackage"), "main", name)
    described.default_function_name = ROWS[0]
    ct.models.utils.save_multifunction(described, str(tmp_path / "theirs.mlpackage"))
    from coremltools.converters.mil.frontend.milproto.load import load

    for found in (path, tmp_path / "theirs.mlpackage"):
        model = ct.models.MLModel(str(found), skip_model_load=True)
        specification = model.get_spec()
        assert {function.name for function in specification.description.functions} == {*ROWS}
        assert specification.description.defaultFunctionName == ROWS[0]
        loaded = load(specification, specification.specificationVersion, model.weights_dir)
        assert loaded.functions.keys() == {*ROWS}
    for name in ROWS:
        theirs = Evaluator(open_package(tmp_path / "theirs.mlpackage", name)).run({"x": X})
        np.testing.assert_array_equal(Evaluator(open_package(path, name)).run({"x": X})["out"], theirs["out"])
    assert (path / MODEL).stat().st_size < (tmp_path / "theirs.mlpackage" / MODEL).stat().st_size


def test_equal_constants_of_a_function_are_one(tmp_path: Path) -> None:
    path, _ = merged(tmp_path)
    (before,) = read_model(tmp_path / "0.mlpackage").mlProgram.functions.values()
    after = read_model(path).mlProgram.functions[ROWS[0]]
    counts = []
    for function in (before, after):
        operations = function.block_specializations[function.opset].operations
        values = [o.attributes["val"].SerializeToString(deterministic=True) for o in operations if o.type == "const"]
        counts.append((len(values), len(set(values))))
    assert counts[0][0] > counts[0][1] == counts[1][0] == counts[1][1]


def test_a_further_function_adds_what_its_operations_need(tmp_path: Path) -> None:
    path, added = merged(tmp_path)
    functions = read_model(path).mlProgram.functions
    sizes = [functions[name].ByteSize() for name in ROWS]
    assert sizes[1] <= size_with_names(functions[ROWS[1]], "name") < sizes[0]
    # The rest of what it adds is what the model's description says of it, and its entry.
    assert sizes[1] < added[1] <= sizes[1] + 256
    program, alone = open_package(path), open_package(tmp_path / "1.mlpackage")
    assert METADATA in program.metadata
    names = [
        [value for o in operations if o.type != "const" for value in (o.name, *(name for name, _ in o.outputs))]
        for operations in (alone.functions["main"].block.operations, program.functions[ROWS[1]].block.operations)
    ]
    assert names[0] == names[1], "a reader has the values' own names"
    assert {"linear_0", "reduce_mean_1", "out"} < {*names[0]}


def size_with_names(function: Any, name: str) -> int:
    """Returns the bytes of a function whose values, inputs and outputs apart, are all called the same.

    Four letters name half a million values.
    """
    copy = type(function)()
    copy.CopyFrom(function)
    block = copy.block_specializations[copy.opset]
    fixed = {*(value.name for value in copy.inputs), *block.outputs}
    for operation in block.operations:
        bindings = [binding for argument in operation.inputs.values() for binding in argument.arguments]
        for one in (*operation.outputs, *(binding for binding in bindings if binding.HasField("name"))):
            one.name = one.name if one.name in fixed else name
        strings = operation.attributes["name"].immediateValue.tensor.strings
        strings.values[:] = [one if one in fixed else name for one in strings.values]
    return int(copy.ByteSize())


def test_what_cannot_be_a_function_is_refused(tmp_path: Path) -> None:
    path, _ = merged(tmp_path)
    with pytest.raises(ContractError, match=r"has no function 'row_2', it has row_0, row_1\n\nhint: build the bundle"):
        open_package(path, "row_2")
    with FunctionsWriter() as writer:
        writer.add("main", tmp_path / "0.mlpackage")
        with pytest.raises(ExportError, match="function 'main' is given twice"):
            writer.add("main", tmp_path / "1.mlpackage")
        with pytest.raises(ExportError, match=r"both\.mlpackage has the functions row_0, row_1, expected one"):
            writer.add("both", path)
    cut = shutil.copytree(tmp_path / "0.mlpackage", tmp_path / "cut.mlpackage")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-1])
    with FunctionsWriter() as writer, pytest.raises(BundleError, match="is cut off"):
        writer.add("main", cut)


def test_several_functions_need_ios_18(tmp_path: Path) -> None:
    program = program_of(torch_linear(), random(1, 32))
    with pytest.raises(ExportError, match=r"several functions need 9 \(iOS 18\)\n\nhint: compile for iOS 18, or give"):
        lower_variants([replace(program, variant="row-0")], tmp_path, "fp32", target="iOS17")


def torch_linear() -> Any:
    """Returns a linear layer."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Linear(32, 64)


def test_names_of_functions() -> None:
    named = {"": "main", "row-1": "row_1", "512x768": "main_512x768", "4x": "main_4x", "tile-8x16": "tile_8x16"}
    assert {variant: coreml.function_name(variant) for variant in named} == named


def test_a_runtime_without_functions_refuses_them() -> None:
    artifact = Artifact("onnxruntime", DENOISER, "x.onnx", "fp32", "fp32", 1, "row-1", "row_1")
    with pytest.raises(
        RuntimeMissingError, match=r"runtime onnxruntime opens no single function .* denoiser is 'row_1'"
    ):
        get_runtime("onnxruntime").of(artifact)
    assert get_runtime("onnxruntime").of(replace(artifact, function="")) is get_runtime("onnxruntime")


# ------------------------------------------------------------------------------------------------------------- bundles


@functools.cache
def built(form: str) -> fewstep.Bundle:
    """Returns the bundle of a tiny generator for Core ML; tests must not change it."""
    folder = Path(tempfile.mkdtemp(prefix=f"fewstep-functions-{form}-"))
    source = str(tiny.turbo_folder(folder / "source"))
    options = fewstep.Options(prompts=1, seeds=1, cache_root=folder / "cache", profile=False)
    return fewstep.build(source, "fp32", ("coreml",), folder / "b", steps=[1, 2], form=form, options=options)


def test_a_specialized_bundle_draws_what_the_table_does() -> None:
    bundle, table = built("specialized"), built("table")
    assert bundle.manifest.parity is not None and bundle.manifest.parity["passed"]
    graphs = [a for a in bundle.manifest.artifacts if a.component == DENOISER]
    assert [(a.variant, a.function) for a in graphs] == [("row-0", "row_0"), ("row-1", "row_1")]
    assert {a.path for a in graphs} == {"coreml/Unet.mlpackage/Manifest.json"}
    package = bundle.file(graphs[0].path).parent
    assert sum(a.bytes for a in graphs) == sum(f.stat().st_size for f in package.rglob("*") if f.is_file())
    weights = (table.path / "coreml" / "Unet.mlpackage" / WEIGHTS).stat().st_size
    # What differs between rows are vectors of a row; here even those are computed once for a picture.
    assert (package / WEIGHTS).stat().st_size <= weights
    for steps in (1, 2):
        ours, theirs = (b.generate("a cat", 3, steps=steps) for b in (bundle, table))
        assert psnr_db(theirs.output, ours.output) >= 100  # the same operations on the same numbers
    sampler = open_sampler(bundle)
    sampler("a cat", 3, bundle.manifest.schedule(2))
    held = sampler.session(DENOISER)._session
    assert isinstance(held, RowSession) and held.open_rows == (0, 1)
    sampler.close()


def test_an_unknown_function_does_not_open() -> None:
    manifest = built("specialized").manifest
    artifact = replace(manifest.artifact("coreml", DENOISER, "row-1"), function="row_7")
    runtime = get_runtime("coreml").of(artifact)
    with pytest.raises(ContractError, match="has no function 'row_7'"):
        runtime.open(built("specialized").file(artifact.path), row_spec(manifest.components[DENOISER]), None)


def damaged(bundle: fewstep.Bundle, folder: Path, function: str, edit: Callable[[Any], None]) -> fewstep.Bundle:
    """Returns a copy of a bundle with a function's operations edited, with the manifest's hashes made to fit."""
    shutil.copytree(bundle.path, folder)
    path = folder / "coreml" / "Unet.mlpackage" / MODEL
    model = read_model(path.parents[2])
    found = model.mlProgram.functions[function]
    edit(found.block_specializations[found.opset].operations)
    path.write_bytes(model.SerializeToString())
    write_manifest(folder, bundle.manifest)
    return fewstep.Bundle.open(folder)


def test_a_damaged_function_fails_in_its_step_and_bisect_names_the_module(tmp_path: Path) -> None:
    def drop(operations: Any) -> None:
        conv = next(o for o in operations if o.type == "conv" and "bias" in o.inputs)
        del conv.inputs["bias"]

    bundle = damaged(built("specialized"), tmp_path / "copy", "row_1", drop)
    result = fewstep.verify(bundle, prompts=1, seeds=1, bisect=True)
    assert not result.report
    assert {c.step for c in result.report.failures if c.component == DENOISER and c.level == "component"} == {1}
    departure = result.departures[DENOISER]
    assert departure is not None
    assert (departure.module_path, departure.op_type) == ("conv_in", "conv")


@pytest.mark.slow
def test_each_step_has_its_grids_in_a_function_of_its_own(tmp_path: Path) -> None:
    recipe = small("w8a8")
    assert recipe.quantization is not None
    recipe = replace(recipe, form="specialized", quantization=replace(recipe.quantization, step_grids="each"))
    options = fewstep.Options(prompts=1, seeds=3, cache_root=tmp_path / "cache", profile=False)
    bundle = fewstep.build(painter(), recipe, ("coreml",), tmp_path / "b", options=options)
    assert bundle.manifest.parity is not None and bundle.manifest.parity["passed"]
    checks = json.loads((bundle.path / "report" / "parity.json").read_text())["all"]
    compared = {c["step"] for c in checks if c["level"] == "operation" and c["component"] == DENOISER}
    assert compared == {0, 1}

"""A graph for each row of the table of steps, on one set of weights, and grids of activations by step."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fewstep
from fewstep.bundle.bundle import write_manifest
from fewstep.bundle.contract import DENOISER
from fewstep.bundle.manifest import PLAN_FOLDER
from fewstep.errors import ContractError, QuantizationError, RecipeError
from fewstep.export.specialize.at_step import at_row
from fewstep.export.specialize.dependencies import dependence, user_inputs
from fewstep.export.specialize.hoist import specialize
from fewstep.numerics.metrics import psnr_db
from fewstep.optimize.quantize import QuantPlan
from fewstep.pipeline import stages
from fewstep.progress import Silent
from fewstep.recipe.recipe import ROW_GRAPHS, Recipe, parse_recipe
from fewstep.runtimes.pytorch.reference import open_program
from fewstep.runtimes.sampling.sampler import open_sampler
from fewstep.runtimes.sampling.step_graphs import RowSession
from tests.support.bundles import STEPS, built
from tests.support.quantized import painter, small
from tests.support.time_paths import ROWS, Everything, feeds_of, onnx_time_path, program_of


def test_a_row_of_a_table_is_a_program_of_its_own() -> None:
    program = program_of(Everything())
    static = specialize(program, ROWS)
    assert static.conditions is not None
    names = tuple(spec.name for spec in program.spec.inputs)
    for i, row in enumerate(ROWS):
        alone = at_row(static.step, i)
        assert [s.name for s in alone.spec.inputs] == ["sample", "condition_0", "condition_1", "step_vectors"]
        values = feeds_of(names, row) | {"step": np.array([i])}
        with open_program(static.conditions) as session:
            values |= session.run({spec.name: values[spec.name] for spec in static.conditions.spec.inputs})
        outputs = []
        for one in (static.step, alone):
            with open_program(one) as session:
                outputs.append(session.run({spec.name: values[spec.name] for spec in one.spec.inputs})["out"])
        np.testing.assert_array_equal(*outputs)
        inputs = user_inputs(alone.exported, tuple(spec.name for spec in alone.spec.inputs))
        depends = dependence(alone.exported.graph, {node: alone.spec.bindings[name] for node, name in inputs.items()})
        assert not any("step" in found for found in depends.values())


@functools.cache
def specialized() -> fewstep.Bundle:
    """Returns the bundle of the tiny LCM in specialized form."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-specialized-"))
    lcm = built("lcm")
    return fewstep.build(str(lcm.source), out=folder / "b", steps=STEPS, form="specialized", options=lcm.options)


def test_the_pictures_are_those_of_the_table() -> None:
    bundle, table = specialized(), built("lcm").bundle
    assert bundle.manifest.contract == replace(table.manifest.contract, form="specialized")
    assert bundle.manifest.parity is not None and bundle.manifest.parity["passed"]
    for steps in STEPS:
        ours, theirs = (b.generate("a cat", 3, steps=steps) for b in (bundle, table))
        assert psnr_db(theirs.picture_HWC, ours.picture_HWC) >= 100  # the same operations on the same numbers
    with pytest.raises(ContractError, match="none of the 4 steps"):
        open_sampler(bundle)("a cat", 0, replace(bundle.manifest.schedule(1), timesteps=(777.0,)))


def test_weights_are_stored_once() -> None:
    bundle = specialized()
    graphs = [a for a in bundle.manifest.artifacts if a.component == DENOISER]
    assert [a.variant for a in graphs] == ["row-0", "row-1", "row-2", "row-3"]
    models = [ir.load(bundle.file(a.path)) for a in graphs]
    assert all(onnx_time_path(bundle.file(a.path)) == [] for a in graphs)
    assert not any(value.name == "step" for model in models for value in model.graph.inputs)
    places = [{(t.location, t.offset) for t in held(m) if isinstance(t, ir.ExternalTensor)} for m in models]
    assert len(places[0]) > 20
    assert all(other <= places[0] for other in places[1:])
    # What a graph holds beside them are the numbers of its row, and shapes.
    assert all(sum(t.nbytes for t in held(m) if not isinstance(t, ir.ExternalTensor)) <= 8 << 10 for m in models[1:])


def test_a_graph_adds_what_its_operations_need() -> None:
    bundle = specialized()
    first, *others = [bundle.file(a.path) for a in bundle.manifest.artifacts if a.component == DENOISER]
    for path in others:
        model = onnx.load(path, load_external_data=False)
        assert path.stat().st_size <= needed_bytes(model)
        assert path.stat().st_size < 0.5 * first.stat().st_size


def needed_bytes(model: onnx.ModelProto) -> int:
    """Returns what a graph on another's weights takes without types, notes and defaults, with names of four letters.

    Four letters name half a million values. On top comes the table of what the names stand for: of a stem and its
    blank for each kind of value, of which a network has dozens and each is shorter than 32 letters.
    """
    bare, stems = onnx.ModelProto(), set[str]()
    bare.CopyFrom(model)
    del bare.graph.value_info[:], bare.metadata_props[:]
    for node in bare.graph.node:
        stems.update(re.sub("[0-9]+", "", name) for name in node.output)
        node.input[:], node.output[:] = ["name"] * len(node.input), ["name"] * len(node.output)
        node.ClearField("name"), node.ClearField("doc_string")
        del node.metadata_props[:]
        if onnx.defs.has(node.op_type, node.domain):
            attributes = onnx.defs.get_schema(node.op_type, model.opset_import[0].version, node.domain).attributes
            kept = [a for a in node.attribute if a != attributes[a.name].default_value]
            del node.attribute[:]
            node.attribute.extend(kept)
    for tensor in bare.graph.initializer:
        tensor.name = "name"
    return int(bare.ByteSize()) + 32 * min(len(stems), 64)


def test_values_of_a_graph_have_their_names_where_they_are_looked_for(tmp_path: Path) -> None:
    bundle = specialized()
    artifact = bundle.manifest.artifact("onnxruntime", DENOISER, "row-1")
    shutil.copytree(bundle.path, tmp_path / "copy")
    path = tmp_path / "copy" / artifact.path
    model = onnx.load(path, load_external_data=False)
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3)
    del conv.input[2]  # its bias
    onnx.save(model, path)
    write_manifest(tmp_path / "copy", bundle.manifest)
    result = fewstep.verify(fewstep.Bundle.open(tmp_path / "copy"), prompts=1, seeds=1, bisect=True)
    departure = result.departures[DENOISER]
    assert departure is not None
    assert (departure.tensor, departure.module_path, departure.op_type) == ("conv2d", "conv_in", "Conv")


def held(model: ir.Model) -> list[ir.TensorProtocol]:
    """Returns the values of a model's initializers."""
    return [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]


@pytest.mark.parametrize("rows", ROW_GRAPHS)
def test_every_way_to_hold_the_graphs_draws_the_same(rows: str) -> None:
    bundle = specialized()
    sampler = open_sampler(bundle, rows=rows)
    found = sampler("a cat", 3, bundle.manifest.schedule(4))
    held = sampler.session(DENOISER)._session
    assert isinstance(held, RowSession) and len(held.open_rows) == (1 if rows == "one" else 4)
    sampler.close()
    assert not held.open_rows
    with pytest.raises(ContractError, match="rows is 'all', expected one of mapped, packed, one"):
        open_sampler(bundle, rows="all")
    # Packed or not, kernels sum in another order.
    assert psnr_db(bundle.generate("a cat", 3, steps=4).picture_HWC, found.picture_HWC) >= 100


@functools.cache
def by_step(form: str, step_grids: str) -> fewstep.Bundle:
    """Returns a quantized bundle of the painter whose steps have grids of their own."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-by-step-"))
    options = fewstep.Options(prompts=1, seeds=3, cache_root=folder / "cache", profile=False)
    recipe = small("w8a8")
    assert recipe.quantization is not None
    recipe = replace(recipe, form=form, quantization=replace(recipe.quantization, step_grids=step_grids))
    return fewstep.build(painter(), recipe, out=folder / "b", options=options)


@pytest.mark.parametrize("form", ["table", "specialized"])
def test_each_step_has_its_grids_in_both_forms(form: str) -> None:
    bundle = by_step(form, "each")
    assert bundle.manifest.parity is not None and bundle.manifest.parity["passed"]
    plan = QuantPlan.load(bundle.path / PLAN_FOLDER).components[DENOISER]
    assert plan.activations and all(grid.by_row and grid.scale.shape == (2,) for grid in plan.activations.values())
    assert any(grid.scale[0] != grid.scale[1] for grid in plan.activations.values())
    compared = {c["step"] for c in stages_checks(bundle) if c["level"] == "operation" and c["component"] == DENOISER}
    assert compared == {0, 1}, "whole numbers are compared in every step"


def stages_checks(bundle: fewstep.Bundle) -> list[dict[str, object]]:
    """Returns the checks of a bundle's report."""
    import json

    checks: list[dict[str, object]] = json.loads((bundle.path / "report" / "parity.json").read_text())["all"]
    return checks


def test_forms_share_their_grids() -> None:
    table, rows = (by_step(form, "each") for form in ("table", "specialized"))
    plans = [QuantPlan.load(b.path / PLAN_FOLDER).digest(DENOISER) for b in (table, rows)]
    assert plans[0] == plans[1]
    ours, theirs = (b.generate("", 5, inputs={"class_label": np.array([1])}) for b in (table, rows))
    assert psnr_db(ours.output, theirs.output) >= 60  # the same whole numbers; a rounding may fall the other way


def test_one_file_of_one_graph_for_all_steps() -> None:
    with pytest.raises(ContractError, match="a graph for each step"):
        stages.loop(specialized(), Path("x.onnx"), steps=2, runtime=None, progress=Silent())


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="several shapes and the form specialized"):
        Recipe("x", form="specialized", shape=((16, 16), (16, 24)))
    with pytest.raises(RecipeError, match="step_grids is 'each' and the sampler records a single step"):
        parse_recipe({"quantization": {"step_grids": "each", "sampler": "single"}}, where="r.toml", name="r")
    recipe = small("w8a8")
    assert recipe.quantization is not None
    recipe = replace(recipe, form="step", quantization=replace(recipe.quantization, step_grids="each"))
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    with pytest.raises(QuantizationError, match="networks in step form do not know which step it is"):
        fewstep.build(painter(), recipe, out=tmp_path / "b", options=options)

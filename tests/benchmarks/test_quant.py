"""The benchmark of quantized generators: peers cannot harm what they read, cells hold or do not, and pages are true."""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quant import environments, models, variants
from benchmarks.quant.cells import Cells
from benchmarks.quant.orderings import ORDERINGS, VARIANTS, Claim, Variant
from benchmarks.quant.plot import Point, scatter
from benchmarks.quant.prompts import CALIBRATION, HELD_OUT, check_disjoint
from benchmarks.quant.quality import spread
from benchmarks.quant.rows import METHODS, Method, rows
from benchmarks.quant.table import markdown, paired
from benchmarks.quant.variants import judge, named, write_recipe
from fewstep.bundle.bundle import Bundle
from fewstep.errors import ContractError, RecipeError, SourceError
from fewstep.hashing import file_sha256
from fewstep.recipe.recipe import load_recipe
from fewstep.run_in_subprocess import Measured
from tests.support.bundles import built

RESAVES_ITS_INPUT = """
import json, pathlib, sys
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
model = pathlib.Path(job["model"])
model.write_bytes(model.read_bytes() + b" saved again")
pathlib.Path(job["out"]).write_bytes(b"quantized")
"""


def _method(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> Method:
    """Returns a method whose tool is a script of this test, run by this Python."""
    (folder / "tool.py").write_text(script)
    monkeypatch.setattr(models, "PEERS", folder)
    monkeypatch.setattr(environments, "ensure", lambda name: Path(sys.executable))
    return Method("tool", "A tool", "ort", "tool", {})


def test_a_peer_that_saves_its_input_again_leaves_ours_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    method = _method(monkeypatch, tmp_path, RESAVES_ITS_INPUT)
    model = tmp_path / "model.onnx"
    model.write_bytes(b"network")
    before = file_sha256(model)
    made = models.quantize(method, "denoiser", model, tmp_path / "calls.npz", tmp_path / "out" / "denoiser.onnx")
    assert file_sha256(model) == before
    assert (tmp_path / "out" / "denoiser.onnx").read_bytes() == b"quantized"
    assert made["bytes"] == len(b"quantized")


def test_a_peer_that_fails_is_named_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    method = _method(monkeypatch, tmp_path, "import sys; sys.exit('no such operator')")
    model = tmp_path / "model.onnx"
    model.write_bytes(b"network")
    with pytest.raises(ContractError, match="tool cannot quantize the denoiser: no such operator"):
        models.quantize(method, "denoiser", model, tmp_path / "calls.npz", tmp_path / "out" / "denoiser.onnx")


def test_every_peer_has_a_script_and_pins_for_what_it_installs() -> None:
    for method in METHODS:
        assert (models.PEERS / f"{method.script}.py").is_file()
        lines = environments.constraints_file(method.environment).read_text().splitlines()
        pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
        for requirement in environments.REQUIREMENTS[method.environment]:
            assert requirement.split("[")[0].lower().replace("_", "-") in pinned, requirement


def test_rows_and_variants_have_names_of_their_own() -> None:
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names)
    assert named(ORDERINGS) <= VARIANTS.keys()
    assert VARIANTS.keys() <= named(ORDERINGS), "a variant that no claim names would be measured for nothing"
    assert all(variant.size_of is None or variant.size_of in VARIANTS for variant in VARIANTS.values())


def test_nothing_is_judged_that_was_calibrated_on() -> None:
    check_disjoint(CALIBRATION, HELD_OUT)
    with pytest.raises(SourceError, match="1 prompts are both calibrated on and judged: bacon"):
        check_disjoint(["bacon", "candle"], ["bacon"])


def test_a_cell_is_measured_once_for_a_key(tmp_path: Path) -> None:
    cells, calls = Cells(tmp_path), []

    def make() -> dict[str, Any]:
        calls.append(1)
        return {"value": len(calls)}

    assert cells.get_or_make("a/b", {"x": 1}, make) == {"value": 1}
    assert cells.get_or_make("a/b", {"x": 1}, make) == {"value": 1}
    assert cells.get_or_make("a/b", {"x": 2}, make) == {"value": 2}
    assert cells.get_or_make("a/b", {"x": 2}, make, again=True) == {"value": 3}


def test_a_failure_is_a_cell_that_is_tried_again(tmp_path: Path) -> None:
    cells = Cells(tmp_path)

    def fail() -> dict[str, Any]:
        raise RecipeError("unknown recipe 'w3'", hint="there is w4")

    assert cells.get_or_make("make/w3", {}, fail) == {"error": "unknown recipe 'w3'"}
    assert cells.get_or_make("make/w3", {}, lambda: {"seconds": 1}) == {"seconds": 1}


def test_a_row_that_could_not_be_made_stays_in_the_table_with_the_reason(tmp_path: Path) -> None:
    cells = Cells(tmp_path)

    def fail() -> dict[str, Any]:
        raise RecipeError("unknown recipe 'w4a8'")

    cells.get_or_make("make/w4a8", {}, fail)
    machine = {"cores": 2, "processor": "p", "memory_gib": 1, "system": "s", "python": "3", "versions": {}}
    page = markdown(rows(), cells, machine)
    assert "| fewstep w4a8 | absent: unknown recipe 'w4a8' |" in page
    assert "| NNCF | absent: not measured yet |" in page
    assert page.count("| absent: ") == 2 * len(rows())


def test_assembled_bundles_differ_in_the_replaced_model_alone(tmp_path: Path) -> None:
    reference = built("lcm").bundle
    artifact = reference.manifest.artifacts[0]
    other = tmp_path / "other.onnx"
    other.write_bytes(b"another network")
    made = models.assemble(reference, {artifact.component: other}, tmp_path / "made", "tool")
    assert Bundle.open(made.path).file(artifact.path).read_bytes() == b"another network"
    assert made.manifest.artifacts[0].bytes == len(b"another network")
    assert made.manifest.artifacts[1:] == reference.manifest.artifacts[1:]
    assert made.manifest.schedules == reference.manifest.schedules


def test_spread_leaves_identical_pictures_out_of_the_mean() -> None:
    assert spread([float("inf"), float("inf")]) is None
    assert spread([30.0, 40.0, float("inf")]) == {"mean": 35.0, "std": 5.0, "min": 30.0, "p10": 31.0, "identical": 1}


def test_paired_differences_know_their_error() -> None:
    margin, error = paired({"psnr_db_each": [31.0, 42.0, None]}, {"psnr_db_each": [30.0, 39.0, 5.0]})
    assert margin == pytest.approx(2.0)
    assert error == pytest.approx(1.0)  # differences 1 and 3: deviation sqrt(2) over sqrt(2)


@pytest.mark.parametrize(
    ("better", "verdict"),
    [
        pytest.param([33.0, 43.1, 53.0], "holds", id="above"),
        pytest.param([27.0, 37.1, 47.0], "**reversed**", id="below"),
        pytest.param([31.0, 39.0, 50.0], "**does not hold**: no difference", id="within the error"),
    ],
)
def test_claims_are_judged_by_paired_pictures(tmp_path: Path, better: list[float], verdict: str) -> None:
    cells = Cells(tmp_path)
    cells.get_or_make("orderings/a", {}, lambda: {"psnr_db_each": better, "identity": "a"})
    assert judge(Claim("a", "b", "somebody"), cells) == ("", "not measured")
    cells.get_or_make("orderings/b", {}, lambda: {"psnr_db_each": [30.0, 40.0, 50.0], "identity": "b"})
    assert judge(Claim("a", "b", "somebody"), cells)[1] == verdict


def test_two_variants_that_gave_one_bundle_decide_nothing(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    for name in ("a", "b"):
        cells.get_or_make(f"orderings/{name}", {}, lambda: {"psnr_db_each": [30.0, 31.0], "identity": "same"})
    assert judge(Claim("a", "b", "somebody"), cells) == ("", "none: both are the same bundle")


def test_variants_are_measured_against_the_reference_of_their_step_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle, cells, built_at = built("lcm").bundle, Cells(tmp_path / "cells"), []

    def here(function: Callable[..., Any], arguments: dict[str, Any]) -> Measured:
        return Measured(function(**arguments), 0, 0.0)

    def build(recipe: str, out: str, form: str) -> dict[str, Any]:
        assert form == "step"
        built_at.append(load_recipe(recipe).steps)
        shutil.copytree(bundle.path, out)
        return {"seconds": 1.0}

    monkeypatch.setattr(variants, "run_isolated", here)
    monkeypatch.setattr(variants, "WORK", tmp_path / "work")
    monkeypatch.setattr(variants, "PROMPTS", ("one", "two"))
    monkeypatch.setattr(models, "build_recipe", build)
    listed = {name: Variant(name, "w8a8", {"correction": name == "on"}, steps=2) for name in ("on", "off")}
    for variant in listed.values():
        found = variants.measure(variant, listed, bundle, cells)
        assert found["pictures"] == 4, "two prompts with two seeds"
        assert found["psnr_db_each"] == [None] * 4, "the copied bundle draws the same pictures"
        assert len(found["step_sqnr_db"]) == 2
        assert not (tmp_path / "work" / "variants" / variant.name).exists(), "bundles are too many to keep"
    assert built_at == [(2,), (2,)]
    assert judge(Claim("on", "off", "somebody"), cells) == ("", "none: both are the same bundle")
    impossible = Variant("never", "w8a8", missing="there is no such key yet")
    assert variants.measure(impossible, listed, bundle, cells) == {"error": "there is no such key yet"}


def test_a_bundle_that_is_not_what_its_recipe_says_is_refused() -> None:
    bundle = built("lcm").bundle
    with pytest.raises(ContractError, match="says to quantize, but no model of its bundle is quantized"):
        models.check_quantized(bundle, mixed=False)
    with pytest.raises(ContractError, match="asks for mixed precision, but each component has one bit width"):
        models.check_quantized(bundle, mixed=True)


def test_variants_are_recipes(tmp_path: Path) -> None:
    path = write_recipe(
        Variant("v", "w8a8", {"sampler": "first", "correction": False}, steps=2), None, tmp_path / "v.toml"
    )
    recipe = load_recipe(str(path))
    assert recipe.steps == (2,)
    assert recipe.quantization is not None
    assert (recipe.quantization.sampler, recipe.quantization.correction) == ("first", False)
    assert recipe.quantization.activations == 8, "the base's"
    sized = load_recipe(str(write_recipe(Variant("v", "w4"), 1234, tmp_path / "v.toml"))).quantization
    assert sized is not None
    assert sized.max_bytes == 1234
    assert sized.mixed


def test_the_plot_names_every_generator_and_keeps_them_inside() -> None:
    points = [Point("ours <w8a8>", True, 11.9, 41.2), Point("a peer", False, 44.5, 13.0)]
    svg = ElementTree.fromstring(scatter(points))
    circles = svg.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(points)
    width, height = (float(v) for v in svg.attrib["viewBox"].split()[2:])
    assert all(0 < float(c.attrib["cx"]) < width and 0 < float(c.attrib["cy"]) < height for c in circles)
    assert "ours <w8a8> (11.9 MB, 41.2 dB)" in "".join(svg.itertext())


def test_committed_pages_are_those_of_the_committed_cells(repository: Path) -> None:
    results = repository / "benchmarks" / "quant" / "results"
    machine = json.loads((results / "machine.json").read_text())
    assert markdown(rows(), Cells(results / "cells"), machine) == (results / "README.md").read_text(encoding="utf-8")

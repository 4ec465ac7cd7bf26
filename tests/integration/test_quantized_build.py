"""Quantized bundles, whole: they pass, shrink, are the same bytes again, and a wrong number in them is found."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import fewstep
from fewstep import cli
from fewstep.bundle.bundle import write_manifest
from fewstep.bundle.manifest import INTEGERS, PLAN_FOLDER, Artifact
from fewstep.bundle.program import Program
from fewstep.bundle.samples import Sample
from fewstep.calibration import CalibrationSet, collect
from fewstep.errors import BundleError, ParityError, RuntimeMissingError
from fewstep.optimize.quantize import QuantPlan
from fewstep.optimize.quantize.plan import ARRAYS, PLAN
from fewstep.recipe.recipe import Limits
from fewstep.runtimes import RUNTIMES
from fewstep.runtimes.base import Runtime
from fewstep.runtimes.onnxruntime import runtime as ort
from fewstep.runtimes.parity.harness import Agreement, Check, Floor, ParityReport, fold
from fewstep.runtimes.parity.quantized import (
    BELOW_FLOOR_DB,
    MEAN_DB,
    agreement_of,
    floor_checks_of,
    floor_limit,
    floor_of,
    mean_check,
)
from tests.support.checks import PICTURE, check, sample
from tests.support.quantized import painted, painter, small

RECIPES = ("w8", "w8a8", "w4", "w4a8")


@pytest.mark.parametrize("recipe", RECIPES)
def test_presets_build_and_pass(recipe: str) -> None:
    bundle = painted(recipe).bundle
    manifest = bundle.manifest
    assert manifest.parity is not None and manifest.parity["passed"]
    worst = manifest.parity["worst"]
    assert {"lowering.picture", "compression.picture"} <= worst.keys()
    denoiser = manifest.artifact("onnxruntime", "denoiser")
    # The ends have 8 bits at least.
    assert denoiser.weights == {"w8": "int8", "w8a8": "int8", "w4": "mixed", "w4a8": "mixed"}[recipe]
    assert denoiser.compute == (INTEGERS if recipe.endswith("a8") else "fp32")
    assert (manifest.parity["floor"] is not None) == recipe.endswith("a8")
    assert ("lowering.operation" in worst) == recipe.endswith("a8")
    picture = bundle.generate(seed=1, inputs={"class_label": np.array([2])}).picture_HWC
    assert np.isfinite(picture).all()
    report = (bundle.path / "report" / "index.html").read_text(encoding="utf-8")
    assert "Quantization" in report


def test_sizes_shrink() -> None:
    size = {r: sum(a.bytes for a in painted(r).bundle.manifest.artifacts) for r in ("fp32", "w8", "w8a8", "w4", "w4a8")}
    # The graph itself is some 20 kB of each file, the weights are 200 kB in float32.
    assert size["w8"] < 0.4 * size["fp32"]
    assert size["w8a8"] < 0.45 * size["fp32"]
    assert size["w4"] < size["w8"]
    assert size["w4a8"] < size["w8a8"]


def test_mixed_precision_spends_its_budget_and_says_on_what() -> None:
    bundle = painted("mixed").bundle
    plan = QuantPlan.load(bundle.path / PLAN_FOLDER)
    quality = plan.quality
    assert quality["bits"] <= 5.0 and quality["weight_bytes"] <= quality["budget_bytes"]
    rows = {row["site"]: row for row in quality["weights"]}
    bits = {site: row["options"][row["chosen"]]["bits"] for site, row in rows.items()}
    assert len(set(bits.values())) > 1, "one width for all is no mixed precision"
    for row in rows.values():
        damages = [option["picture_psnr_db"] or math.inf for option in row["options"]]
        assert damages[-1] >= damages[0], "the dearest option spares the picture most"
        of_class = row["op"] == "embedding"  # it carries what the picture shows
        assert row["judged_by"] == ("picture" if of_class else "output")
    component = plan.components["denoiser"]
    assert {grid.bits for grid in component.weights.values()} <= {4, 8}
    assert "What was bought with each byte" in (bundle.path / "report" / "index.html").read_text(encoding="utf-8")


def test_the_same_seed_and_recipe_give_the_same_bytes(tmp_path: Path) -> None:
    once = painted("w8a8").bundle
    options = fewstep.Options(prompts=1, seeds=3, cache_root=tmp_path / "cache", profile=False)
    again = fewstep.build(painter(), small("w8a8"), out=tmp_path / "bundle", options=options)
    for name in (PLAN, ARRAYS):
        paths = [bundle.path / PLAN_FOLDER / name for bundle in (once, again)]
        assert paths[0].read_bytes() == paths[1].read_bytes(), name
    first, second = (
        {p: e.sha256 for p, e in b.manifest.files.items() if p.startswith("onnxruntime")} for b in (once, again)
    )
    assert first == second and first
    plan, other = (QuantPlan.load(b.path / PLAN_FOLDER) for b in (once, painted("w4a8").bundle))
    assert plan.digest("denoiser") != other.digest("denoiser")


def test_verify_from_the_golden_pack_takes_the_floor_of_the_manifest() -> None:
    """The source lives in a test's memory: there is no PyTorch to compare with, as on a machine without it."""
    bundle = painted("w8a8").bundle
    found = fewstep.verify(bundle)
    assert found.report
    assert found.report.floor is not None and bundle.manifest.parity is not None
    assert found.report.floor.to_json() == bundle.manifest.parity["floor"]
    assert "quantized operations were compared one by one at those of the golden pack" in found.caveats
    assert any("compared with the golden pack" in caveat for caveat in found.caveats)
    without = replace(bundle, manifest=replace(bundle.manifest, parity={"passed": True}))
    with pytest.raises(BundleError, match="does not say what its noise floor is"):
        fewstep.verify(without)
    numbers = {"floor": {"components": {"denoiser": 38.6}, "picture": 47.8}}
    other = replace(bundle, manifest=replace(bundle.manifest, parity=numbers))
    with pytest.raises(BundleError, match="states its noise floor in another form"):
        fewstep.verify(other)


def test_a_build_that_lowers_wrongly_fails_and_names_the_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = painted("w8a8")

    def compile_wrongly(program: Program, folder: Path, weights: str) -> Artifact:
        artifact = ort.RUNTIME.compile(program, folder, weights)
        if program.component != "denoiser":
            return artifact
        path = folder / artifact.path
        model = onnx.load(path)
        node = next((n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat"), None)
        if node is None:  # what runs once for each picture multiplies single rows
            return artifact
        tensor = next(i for i in model.graph.initializer if i.name == node.input[1])
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[np.abs(array).argmax()] ^= np.int8(0x40)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        onnx.save(model, path)
        return artifact

    monkeypatch.setitem(RUNTIMES, "onnxruntime", replace(ort.RUNTIME, compile=compile_wrongly))
    options = replace(built.options, cache_root=tmp_path / "cache")
    with pytest.raises(ParityError, match="is not what PyTorch computes"):
        fewstep.build(painter(), small("w8a8"), out=tmp_path / "bundle", options=options)
    assert not (tmp_path / "bundle").exists()
    checks = json.loads((tmp_path / "bundle.failed" / "report" / "parity.json").read_text())["all"]
    failed = [c for c in checks if not c["passed"] and c["level"] == "operation"]
    assert failed
    assert {c["metric"] for c in failed} <= {"unexplained integers, negated", "SQNR dB"}
    # The changed weight is of one convolution: what follows it, and nothing else.
    assert len({c["tensor"] for c in failed}) == 1, {c["tensor"] for c in failed}


# ------------------------------------------------------------------------------------------------------ several targets


def second(open_wrongly: bool = False) -> Runtime:
    """Returns a runtime of another name; one that adds to every output, if asked for."""

    def compile_(program: Program, folder: Path, weights: str) -> Artifact:
        return replace(ort.RUNTIME.compile(program, folder, weights), runtime="second")

    def open_(path: Path, spec: object, threads: int | None = None) -> object:
        session = ort.RUNTIME.open(path, spec, threads)  # type: ignore[arg-type]
        if open_wrongly:
            run = session.run
            session.run = lambda feeds: {k: v + np.float32(0.1) for k, v in run(feeds).items()}  # type: ignore[method-assign]
        return session

    def availability() -> object:
        return replace(ort.RUNTIME.availability(), runtime="second")

    return replace(ort.RUNTIME, name="second", compile=compile_, open=open_, availability=availability)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [False, True], ids=["both right", "second wrong"])
def test_every_target_of_a_build_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    monkeypatch.setitem(RUNTIMES, "second", second(wrong))
    options = fewstep.Options(prompts=1, seeds=1, cache_root=painted("fp32").options.cache_root, profile=False)
    out = tmp_path / "bundle"
    targets = ["onnxruntime", "second"]
    if wrong:
        with pytest.raises(ParityError, match=r"denoiser.* \(second\)"):
            fewstep.build(painter(), "fp32", targets, out, options=options)
        assert not out.exists()
        return
    bundle = fewstep.build(painter(), "fp32", targets, out, options=options)
    assert bundle.manifest.runtimes == ("onnxruntime", "second")
    both = fewstep.verify(bundle)
    counts = {name: sum(c.runtime == name for c in both.report.checks) for name in targets}
    assert both.report and counts["onnxruntime"] == counts["second"] > 0
    assert set(both.each) == set(targets)
    one = fewstep.verify(bundle, runtime="second")
    of_none = sum(c.runtime is None for c in both.report.checks)  # the host's, which every runtime has in common
    assert one.report and not one.each and len(one.report.checks) == counts["second"] + of_none
    text = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert "(second)" in text
    monkeypatch.setitem(RUNTIMES, "second", second(open_wrongly=True))
    assert not fewstep.verify(bundle).report, "the second is not skipped"
    gone = replace(second(), availability=lambda: replace(ort.RUNTIME.availability(), runs=False, detail="not here"))
    monkeypatch.setitem(RUNTIMES, "second", gone)
    with pytest.raises(RuntimeMissingError, match="second cannot be verified here: not here") as caught:
        fewstep.verify(bundle)
    assert "verify onnxruntime alone with --runtime" in str(caught.value.hint)
    assert fewstep.verify(bundle, runtime="onnxruntime").report


def test_fold() -> None:
    good = ParityReport((check(120.0),), "r", "a")
    picture = Check("compression", "picture", "picture", None, "cat", None, "PSNR dB", 40.0, 30.0)
    both = fold(
        {"a": replace(good, checks=(*good.checks, picture)), "b": replace(good, checks=(*good.checks, picture))}
    )
    assert both and len(both.checks) == 3, "compression is told once"
    assert [c.runtime for c in both.checks if c.error == "lowering"] == ["a", "b"]
    assert not fold({"a": good, "b": ParityReport((check(99.0),), "r", "b")})
    for nothing in ((), (check(120.0, None),), (picture,)):
        report = fold({"a": good, "b": ParityReport(nothing, "r", "b")})
        assert not report, "one that compared nothing is not counted as passed"
        assert "b" in report.failures[0].where
    assert fold({"a": good}) is good


# ----------------------------------------------------------------------------------------------------- floor and mean


def test_floor_checks() -> None:
    floor = Floor({"denoiser": Agreement(30.0, 0.0, 8)}, Agreement(35.0, 0.0, 8))
    limits = Limits(component_sqnr_db=80.0, picture_psnr_db=60.0)
    right = floor_checks_of(floor, limits, {"denoiser": [29.5, 29.1, 90.0]}, [34.5], "picture")
    assert [c.passed for c in right] == [True, True]
    assert [c.limit for c in right] == [30.0 - BELOW_FLOOR_DB, 35.0 - BELOW_FLOOR_DB]
    below = floor_checks_of(floor, limits, {"denoiser": [28.9, 28.9, 90.0]}, [33.9], "picture")
    assert [c.passed for c in below] == [False, False]
    # A floor beyond what float pictures must keep asks for no more than that.
    equal = Agreement(140.0, 0.0, 8)
    high = floor_checks_of(Floor({"denoiser": equal}, equal), limits, {"denoiser": [61.0]}, [61.0], "picture")
    assert all(c.passed and c.limit == 60.0 for c in high)
    nothing = floor_checks_of(floor, limits, {"denoiser": []}, [35.0], "picture")
    assert [c.passed for c in nothing] == [False, True], "a component without calls was not compared"


def test_floor_limit_knows_how_few_values_there_are() -> None:
    floor = Agreement(40.0, 2.0, 8)
    assert floor_limit(floor, 8, 60.0) == pytest.approx(40.0 - 1.0 - 2 * 1.2533 * 2.0 / 2.0)
    assert floor_limit(floor, 2, 60.0) < floor_limit(floor, 8, 60.0) < floor_limit(floor, 800, 60.0) < 39.0


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0], ids="spread {} dB".format)
@pytest.mark.parametrize("count", [2, 8, 32], ids="{} values".format)
def test_floor_limit_lets_right_executions_through_and_wrong_ones_not(count: int, spread: float) -> None:
    """A right execution's values are drawn from the floor's own distribution; a wrong one's lie lower."""
    source = np.random.default_rng(count)
    unsure = 2 * 1.2533 * spread * math.sqrt(1 / 8 + 1 / count)
    refused = {"right": 0, "wrong": 0}
    for _ in range(500):
        limit = floor_limit(agreement_of(source.normal(45.0, spread, 8).tolist()), count, math.inf)
        value = median(source.normal(45.0, spread, count).tolist())
        refused["right"] += value < limit
        refused["wrong"] += value - BELOW_FLOOR_DB - 2 * unsure - 0.01 < limit
    # Two standard errors leave 2 % on one side if the spread is known; from eight values it is known to a third.
    assert refused["right"] <= 0.06 * 500
    assert refused["wrong"] >= 0.9 * 500


def test_floor_is_of_medians_and_mean_check_of_the_distance() -> None:
    noise = np.random.default_rng(0).normal(size=PICTURE.shape)

    def distant(by: float) -> object:
        return sample(PICTURE + by * noise)

    floor = floor_of({"denoiser": [30.0, 31.0, 150.0]}, [sample(PICTURE)], [distant(0.01)])  # type: ignore[list-item]
    # The median distance to 31 is 1: the call that agrees by luck widens nothing. Three values count with two of 2 dB.
    spread = math.sqrt((3 * 1.4826**2 + 2 * 2.0**2) / 5)
    assert floor.components == {"denoiser": Agreement(31.0, spread, 3)}
    assert agreement_of([30.0] * 8).spread_db == 0.0, "eight values speak for themselves"
    assert agreement_of([30.0]).spread_db == pytest.approx(1.63, abs=0.01), "one says nothing of its spread"
    assert floor.picture.median_db == pytest.approx(40.0, abs=1.0), "PSNR of noise of a hundredth"
    assert Floor.from_json(json.loads(json.dumps(floor.to_json()))) == floor
    original, reference = [sample(PICTURE)], [distant(0.01)]
    nearer, further = ([distant(0.01 * 10 ** (db / 20))] for db in (MEAN_DB - 0.1, MEAN_DB + 0.1))
    assert mean_check(original * 8, reference * 8, nearer * 8).passed  # type: ignore[arg-type]
    assert not mean_check(original * 8, reference * 8, further * 8).passed  # type: ignore[arg-type]
    assert mean_check(original, reference, further).passed, "one sample leaves unsure by how much"  # type: ignore[arg-type]
    # One broken sample among many must not make the others' spread its excuse.
    near = [distant(0.01 * (1 + 0.01 * i)) for i in range(15)]
    broken = [*near[:-1], distant(1.0)]
    assert mean_check(original * 15, reference * 15, near).passed  # type: ignore[arg-type]
    assert not mean_check(original * 15, reference * 15, broken).passed  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Builds by the command line, expects status 2 with a hint and nothing written; returns what was said."""
    source = tmp_path / "painters.py"
    source.write_text("from tests.support.quantized import painter\n\n\ndef make():\n    return painter()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "painters", raising=False)

    def call(*options: str | Path) -> str:
        out = tmp_path / "out" / "bundle"
        arguments = ["fewstep", "build", "painters:make", "-o", out, "--prompts", "1", "--seeds", "1", *options]
        monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capfd.readouterr()
        assert exit_.value.code == 2, captured.err
        assert "hint: " in captured.err
        assert not out.parent.exists() or list(out.parent.iterdir()) == []
        return " ".join(captured.err.split())

    return call


def recipe_file(tmp_path: Path, text: str) -> Path:
    (tmp_path / "mine.toml").write_text(f'base = "w8a8"\n[quantization]\nsamples = 2\n{text}\n')
    return tmp_path / "mine.toml"


def patched(monkeypatch: pytest.MonkeyPatch, change: Callable[..., object]) -> None:
    def collected(*given: object, **options: object) -> object:
        return change(collect(*given, **options))  # type: ignore[arg-type]

    monkeypatch.setattr("fewstep.calibration.collect", collected)


def test_an_empty_calibration(run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, lambda made: replace(made, shards=()))
    assert "there is no calibration call, expected at least one for each step" in run(
        "--recipe", recipe_file(tmp_path, "")
    )


def test_a_calibration_that_is_not_finite(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = CalibrationSet.samples

    def broken(self: CalibrationSet) -> Iterator[Sample]:
        for each in samples(self):
            feeds = [
                replace(
                    feed,
                    inputs={n: x * np.float32("nan") if x.dtype == np.float32 else x for n, x in feed.inputs.items()},
                )
                for feed in each.feeds
            ]
            yield replace(each, feeds=tuple(feeds))

    monkeypatch.setattr(CalibrationSet, "samples", broken)
    text = run("--recipe", recipe_file(tmp_path, ""))
    assert "has values that are not finite at step 0" in text


def test_a_step_without_samples(run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = CalibrationSet.samples

    def without_the_last(self: CalibrationSet) -> Iterator[Sample]:
        for each in samples(self):
            yield replace(each, feeds=tuple(feed for feed in each.feeds if feed.step != 1))

    monkeypatch.setattr(CalibrationSet, "samples", without_the_last)
    text = run("--recipe", recipe_file(tmp_path, ""))
    assert "calibration has calls of steps [0], expected every one of [0, 1]" in text
    assert "hint: calibrate with samples of every step" in text


def test_a_plan_for_another_network(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = fewstep.Options(prompts=1, seeds=1, profile=False)
    bundle = fewstep.build("painters:make", small("w8a8"), out=tmp_path / "bundle", options=options)
    path = bundle.path / PLAN_FOLDER / PLAN
    head = json.loads(path.read_text())
    head["components"]["denoiser"]["network"] = "0" * 64
    path.write_text(json.dumps(head))
    write_manifest(bundle.path, bundle.manifest)
    arguments = ["fewstep", "verify", str(bundle.path), "--against", "painters:make", "--prompts", "1", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = " ".join(capfd.readouterr().err.split())
    assert exit_.value.code == 2
    assert "the plan of denoiser is for another network hint: make a plan for this generator" in said

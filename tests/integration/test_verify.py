"""Verification of a bundle: it passes when it should, fails when it should, and says what it compared with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import fewstep
from fewstep.bundle.bundle import write_manifest
from fewstep.errors import ContractError, SourceError
from fewstep.export import describe, load, programs_of, record, trace
from fewstep.numerics.metrics import sqnr_db
from fewstep.runtimes.onnxruntime.debug.bisect import bisect
from fewstep.runtimes.pytorch.reference import open_program
from tests.support import tiny
from tests.support.bundles import STEPS, built


def spoil(folder: Path, component: str, pattern: str, factor: float) -> str:
    """Scales one weight of a component's ONNX model, with the manifest's hashes made to fit; returns its name."""
    manifest = fewstep.Bundle.open(folder).manifest
    path = folder / manifest.artifact("onnxruntime", component).path
    model = ir.load(path)
    name, value = next((n, v) for n, v in model.graph.initializers.items() if pattern in n)
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)
    ir.save(model, path)
    write_manifest(folder, manifest)
    return name


def test_live_verification_passes() -> None:
    result = fewstep.verify(built("lcm").bundle, prompts=1, seeds=1)
    assert result.report
    assert "run now" in result.report.reference
    levels = {"component", "trajectory", "picture", "host", "stored", "manifest", "golden", "call"}
    assert {check.level for check in result.report.checks} == levels
    assert result.place is None


def test_without_its_source_the_golden_pack_is_used(tmp_path: Path, copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("lcm")
    manifest = fewstep.Bundle.open(folder).manifest
    write_manifest(folder, replace(manifest, source=replace(manifest.source, uri=str(tmp_path / "gone"))))
    result = fewstep.verify(fewstep.Bundle.open(folder))
    assert result.report
    assert "golden pack" in result.report.reference
    assert any("not on this machine" in caveat for caveat in result.caveats)


def test_another_generator_is_refused_as_reference(tmp_path: Path) -> None:
    other = tiny.lcm_folder(tmp_path / "other", seed=1)
    with pytest.raises(ContractError, match="is not what this bundle was built from"):
        fewstep.verify(built("lcm").bundle, against=str(other))
    with pytest.raises(SourceError, match=r"is not a folder, a \.safetensors file, a hub id"):
        fewstep.verify(built("lcm").bundle, against=str(tmp_path / "nothing here"))


def test_a_wrong_weight_fails_and_bisect_names_its_module(copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("lcm")
    spoil(folder, "denoiser", "mid_block.resnets.0.conv1.weight", 1.5)
    result = fewstep.verify(fewstep.Bundle.open(folder), prompts=1, seeds=1, bisect=True)
    assert not result.report
    assert {check.component for check in result.report.failures if check.level == "component"} == {"denoiser"}
    departure = result.departures["denoiser"]
    assert departure is not None
    assert departure.module_path == "mid_block.resnets.0.conv1"
    assert departure.op_type == "Conv"


def test_bisect_finds_nothing_in_a_right_model_and_compares_most_of_it() -> None:
    lcm = built("lcm")
    generator = load(str(lcm.source))
    described = describe(generator, STEPS)
    programs = programs_of(generator, described, fewstep.Recipe("fp32"))
    program = programs.make("denoiser")
    sample = record(generator, described, "cat", 0, steps=2, guidance=8.5)
    feeds = next(feed for feed in programs.restate([sample])[0].feeds if feed.component == "denoiser").inputs
    path = lcm.bundle.path / lcm.bundle.manifest.artifact("onnxruntime", "denoiser").path
    # 90 dB and not 100: values inside the network cancel more than its output does.
    assert bisect(program, path, feeds, limit_db=90.0) is None
    impossible = bisect(program, path, feeds, limit_db=1000.0)
    assert impossible is not None


def test_pytorch_adapter_is_the_reference() -> None:
    lcm = built("lcm")
    generator = load(str(lcm.source))
    described = describe(generator, STEPS)
    program = trace(generator, described.wirings["decoder"], described.components["decoder"])
    feed = record(generator, described, "cat", 0, steps=1, guidance=8.5).feeds[-1]
    feeds = dict(feed.inputs)
    with open_program(program) as session:
        result = session.run(feeds)["sample"]
        with pytest.raises(ContractError, match=r"inputs missing \['latent_sample'\], unknown \['latents'\]"):
            session.run({"latents": feeds["latent_sample"]})
        with pytest.raises(ContractError, match=r"latent_sample is float64 \[1, 4, 8, 8\], expected float32"):
            session.run({"latent_sample": feeds["latent_sample"].astype(np.float64)})
    # The same kernels on the same inputs; tracing only reorders what has no order.
    assert sqnr_db(feed.outputs["sample"], result) >= 120


def test_a_model_that_breaks_the_contract_does_not_open(copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("lcm")
    manifest = fewstep.Bundle.open(folder).manifest
    target = manifest.artifact("onnxruntime", "denoiser").path
    shutil.copyfile(built("turbo").bundle.path / "onnxruntime" / "unet" / "model.onnx", folder / target)
    write_manifest(folder, manifest)
    with pytest.raises(ContractError, match="the manifest has"):
        fewstep.Bundle.open(folder).generate("cat")

"""A checkpoint in, a verified bundle out: for generators that this project knows nothing about."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline

import fewstep
from fewstep.numerics import noise
from fewstep.numerics.metrics import psnr_db
from tests.support.bundles import STEPS, built


@pytest.mark.parametrize("kind", ["lcm", "turbo"])
def test_lowering_keeps_its_limits(kind: str) -> None:
    parity = built(kind).bundle.manifest.parity
    assert parity is not None
    assert parity["passed"]
    assert parity["worst"]["lowering.component"]["value"] >= 100
    assert parity["worst"]["lowering.picture"]["value"] >= 80
    assert parity["checks"] > 20


@pytest.mark.parametrize("steps", STEPS)
def test_turbo_draws_what_diffusers_draws(steps: int) -> None:
    # An oracle that shares nothing with the harness: the pipeline as a user calls it, latents handed in. Euler draws no
    # step noise, so nothing of diffusers is replaced.
    pipeline = StableDiffusionPipeline.from_pretrained(built("turbo").source, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise.normal(7, 0, (1, 4, 8, 8)))
    with torch.no_grad():
        reference = pipeline(
            "red apple", num_inference_steps=steps, guidance_scale=0.0, latents=latents, output_type="pt"
        ).images[0]
    sample = built("turbo").bundle.generate("red apple", seed=7, steps=steps)
    assert psnr_db(reference.permute(1, 2, 0).numpy(), sample.picture_HWC) >= 80


def test_lcm_draws_what_diffusers_draws_in_one_step() -> None:
    pipeline = LatentConsistencyModelPipeline.from_pretrained(built("lcm").source, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise.normal(3, 0, (1, 4, 8, 8)))
    with torch.no_grad():
        reference = pipeline(
            "cat", num_inference_steps=1, guidance_scale=8.5, latents=latents, output_type="pt"
        ).images[0]
    sample = built("lcm").bundle.generate("cat", seed=3, steps=1)
    assert psnr_db(reference.permute(1, 2, 0).numpy(), sample.picture_HWC) >= 80


def test_contract_of_lcm() -> None:
    manifest = built("lcm").bundle.manifest
    assert manifest.components["denoiser_conditions"].bindings == {
        "timestep_cond": "guidance_embedding",
        "encoder_hidden_states": "text_encoder.last_hidden_state",
    }
    bindings = dict(manifest.components["denoiser"].bindings)
    assert (bindings.pop("sample"), bindings.pop("step")) == ("latent", "step")
    assert bindings == {n: f"denoiser_conditions.{n}" for n in bindings}
    assert manifest.contract.guidance.kind == "embedded"
    step = next(s for s in manifest.components["denoiser"].inputs if s.name == "step")
    assert (step.dtype, step.shape) == ("int64", (1,))
    assert sorted(manifest.schedules) == list(STEPS)
    assert manifest.default_steps == 4


def test_contract_of_turbo() -> None:
    manifest = built("turbo").bundle.manifest
    assert (manifest.contract.guidance.kind, manifest.contract.guidance.scale) == ("two_pass", 0.0)
    assert manifest.contract.latent_scale == pytest.approx(0.18215)
    assert manifest.contract.form == "table"
    assert [row["timestep"] for row in manifest.contract.rows] == [999.0, 749.0, 499.0, 249.0]


def test_same_seed_same_picture() -> None:
    bundle = built("lcm").bundle
    first, second = (bundle.generate("a house", seed=5).picture_HWC for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, bundle.generate("a house", seed=6).picture_HWC)
    assert not np.array_equal(first, bundle.generate("a mouse", seed=5).picture_HWC)


def test_guidance_scale_reaches_the_network() -> None:
    bundle = built("lcm").bundle
    one, other = (bundle.generate("a house", seed=5, guidance=w).picture_HWC for w in (2.0, 8.5))
    assert not np.array_equal(one, other)
    with pytest.raises(fewstep.FewstepError, match="a negative prompt is given, but this generator takes none"):
        bundle.generate("a house", negative_prompt="blurry")


def test_guidance_that_a_bundle_does_not_use_by_default() -> None:
    bundle = built("turbo").bundle
    assert np.array_equal(*(bundle.generate("a house", seed=5, guidance=w).picture_HWC for w in (0.0, 1.0)))
    drawn = [bundle.generate("a house", seed=5, guidance=3.0, negative_prompt=n).picture_HWC for n in (None, "cat")]
    assert not np.array_equal(*drawn)


def test_two_pass_guidance(tmp_path: Path) -> None:
    source = built("turbo").source
    options = built("turbo").options
    bundle = fewstep.build(str(source), out=tmp_path / "bundle", steps=[2], guidance=3.0, options=options)
    assert bundle.manifest.contract.guidance.kind == "two_pass"
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity["passed"]


def test_fp16_weights_halve_the_files_and_compute_in_fp32() -> None:
    small, large = built("lcm", "fp16").bundle.manifest, built("lcm").bundle.manifest
    assert small.parity is not None
    assert small.parity["passed"]
    assert {a.compute for a in small.artifacts} == {"fp32"}
    assert {a.weights for a in small.artifacts} == {"fp16"}
    # Compression is measured against the original network, and rounding weights is not free.
    assert 40 < small.parity["worst"]["compression.picture"]["value"] < 120
    assert small.parity["worst"]["lowering.component"]["value"] >= 100

    def weights(manifest: fewstep.Manifest, root: Path) -> int:
        models = [ir.load(root / a.path) for a in manifest.artifacts]
        return sum(v.const_value.nbytes for m in models for v in m.graph.initializers.values() if v.const_value)

    ratio = weights(small, built("lcm", "fp16").bundle.path) / weights(large, built("lcm").bundle.path)
    assert ratio < 0.6  # biases and other small tensors stay as they are


def test_report_and_golden_pack_are_in_the_bundle() -> None:
    bundle = built("lcm").bundle
    page = (bundle.path / "report" / "index.html").read_text(encoding="utf-8")
    assert "verified" in page
    assert json.loads((bundle.path / "report" / "parity.json").read_text())["passed"]
    assert json.loads((bundle.path / "report" / "profile.json").read_text())[0]["picture"]["median_ms"] > 0
    assert sorted(p.name for p in (bundle.path / "golden").iterdir())[0] == "000.safetensors"


def test_second_build_takes_everything_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lcm = built("lcm")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("fewstep.runtimes.onnxruntime.compile.lower.lower", refuse)
    monkeypatch.setattr("fewstep.calibration.record_samples", refuse)
    again = fewstep.build(str(lcm.source), out=tmp_path / "again", steps=STEPS, options=lcm.options)
    first = {a.component: lcm.bundle.manifest.files[a.path].sha256 for a in lcm.bundle.manifest.artifacts}
    assert {a.component: again.manifest.files[a.path].sha256 for a in again.manifest.artifacts} == first


def test_interrupted_build_leaves_nothing_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lcm = built("lcm")
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    out = tmp_path / "out" / "bundle"

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # `fewstep.pipeline.verify` is the function of that name.
        patch.setattr(sys.modules["fewstep.pipeline.verify"], "compare_components", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fewstep.build(str(lcm.source), out=out, steps=[1], options=options)
    assert list(out.parent.iterdir()) == []
    assert len(list((tmp_path / "cache" / "compile").iterdir())) == 4

    monkeypatch.setattr("fewstep.runtimes.onnxruntime.compile.lower.lower", interrupt)  # nothing is compiled twice,
    monkeypatch.setattr("fewstep.calibration.record_samples", interrupt)  # nor drawn by the reference
    bundle = fewstep.build(str(lcm.source), out=out, steps=[1], options=options)
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity["passed"]


def test_failed_parity_writes_no_bundle_but_keeps_the_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lcm = built("lcm")
    recipe = fewstep.Recipe("strict", limits=fewstep.Limits(component_sqnr_db=500.0))
    options = fewstep.Options(prompts=1, seeds=1, cache_root=lcm.options.cache_root, profile=False)
    with pytest.raises(fewstep.FewstepError, match="no bundle was written") as caught:
        fewstep.build(str(lcm.source), recipe, out=tmp_path / "b", steps=[1], options=options)
    assert caught.value.exit_status == 1
    assert not (tmp_path / "b").exists()
    assert "failed" in (tmp_path / "b.failed" / "report" / "index.html").read_text(encoding="utf-8")


def test_module_function_as_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_generator.py").write_text(
        "from pathlib import Path\n"
        "from fewstep.export.source.load import from_folder\n"
        f"def make():\n    return from_folder(Path({str(built('lcm').source)!r}))\n"
    )
    bundle = fewstep.build(
        "my_generator:make", out=tmp_path / "bundle", steps=[1], options=built("lcm").options, guidance=2.0
    )
    assert bundle.manifest.contract.guidance.scale == 2.0


def test_a_bundle_moves(tmp_path: Path, copy_bundle: Callable[[str], Path]) -> None:
    moved = tmp_path / "elsewhere" / "bundle"
    moved.parent.mkdir()
    shutil.move(copy_bundle("lcm"), moved)
    picture = fewstep.Bundle.open(moved).generate("cat", seed=1).picture_HWC
    assert np.array_equal(picture, built("lcm").bundle.generate("cat", seed=1).picture_HWC)


def test_a_bundle_runs_where_torch_is_not_installed() -> None:
    code = """
import sys
for name in ("torch", "diffusers", "transformers", "accelerate", "onnx", "onnxscript"):
    sys.modules[name] = None  # import raises ModuleNotFoundError, find_spec finds nothing
import fewstep
bundle = fewstep.Bundle.open(sys.argv[1])
assert bundle.generate("cat", seed=1).picture_HWC.std() > 0.01
result = fewstep.verify(bundle)
assert result.report and "golden pack" in result.report.reference, result.report.reference
assert "torch is not installed" in result.caveats[0], result.caveats
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(built("lcm").bundle.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

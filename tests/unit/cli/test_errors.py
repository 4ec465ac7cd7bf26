"""Bad input: what the command line says, the status it ends with, and that nothing is left half-written."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 - to show that nothing unpickles
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.bundle.bundle import write_seal
from fewstep.cli import machines
from fewstep.errors import ExportError
from fewstep.export import describe, load
from fewstep.pipeline.selftest import Trial
from tests.support.bundles import built
from tests.support.command import Run, refused


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny checkpoint to spoil."""
    return shutil.copytree(built("lcm").source, tmp_path / "source")


def test_missing_component(run: Run, source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "unet")
    assert "component unet (UNet2DConditionModel) is missing, expected folder unet/" in refused(run, source, tmp_path)


def test_missing_weights(run: Run, source: Path, tmp_path: Path) -> None:
    (source / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "unet has no weights, expected a safetensors file" in refused(run, source, tmp_path)


def test_unknown_scheduler(run: Run, source: Path, tmp_path: Path) -> None:
    index = json.loads((source / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "WarpScheduler"]
    (source / "model_index.json").write_text(json.dumps(index))
    assert "unknown class 'WarpScheduler' for scheduler" in refused(run, source, tmp_path)


def test_scheduler_that_is_no_table(run: Run, source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "scheduler" / "scheduler_config.json").read_text())
    (source / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "thresholding": True}))
    assert "threshold" in refused(run, source, tmp_path)


def test_prediction_type_that_diffusers_does_not_know(run: Run, source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "scheduler" / "scheduler_config.json").read_text())
    (source / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "prediction_type": "warp"}))
    text = refused(run, source, tmp_path)
    assert "LatentConsistencyModelPipeline refuses 4 steps with these settings: prediction_type given as warp" in text
    assert "hint: the pipeline itself says so: change its scheduler's configuration" in text


@pytest.mark.parametrize(
    ("options", "text", "hint"),
    [
        ({"height": 18}, "`height` and `width` have to be divisible by 8 but are 18", "the pipeline itself says so"),
        ({"heigth": 16}, "LatentConsistencyModelPipeline takes no option 'heigth'", "did you mean 'height'?"),
    ],
    ids=["size", "name"],
)
def test_options_that_the_pipeline_refuses(source: Path, options: dict[str, int], text: str, hint: str) -> None:
    generator = replace(load(str(source)), options=options)
    with pytest.raises(ExportError) as caught:
        describe(generator, [1])
    assert text in caught.value.message
    assert hint in str(caught.value.hint)


def test_more_steps_than_the_scheduler_has(run: Run, source: Path, tmp_path: Path) -> None:
    text = refused(run, source, tmp_path, "--steps", "60")
    assert "refuses 60 steps with these settings: The combination of `original_steps x strength`" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "float32"}, "step is int64 [1], expected float32 [1]"),
        ({"shape": [2]}, "step is int64 [1], expected int64 [2]"),
        ({"name": "time"}, "the manifest has ['sample', 'condition_0'"),
    ],
    ids=["dtype", "shape", "name"],
)
def test_manifest_that_says_another_step(
    run: Run, copy_bundle: Callable[[str], Path], change: dict[str, object], text: str
) -> None:
    folder = copy_bundle("lcm")
    manifest = json.loads((folder / "manifest.json").read_text())
    denoiser = manifest["components"]["denoiser"]
    (step,) = (spec for spec in denoiser["inputs"] if spec["name"] == "step")
    step.update(change)
    if "name" in change:
        denoiser["bindings"]["time"] = denoiser["bindings"].pop("step")
    # The golden pack would say so first.
    manifest["files"] = {path: entry for path, entry in manifest["files"].items() if not path.startswith("golden/")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_seal(folder)
    said = generate(run, folder)
    assert text in said
    assert "hint: " in said


def test_pickle_only_weights(run: Run, source: Path, tmp_path: Path) -> None:
    weights = source / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    marker = tmp_path / "unpickled"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    weights.with_suffix(".bin").write_bytes(pickle.dumps(Trap()))
    text = refused(run, source, tmp_path)
    assert "weights only as a pickle (diffusion_pytorch_model.bin), expected safetensors" in text
    assert not marker.exists()


def test_truncated_safetensors(run: Run, source: Path, tmp_path: Path) -> None:
    weights = source / "unet" / "diffusion_pytorch_model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size - 100)
    assert f"has {size - 100} bytes, expected {size}" in refused(run, source, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 1 << 60) + b"{", struct.pack("<Q", 4) + b"!!!!"])
def test_broken_safetensors_header(run: Run, source: Path, tmp_path: Path, content: bytes) -> None:
    (source / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    assert "is not a safetensors file: its header cannot be read" in refused(run, source, tmp_path)


def test_not_a_source(run: Run, tmp_path: Path) -> None:
    assert "is not a folder, a .safetensors file, a hub id (owner/name)" in refused(run, tmp_path / "nothing", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "has no model_index.json, expected a diffusers folder" in refused(run, tmp_path / "empty", tmp_path)
    assert "cannot import nowhere:make" in refused(run, "nowhere:make", tmp_path)
    assert "returned str, expected a fewstep.export.Generator" in refused(run, "os:getcwd", tmp_path)


def test_hub_without_a_network(run: Run, tmp_path: Path) -> None:
    text = refused(run, "someone/something", tmp_path)
    assert "someone/something is not in the local cache of the hub, and HF_HUB_OFFLINE forbids to download it" in text


def test_unknown_recipe(run: Run, source: Path, tmp_path: Path) -> None:
    text = refused(run, source, tmp_path, "--recipe", "fp61")
    quantizing = "w8, w8a8, w8a8-dynamic, w4, w4a8, mixed"
    presets = f"fp32, fp16, {quantizing}, palette8, palette6, palette4, palette2, palette-mixed"
    assert f"unknown recipe 'fp61', expected one of {presets} or a .toml file" in text
    assert "did you mean 'fp16'?" in text


def test_unknown_recipe_key(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('weigths = "fp16"\n')
    text = refused(run, source, tmp_path, "--recipe", str(tmp_path / "mine.toml"))
    assert "mine.toml: unknown key 'weigths'" in text
    assert "did you mean 'weights'?" in text


def test_unknown_runtime(run: Run, source: Path, tmp_path: Path) -> None:
    assert "unknown runtime 'abacus', expected one of onnxruntime" in refused(
        run, source, tmp_path, "--target", "abacus"
    )


def test_out_that_is_something_else(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    status, _, stderr = run("build", source, "-o", tmp_path / "notes")
    assert status == 2
    assert "exists and is not a bundle" in " ".join(stderr.split())
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep me"


def test_unwritable_out(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, stderr = run("build", source, "-o", tmp_path / "file" / "bundle")
    assert status == 2
    assert "cannot write to" in stderr
    assert "choose another -o folder" in stderr


@pytest.mark.parametrize("steps", ["0", "65", "two", "1,-2"])
def test_step_counts_that_are_none(run: Run, source: Path, tmp_path: Path, steps: str) -> None:
    status, _, stderr = run("build", source, "-o", tmp_path / "bundle", "--steps", steps)
    assert status == 2
    assert "step count" in stderr


def generate(run: Run, bundle: Path, *options: str) -> str:
    """Generates, expects exit status 2 and no picture, and returns what was said."""
    picture = bundle.parent / "picture.png"
    status, _, stderr = run("generate", bundle, "cat", "-o", picture, *options)
    assert status == 2, stderr
    assert not picture.exists()
    return " ".join(stderr.split())


def test_altered_file(run: Run, copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("lcm")
    model = folder / "onnxruntime" / "unet" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    text = generate(run, folder)
    assert "onnxruntime/unet/model.onnx has sha256" in text
    assert "hint: the file was altered" in text


def test_truncated_and_missing_file(run: Run, copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("lcm")
    model = folder / "onnxruntime" / "unet" / "model.onnx"
    os.truncate(model, 1000)
    assert "onnxruntime/unet/model.onnx has 1000 bytes, expected" in generate(run, folder)
    model.unlink()
    assert "onnxruntime/unet/model.onnx is missing" in generate(run, folder)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "golden/../../outside", "C:\\outside"])
@pytest.mark.parametrize("place", ["files", "tokenizer", "artifact"])
def test_path_that_leaves_the_bundle(run: Run, copy_bundle: Callable[[str], Path], path: str, place: str) -> None:
    folder = copy_bundle("lcm")
    (folder.parent / "outside").write_text("secret")
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["files"]["onnxruntime/unet/model.onnx"]
    if place == "tokenizer":
        manifest["tokenizers"]["tokenizer"]["folder"] = path
    else:
        manifest["files"][path] = entry
    if place == "artifact":
        manifest["artifacts"][0]["path"] = path
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_seal(folder)
    assert "leaves the bundle, expected a relative path inside it" in generate(run, folder)


def test_link_that_leaves_the_bundle(run: Run, copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("lcm")
    model = folder / "onnxruntime" / "unet" / "model.onnx"
    model.rename(folder.parent / "model.onnx")
    model.symlink_to(folder.parent / "model.onnx")
    assert "leaves the bundle" in generate(run, folder)


def test_manifest_that_is_none(run: Run, copy_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_bundle("lcm")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema_version": 99}))
    assert "manifest.json has sha256" in generate(run, folder)
    write_seal(folder)
    assert "has schema version 99, expected 1" in generate(run, folder)
    path.write_text(json.dumps({**manifest, "default_steps": "four"}))
    write_seal(folder)
    assert "default_steps: 'four' is not of type 'integer'" in generate(run, folder)
    path.write_text("{")
    write_seal(folder)
    assert "manifest.json is not JSON" in generate(run, folder)
    path.unlink()
    assert "is not a bundle: cannot read manifest.json" in generate(run, folder)


def test_step_count_that_the_bundle_lacks(run: Run, copy_bundle: Callable[[str], Path]) -> None:
    assert "bundle has no schedule for 3 steps, it has 1, 2, 4" in generate(run, copy_bundle("lcm"), "--steps", "3")


def test_generate_needs_a_prompt_or_grid(run: Run, tmp_path: Path) -> None:
    status, _, stderr = run("generate", built("lcm").bundle.path, "-o", tmp_path / "x.png")
    assert status == 2
    assert "give a PROMPT or --grid" in stderr


def test_parity_failure_is_status_1(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "strict.toml").write_text("steps = [1]\n[limits]\ncomponent_sqnr_db = 500\n")
    out = tmp_path / "out" / "bundle"
    status, _, stderr = run(
        "build", source, "-o", out, "--recipe", tmp_path / "strict.toml", "--prompts", "1", "--seeds", "1"
    )
    assert status == 1
    assert "no bundle was written" in " ".join(stderr.split())
    assert not out.exists()


def test_results_on_stdout_are_json_alone(run: Run, tmp_path: Path) -> None:
    bundle = built("lcm").bundle.path
    status, stdout, _ = run("generate", bundle, "cat", "--seed", "3", "-o", tmp_path / "cat.png", "--json")
    assert status == 0
    assert json.loads(stdout) == {"picture": str(tmp_path / "cat.png"), "prompts": ["cat"], "seed": 3, "steps": 4}
    status, stdout, _ = run("verify", bundle, "--prompts", "1", "--seeds", "1", "--json")
    assert status == 0
    assert json.loads(stdout)["passed"] is True
    status, stdout, _ = run("runtimes", "--json")
    assert status == 0
    assert json.loads(stdout)["runtimes"][0]["runtime"] == "onnxruntime"
    status, stdout, _ = run("profile", bundle, "--runs", "3", "--json")
    assert status == 0
    assert json.loads(stdout)["picture"]["median_ms"] > 0
    status, stdout, _ = run("inspect", bundle, "--json")
    assert status == 0
    assert json.loads(stdout)["contract"]["latent_shape"] == [4, 8, 8]


def test_a_command_that_finds_a_departure_exits_with_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("fp32", 0, "", "picture is below its limit")
    monkeypatch.setattr(machines, "self_test", lambda name, progress: [trial])
    status, stdout, _ = run("runtimes", "--self-test", "onnxruntime")
    assert status == 1
    assert "FAILED  onnxruntime fp32: picture is below its limit" in stdout


def test_single_stages(run: Run, source: Path, tmp_path: Path) -> None:
    status, stdout, stderr = run("export", source, "--steps", "1", "-o", tmp_path / "export")
    assert status == 0, stderr
    assert (tmp_path / "export" / "denoiser.pt2").is_file()
    status, stdout, stderr = run(
        "calibrate", source, "--steps", "2", "--prompts", "1", "--seeds", "2", "-o", tmp_path / "feeds"
    )
    assert status == 0, stderr
    assert len(stdout.splitlines()) == 2
    assert "all 2 steps of 2 trajectories" in stderr
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na house\n")
    given = "--steps", "2", "--prompts", prompts, "--seeds", "1", "--sampler", "uniform", "-o", tmp_path / "feeds"
    status, stdout, stderr = run("calibrate", source, *given)
    assert status == 0, stderr
    assert len(stdout.splitlines()) == 6
    assert "one step of each of 6 trajectories" in stderr
    status, stdout, stderr = run("optimize", source, "--recipe", "fp16", "-o", tmp_path / "optimized")
    assert status == 0, stderr
    assert (tmp_path / "optimized" / "model_index.json").is_file()
    status, stdout, stderr = run("compile", source, "--steps", "1", "-o", tmp_path / "compiled")
    assert status == 0, stderr
    assert "not verified" in stderr
    assert len(stdout.splitlines()) == 4
    # Steps that are not the generator's default, which the calibration has to follow.
    status, stdout, stderr = run("compile", source, "--steps", "1", "--recipe", "w8a8", "-o", tmp_path / "integers")
    assert status == 0, stderr
    assert len(stdout.splitlines()) == 4
    assert (tmp_path / "integers" / "quantization" / "plan.json").is_file()


@pytest.mark.parametrize("command", ["export", "calibrate", "optimize", "compile"])
def test_single_stage_leaves_nothing_half_written(run: Run, source: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "stage" / "out"
    shutil.rmtree(source / "unet")
    status, _, stderr = run(command, source, "-o", out)
    assert status == 2
    assert "component unet" in stderr
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    (out / "mine").mkdir(parents=True)
    status, _, stderr = run(command, source, "-o", out)
    assert status == 2
    assert "exists and is not empty, expected a new folder" in " ".join(stderr.split())
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_profile_refuses_what_the_bundle_lacks(run: Run) -> None:
    bundle = built("lcm").bundle.path
    status, stdout, stderr = run("profile", bundle, "--steps", "3")
    assert (status, stdout) == (2, "")
    assert "bundle has no schedule for 3 steps, it has 1, 2, 4" in " ".join(stderr.split())
    status, _, stderr = run("profile", bundle, "--runtime", "coreml")
    assert status == 2
    assert "bundle has no denoiser for runtime 'coreml'" in " ".join(stderr.split())


def test_what_a_library_raises_of_no_file_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(name: str, *, progress: object) -> list[Trial]:
        raise OSError("could not get source code")

    monkeypatch.setattr(machines, "self_test", raises)
    status, stdout, stderr = run("runtimes", "--self-test", "onnxruntime")
    assert (status, stdout) == (2, "")
    assert stderr.strip().startswith("error: could not get source code\n\nhint: ")

"""What a bundle is trusted with: its files are those that its maker signed, and nothing that it names is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fewstep
from fewstep.bundle import seal
from fewstep.bundle.bundle import Bundle, write_manifest, write_seal
from fewstep.bundle.manifest import Manifest
from fewstep.bundle.source import SourceInfo, SourceSpec
from fewstep.errors import BundleError, SourceError
from fewstep.export import load
from fewstep.export.source.load import missing
from fewstep.pipeline.references import load_original, usable_source
from fewstep.progress import Silent
from tests.support.bundles import built, plain
from tests.support.command import Run

# --- files ------------------------------------------------------------------------------------------------------------


def test_the_manifest_has_a_hash_of_its_own(copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("lcm")
    done = subprocess.run(["sha256sum", "-c", "bundle.sha256"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout == "manifest.json: OK\n", done.stderr
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"default_steps": 4', '"default_steps": 2'))
    with pytest.raises(BundleError, match=r"manifest\.json has sha256"):
        Bundle.open(folder)
    (folder / "bundle.sha256").unlink()
    with pytest.raises(BundleError, match=r"has no bundle\.sha256 that can be read"):
        Bundle.open(folder)


def test_unlisted_files_are_told_and_not_verified(run: Run, copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("lcm")
    (folder / "golden" / "x.safetensors").write_bytes(b"")
    (folder / ".DS_Store").write_bytes(b"")
    (folder / "onnxruntime" / "link").symlink_to("/etc")
    assert Bundle.open(folder).unlisted() == (".DS_Store", "golden/x.safetensors", "onnxruntime/link")
    for command in ("inspect", "verify"):
        status, _, said = run(command, folder)
        assert status == 2
        assert "has '.DS_Store' and 2 more, which its manifest does not list" in " ".join(said.split())
    with pytest.raises(BundleError, match="does not list"):
        fewstep.verify(Bundle.open(folder))


@pytest.mark.parametrize("kind", ["link", "circle", "pipe", "folder"])
@pytest.mark.parametrize("name", ["manifest.json", "bundle.sha256", "onnxruntime/unet/model.onnx"])
def test_what_is_no_plain_file(copy_bundle: Callable[[str], Path], name: str, kind: str) -> None:
    folder = copy_bundle("lcm")
    path = folder / name
    path.rename(folder / "other")
    if kind == "link":
        path.symlink_to(folder / "other")
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    if kind == "link" and name != "onnxruntime/unet/model.onnx":
        return  # what is read there is checked by its content
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert caught.value.hint


def test_a_golden_pack_of_other_shapes(copy_bundle: Callable[[str], Path]) -> None:
    folder = copy_bundle("lcm")
    manifest = Bundle.open(folder).manifest
    values = manifest.to_json()
    values["contract"]["latent_shape"] = [4, 4, 16]  # as many values as before
    (folder / "manifest.json").write_text(json.dumps(values))
    write_seal(folder)
    with pytest.raises(
        BundleError, match=r"latents/0 is float32 \[1, 4, 8, 8\], the manifest says float32 \[1, 4, 4, 16\]"
    ):
        Bundle.open(folder)


def test_without_a_golden_pack_sizes_are_small(tmp_path: Path) -> None:
    bundle = plain()
    values = json.loads((bundle.path / "manifest.json").read_text())
    grown = json.loads(json.dumps(values).replace("8, 12]", "8192, 8192]"))
    grown["files"] = {path: entry for path, entry in grown["files"].items() if not path.startswith("golden/")}
    from fewstep.bundle.golden_headers import check_golden

    with pytest.raises(BundleError, match="the latent has 201326592 values, and the bundle has no golden sample"):
        check_golden(bundle.path, Manifest.from_json(grown, where="m"))


# --- signatures -------------------------------------------------------------------------------------------------------


def test_sign_and_verify(run: Run, copy_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_bundle("lcm")
    for name in ("mine", "other"):
        assert run("keygen", tmp_path / name)[0] == 0
    assert (tmp_path / "mine").stat().st_mode & 0o077 == 0
    said = run("keygen", tmp_path / "mine")
    assert said[0] == 2 and "keys are not overwritten" in said[2]
    assert "is not signed: it has no bundle.sig" in run("verify", folder, "--key", tmp_path / "mine.pub")[2]
    status, out, _ = run("sign", folder, "--key", tmp_path / "mine")
    public = out.split()[-1]
    assert status == 0 and len(public) == 64
    assert seal.check_signature(folder, tmp_path / "mine.pub") == public
    with pytest.raises(BundleError, match="its signature is not by the key"):
        seal.check_signature(folder, tmp_path / "other.pub")
    (tmp_path / "hex").write_text(public)
    assert seal.check_signature(folder, tmp_path / "hex") == public == seal.signer(folder)
    write_manifest(folder, replace(Bundle.open(folder).manifest, name="another"))
    assert seal.signer(folder) is None, "a signature of another manifest is left behind"


@pytest.mark.parametrize(
    "content", ["", "{}", "[" * 100_000, '{"algorithm": "none", "public_key": "", "signature": ""}']
)
def test_signatures_that_are_none(copy_bundle: Callable[[str], Path], tmp_path: Path, content: str) -> None:
    folder = copy_bundle("lcm")
    public = seal.make_keys(tmp_path / "key")
    (folder / "bundle.sig").write_text(content)
    with pytest.raises(BundleError) as caught:
        seal.check_signature(folder, public)
    assert caught.value.hint
    with pytest.raises(BundleError, match="private key"):
        seal.sign(folder, public)
    with pytest.raises(BundleError, match="public key"):
        seal.check_signature(folder, tmp_path / "key")


# --- code -------------------------------------------------------------------------------------------------------------


def _named(uri: str, kind: str, **more: Any) -> SourceInfo:
    return SourceInfo(uri, kind, "0" * 64, **more)


@pytest.mark.parametrize("kind", ["function", "diffusers", "single-file", "hub", "built-in", "python", "code", ""])
def test_a_manifest_names_no_code_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy_bundle: Callable[[str], Path], kind: str
) -> None:
    (tmp_path / "named.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef make(): raise SystemExit(0)\n")
    (tmp_path / "named:make").mkdir()  # a folder of this name must not make a function of it, nor a function a folder
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = copy_bundle("lcm")
    manifest = Bundle.open(folder).manifest
    write_manifest(folder, replace(manifest, source=_named("named:make", kind)))
    bundle = Bundle.open(folder)
    source, reason = usable_source(bundle, None)
    if source is not None:
        with pytest.raises(SourceError):
            load_original(bundle, source, Silent())
    elif kind == "function":
        assert "runs only if you name it: --against named:make" in reason
    with pytest.raises(SourceError, match=r"not loaded for a bundle's sake|model_index\.json|not a file"):
        load(bundle.manifest.source.spec())
    assert not (tmp_path / "ran").exists() and "named" not in sys.modules


def test_a_function_is_compared_with_the_golden_pack_and_run_when_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "from fewstep.export.source.load import from_folder\n"
        f"def make():\n    return from_folder(Path({str(built('lcm').source)!r}))\n"
    )
    lcm = built("lcm")
    bundle = fewstep.build("mine:make", out=tmp_path / "bundle", steps=[2], options=replace(lcm.options, profile=False))
    assert (bundle.manifest.source.uri, bundle.manifest.source.kind) == ("mine:make", "function")
    del sys.modules["mine"]
    result = fewstep.verify(bundle)
    assert result.report and "mine" not in sys.modules
    assert "which runs only if you name it: --against mine:make" in result.caveats[0]
    assert "run now" in fewstep.verify(bundle, against="mine:make", prompts=1, seeds=1).report.reference


def test_what_a_manifest_may_have_loaded() -> None:
    assert missing(_named("stickers", "built-in")) is None
    assert missing(_named("fewstep.stickers:generator", "built-in")) is not None
    assert missing(_named(str(built("lcm").source), "diffusers")) is None
    loaded = load(SourceSpec("stickers", kind="built-in"))
    assert loaded.name == "stickers"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": ["pipeline", "Custom"]}, "_class_name is \"['pipeline', 'Custom']\""),
        ({"unet": ["named", "Custom"]}, "is of the library 'named', expected diffusers or transformers"),
        ({"unet": ["os", "system"]}, "is of the library 'os'"),
        ({"unet": ["diffusers", "UNet2DConditionModel", "x"]}, "expected a library and a class"),
        ({"unet": ["diffusers", 7]}, "expected a library and a class"),
        ({"../unet": ["diffusers", "UNet2DConditionModel"]}, "has no name that a folder of it can have"),
    ],
)
def test_a_source_names_no_code_either(source: Path, change: dict[str, Any], said: str) -> None:
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(SourceError) as caught:
        load(str(source))
    assert said in caught.value.message
    assert caught.value.hint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny checkpoint to spoil."""
    import shutil

    return shutil.copytree(built("lcm").source, tmp_path / "source")


def test_code_beside_a_component(source: Path) -> None:
    (source / "unet" / "diffusers.py").write_text("raise SystemExit(0)")
    with pytest.raises(SourceError, match=r"comes with code, unet/diffusers\.py"):
        load(str(source))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "unet" / "x.json").symlink_to("nowhere"), "is a link that leads nowhere"),
        (lambda f: (f / "unet" / "x.json").symlink_to("x.json"), "is a link that leads nowhere"),
        (lambda f: (f / "unet" / "inner").symlink_to(f), "is a link to a folder that it is in itself"),
        (lambda f: os.mkfifo(f / "unet" / "x.safetensors"), "is neither a file nor a folder"),
        (lambda f: _config(f, num_train_timesteps=10**12), "num_train_timesteps is 1000000000000, expected at most"),
        (lambda f: (f / "unet" / "config.json").write_text("[" * 100_000), "nested deeper than 64"),
        (lambda f: (f / "unet" / "config.json").write_text("[]"), "is not a table of names and values"),
        (lambda f: (f / "model_index.json").write_text('{"a": 1, "a": 2}'), "'a' is there twice"),
        (lambda f: _config(f, beta_schedule="moon"), "diffusers cannot load it: moon is not implemented for"),
    ],
    ids=["dead link", "circle", "folder in itself", "pipe", "huge", "deep", "list", "twice", "rejected"],
)
def test_sources_that_are_refused(source: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(source)
    with pytest.raises(SourceError) as caught:
        load(str(source))
    assert said in caught.value.message
    assert caught.value.hint


def _config(folder: Path, **changes: object) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

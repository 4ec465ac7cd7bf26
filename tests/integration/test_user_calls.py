"""The level call: a bundle against the untouched pipeline; what makes it fail, and what it says when it cannot run."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import fewstep
from fewstep.bundle.bundle import Bundle
from fewstep.bundle.contract import Contract
from fewstep.bundle.manifest import Manifest
from fewstep.bundle.source import SourceSpec
from fewstep.errors import SourceError
from fewstep.export import describe, load, write_tokenizers
from fewstep.proof import user_process
from fewstep.proof.user_calls import CALL, WHOLE, Told, UserCalls, compare_calls, source_of
from fewstep.proof.user_process import Asked
from fewstep.recipe.recipe import Limits
from fewstep.runtimes.parity.harness import Check
from fewstep.text.probe_texts import odd_texts
from fewstep.untouched.request import Answer, Request, Source, UserCall
from tests.support import loras, tiny
from tests.support.bundles import built, plain, plain_generator
from tests.support.zoo.unets import euler, sdxl

TOKENIZER = "tokenizer"
Change = Callable[[Manifest], Manifest]


def told(manifest: Manifest) -> Told:
    return Told(manifest.contract, manifest.default_steps, tuple(manifest.schedules))


@functools.cache
def asked(kind: str) -> tuple[Request, Answer]:
    """Returns what the untouched pipeline of a tiny folder answers; several tests compare with it."""
    it = built(kind)
    request = told(it.bundle.manifest).request(source_of(SourceSpec(str(it.source))))
    with closing(Asked(request)) as running:
        return request, running.answer()


def checks_of(kind: str, change: Change | None = None, *, changed: bool = False) -> list[Check]:
    """Returns the checks of a tiny bundle, spoilt or not, against its untouched pipeline."""
    bundle = built(kind).bundle
    manifest = bundle.manifest if change is None else change(bundle.manifest)
    return compare_calls(Bundle(bundle.path, manifest), ("onnxruntime",), *asked(kind), Limits(), changed=changed)


def failing(checks: list[Check]) -> set[str]:
    return {check.tensor or str(check.sample).partition(",")[0] for check in checks if not check.passed}


def checks_against(kind: str, source: str) -> tuple[list[Check], list[str]]:
    """Returns checks and notes of a tiny bundle against another source, with few texts."""
    bundle = built(kind).bundle
    with closing(UserCalls.of(SourceSpec(source), told(bundle.manifest))) as calls:
        return calls.checks(bundle, ("onnxruntime",), Limits(), changed=False)


def test_a_right_bundle_passes_every_call() -> None:
    checks = checks_of("lcm")
    assert not failing(checks)
    assert {check.level for check in checks} == {CALL}
    names = {str(check.sample).partition(",")[0] for check in checks if check.metric == "PSNR dB"}
    assert names == {"default", "capitals", "over-long", "guidance 1", "guidance 2.5"}
    texts = {check.tensor: check.sample for check in checks if check.component == TOKENIZER}
    assert texts == {"token ids": f"{len(odd_texts())} texts", "masks": f"{len(odd_texts())} texts"}


def test_a_build_and_a_live_verification_have_the_level() -> None:
    lcm = built("lcm").bundle
    assert lcm.manifest.parity is not None
    assert lcm.manifest.parity["worst"]["lowering.call"]["passed"]
    assert "call" in {check.level for check in fewstep.verify(lcm, prompts=1, seeds=1).report.checks}


def test_the_process_imports_nothing_of_the_compiler() -> None:
    _, answer = asked("lcm")
    assert "fewstep.untouched.calling" in answer.modules
    assert not [name for name in answer.modules if name.startswith(("fewstep.export", "fewstep.calibration"))]


def _tokenizer(**changes: Any) -> Change:
    def change(manifest: Manifest) -> Manifest:
        tokenizers = {name: replace(spec, **changes) for name, spec in manifest.tokenizers.items()}
        return replace(manifest, tokenizers=tokenizers)

    return change


def _contract(change: Callable[[Contract], Contract]) -> Change:
    return lambda manifest: replace(manifest, contract=change(manifest.contract))


def _guidance(**changes: Any) -> Change:
    return _contract(lambda contract: replace(contract, guidance=replace(contract.guidance, **changes)))


IMAGES = {"default", "capitals", "over-long", "guidance 1", "guidance 2.5"}


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        pytest.param(_tokenizer(prefix="a photo of "), {"token ids", "masks", *IMAGES}, id="text around the prompt"),
        # Every prompt of an image fills the tiny encoder's 16 tokens: only the ids of shorter texts can tell.
        pytest.param(_tokenizer(pad_id=0), {"token ids"}, id="padding"),
        pytest.param(_tokenizer(padding_side="left"), {"token ids", "masks"}, id="side of the padding"),
        pytest.param(_guidance(factor=0.0), IMAGES - {"guidance 1"}, id="a scale that is compiled in: 1"),
        pytest.param(_guidance(factor=1010.0), IMAGES - {"guidance 1"}, id="embedding of the scale"),
        pytest.param(_contract(lambda c: replace(c, latent_scale=1.05 * c.latent_scale)), IMAGES, id="latent scale"),
    ],
)
def test_a_spoilt_manifest_fails(change: Change, fails: set[str]) -> None:
    assert failing(checks_of("lcm", change)) == fails


def test_other_weights_than_the_files_fail(tmp_path: Path) -> None:
    checks, _ = checks_against("lcm", str(tiny.lcm_folder(tmp_path / "other", seed=1)))
    assert failing(checks) == IMAGES


def test_files_of_a_variant_alone_are_loaded_as_their_user_does(tmp_path: Path) -> None:
    source = Path(shutil.copytree(built("lcm").source, tmp_path / "halves"))
    for path in source.rglob("*.safetensors"):
        path.rename(path.with_suffix(f".fp16{path.suffix}"))
    checks, notes = checks_against("lcm", str(source))
    assert checks
    assert not failing(checks)
    assert notes == []


def test_what_python_changed_since_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"""
from fewstep.export import describe, load, write_tokenizers

def make():
    generator = load({str(built("lcm").source)!r})
    generator.pipeline.vae.register_to_config(scaling_factor=2.0)
    return generator
"""
    (tmp_path / "changed_since.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    checks, notes = checks_against("lcm", "changed_since:make")
    assert failing(checks) == IMAGES
    assert notes == []


def test_a_function_that_returns_another_generator_each_time_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"""
import torch
from fewstep.export import load

def make():
    generator = load({str(built("lcm").source)!r})
    with torch.no_grad():
        generator.pipeline.unet.conv_in.bias += torch.randn(generator.pipeline.unet.conv_in.bias.shape)
    return generator
"""
    (tmp_path / "unseeded.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SourceError, match="unseeded:make returns another generator each time it is called") as caught:
        checks_against("lcm", "unseeded:make")
    assert "torch.manual_seed" in str(caught.value.hint)


def test_a_process_that_dies_is_a_failure_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text("def make():\n    raise SystemExit('no more')\n")
    monkeypatch.syspath_prepend(tmp_path)
    checks, notes = checks_against("lcm", "dying:make")
    assert [(check.metric, check.passed) for check in checks] == [("calls made", False)]
    assert "no more" in notes[0]


def test_a_call_that_the_pipeline_refuses_fails_in_its_words() -> None:
    request, _ = asked("lcm")
    refused = replace(request, calls=(UserCall("default", "cat", 1000, 7),), texts=())
    with closing(Asked(refused)) as running:
        answer = running.answer()
    assert isinstance(answer.outputs[0], str)
    assert answer.outputs[0].startswith("ValueError: ")


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    it = built("lcm")
    little = type("Memory", (), {"available": 1 << 20})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    checks, notes = checks_against("lcm", str(it.source))
    assert checks == []
    assert "not compared with the untouched pipeline" in notes[0]
    assert "1 MiB are free" in notes[0]


def test_a_generator_of_python_is_called_here_and_says_so() -> None:
    bundle = plain()
    assert any("process of the compiler" in caveat for caveat in bundle.manifest.caveats)
    with closing(UserCalls.of(plain_generator(), told(bundle.manifest))) as calls:
        checks, notes = calls.checks(bundle, ("onnxruntime",), Limits(), changed=False)
    assert [check.sample for check in checks] == ["default, 2 steps"]
    assert not failing(checks)
    assert "process of the compiler" in notes[0]


def test_a_changed_network_is_held_to_its_recipes_limit() -> None:
    checks = checks_of("lcm", changed=True)
    images = [check for check in checks if check.component == "picture"]
    assert {check.error for check in images} == {WHOLE}
    assert [check.metric for check in images if check.limit is not None] == ["mean PSNR dB"]
    assert all(check.limit == 1.0 for check in checks if check.component == TOKENIZER)


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="diffusers merges LoRAs by itself with peft")
def test_loras_without_peft_say_that_the_loader_merged_them(tmp_path: Path) -> None:
    it = built("lcm")
    unet = load(str(it.source)).pipeline.unet
    found = loras.branches(unet, loras.UNET_MODULES, rank=3, alpha=2.0, seed=0)
    lora = fewstep.Lora(str(loras.write(tmp_path / "lora.safetensors", "bare", found)), 0.7)
    with closing(UserCalls.of(SourceSpec(str(it.source), loras=(lora,)), told(it.bundle.manifest))) as calls:
        checks, notes = calls.checks(it.bundle, ("onnxruntime",), Limits(), changed=False)
    assert failing(checks) == IMAGES  # the bundle is without it
    assert any("fewstep's own loader" in note and "peft" in note for note in notes)


def test_request_and_answer_survive_their_files(tmp_path: Path) -> None:
    request, answer = asked("lcm")
    request.save(tmp_path)
    answer.save(tmp_path)
    again = Request.load(tmp_path)
    assert replace(again, given={}) == replace(request, given={})
    assert isinstance(again.source, Source)
    found = Answer.load(tmp_path)
    assert [read.ids.tolist() for read in found.reads[3]] == [read.ids.tolist() for read in answer.reads[3]]


def test_a_generator_of_a_folder_that_python_changed_is_what_is_called() -> None:
    it = built("lcm")
    generator = load(str(it.source))
    generator.pipeline.vae.register_to_config(scaling_factor=2.0)
    with closing(UserCalls.of(generator, told(it.bundle.manifest))) as calls:
        checks, _ = calls.checks(it.bundle, ("onnxruntime",), Limits(), changed=False)
    assert failing(checks) == IMAGES


# ------------------------------------------------------------------------------------------------------------ guidance


@functools.cache
def guided() -> tuple[Bundle, Request, Answer]:
    """Returns a bundle with two passes in each step, and what its untouched pipeline answers."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-guided-"))
    source = str(sdxl(folder / "source", scheduler=euler()))
    options = fewstep.Options(prompts=1, seeds=1, cache_root=folder / "cache", profile=False)
    bundle = fewstep.build(source, out=folder / "bundle", steps=(1,), guidance=2.0, options=options)
    request = told(bundle.manifest).request(source_of(SourceSpec(source)))
    with closing(Asked(request)) as running:
        return bundle, request, running.answer()


GUIDED = {"default", "capitals", "over-long", "guidance 1.75"}


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        pytest.param(lambda manifest: manifest, set(), id="nothing"),
        pytest.param(_guidance(unconditional={}), GUIDED, id="an empty text where there is none"),
        pytest.param(_guidance(threshold=None), {"guidance 0.5"}, id="no threshold"),
        pytest.param(_guidance(shift=0.25), {*GUIDED, "negative prompt", "empty negative prompt"}, id="scale"),
        pytest.param(_guidance(empty_is_none=True), {"empty negative prompt"}, id="an empty negative prompt is none"),
    ],
)
def test_guidance_that_is_not_the_pipelines_fails(change: Change, fails: set[str]) -> None:
    bundle, request, answer = guided()
    spoilt = Bundle(bundle.path, change(bundle.manifest))
    assert failing(compare_calls(spoilt, ("onnxruntime",), request, answer, Limits(), changed=False)) == fails


# --------------------------------------------------------------------------------------------------------------- texts

INVERSION = """
import torch
from fewstep.export import describe, load, write_tokenizers

def make():
    generator = load({source!r})
    vectors = torch.linspace(-1, 1, 96).reshape(3, 32)
    generator.pipeline.load_textual_inversion({{"<cat>": vectors}})
    return generator
"""


def read_by(source: str, folder: Path) -> tuple[Bundle, Answer, Request]:
    """Returns a bundle that has the tokenizers of a source and no networks of its own, and what its pipeline reads."""
    generator = load(source)
    described = describe(generator, (min(generator.steps),))
    write_tokenizers(generator, described.tokenizers, folder)
    manifest = replace(built("lcm").bundle.manifest, contract=described.contract, tokenizers=described.tokenizers)
    request = replace(Told(described.contract, 1, (min(generator.steps),)).request(source_of(SourceSpec(source))))
    with closing(Asked(request)) as running:
        return Bundle(folder, manifest), running.answer(), request


def read_alike(bundle: Bundle, answer: Answer, request: Request) -> list[Check]:
    return compare_calls(bundle, (), request, answer, Limits(), changed=False)


def test_an_operation_on_the_text_that_is_lost_fails(tmp_path: Path) -> None:
    bundle, answer, request = read_by("tests.support.families:pixart_lcm", tmp_path)
    assert not failing(read_alike(bundle, answer, request))
    (spec,) = bundle.manifest.tokenizers.values()
    assert spec.operations
    for lost in spec.operations:
        fewer = tuple(operation for operation in spec.operations if operation != lost)
        found = read_alike(Bundle(tmp_path, _tokenizer(operations=fewer)(bundle.manifest)), answer, request)
        assert "token ids" in failing(found), lost


def test_a_textual_inversion_that_is_not_expanded_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inverted.py").write_text(INVERSION.format(source=str(built("lcm").source)))
    monkeypatch.syspath_prepend(tmp_path)
    bundle, answer, request = read_by("inverted:make", tmp_path)
    assert not failing(read_alike(bundle, answer, request))
    assert any("<cat>" in text for text in answer.texts)
    found = read_alike(Bundle(tmp_path, _tokenizer(expansions={})(bundle.manifest)), answer, request)
    assert "token ids" in failing(found)
    assert any("<cat>" in str(check.sample) for check in found if not check.passed)


def test_the_users_process_leaves_the_compiler_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(user_process.subprocess, "Popen", lambda *_, env, **__: started.append(env))
    user_process._start([], None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    user_process._start([], None)
    assert [env["OMP_NUM_THREADS"] for env in started] == [str(max((os.cpu_count() or 1) // 2, 1)), "3"]

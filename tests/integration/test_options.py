"""How a pipeline is called and loaded: from the command line to the manifest and back to verification."""

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
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewstep
from fewstep.bundle.source import SourceInfo, SourceSpec
from fewstep.cli import console
from fewstep.errors import ExportError, PipelineError, RecipeError, RuntimeMissingError, SourceError
from fewstep.export import Generator, describe, load, recorded_source
from fewstep.pipeline.compile import check_graphs
from fewstep.recipe import call_options
from fewstep.recipe.recipe import Recipe, parse_recipe
from tests.support import tiny
from tests.support.bundles import plain_generator
from tests.support.command import Run, refused

JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


@functools.cache
def turbo() -> Path:
    """Returns a tiny checkpoint; tests must not change it."""
    return tiny.turbo_folder(Path(tempfile.mkdtemp(prefix="fewstep-turbo-")) / "source")


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), JSON_VALUES, max_size=3))
def test_options_come_back_from_text_and_from_the_manifest(options: dict[str, Any]) -> None:
    assert call_options.parse_options(f"{name}={json.dumps(v)}" for name, v in options.items()) == options
    entries = json.loads(json.dumps(call_options.to_json(options, (1, 2))))
    assert call_options.from_json(entries) == options
    assert call_options.only_python(entries) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=0.5", 0.5),
        ("a=.5", 0.5),
        ("a=true", True),
        ("a=False", False),
        ("a=none", "none"),
        ("a=None", None),
        ("a=[1, 0.5]", [1, 0.5]),
        ("a=some words = here", "some words = here"),
    ],
)
def test_values_of_options(text: str, value: object) -> None:
    assert call_options.parse_options([text]) == {"a": value}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a"], "option 'a' is not NAME=VALUE"),
        (["=1"], "option '=1' is not NAME=VALUE"),
        (["a=1", "a=2"], "option 'a' is given twice"),
        (["a=[1,"], "which is not JSON"),
        (["a="], "which is not JSON"),
        (["a=NaN"], "expected finite numbers"),
        (["a=inf"], "expected finite numbers"),
    ],
)
def test_malformed_options(texts: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        call_options.parse_options(texts)
    assert caught.value.hint


def test_options_of_the_step_count_and_options_that_only_python_has() -> None:
    options = {"eta": lambda steps: 1 / steps, "scale": np.ones(2), "list": lambda steps: torch.ones(steps)}
    entries = json.loads(json.dumps(call_options.to_json(options, (1, 4))))
    assert call_options.only_python(entries) == ["scale", "list"]
    back = call_options.from_json(entries)
    assert back["eta"](4) == 0.25
    with pytest.raises(SourceError, match="an option has no value for 3 steps, it has values for 1, 4"):
        back["eta"](3)


def image_to_image(kind: str = "StableDiffusionImg2ImgPipeline", **arguments: Any) -> Generator:
    import diffusers

    loaded = load(str(turbo())).pipeline
    pipeline = getattr(diffusers, kind)(**loaded.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return Generator.from_pipeline(pipeline, SourceInfo("x", "diffusers", "x"), name="x", **arguments)


def test_images_that_a_pipeline_cannot_do_without_are_inputs() -> None:
    assert [spec.name for spec in image_to_image().inputs] == ["prompt", "image"]
    inpaint = image_to_image("StableDiffusionInpaintPipeline")
    assert [spec.name for spec in inpaint.inputs] == ["prompt", "image", "mask_image"]


def with_optional_image(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the tiny pipeline with an image that it can do without: it is added to the latent."""
    pipeline = load(str(turbo())).pipeline
    cls = type(pipeline)

    class Editing(cls):  # type: ignore[misc, valid-type]
        def __call__(self, prompt: Any = None, image: Any = None, num_inference_steps: int = 2, **kwargs: Any) -> Any:
            made = super().__call__(prompt, num_inference_steps=num_inference_steps, **kwargs)
            return made

    pipeline.__class__ = Editing
    return pipeline


def test_images_that_a_pipeline_can_do_without_are_inputs_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, source = with_optional_image(monkeypatch), SourceInfo("x", "diffusers", "x")
    plain = Generator.from_pipeline(pipeline, source, name="x")
    assert [spec.name for spec in plain.inputs] == ["prompt"]
    asked = Generator.from_pipeline(pipeline, source, name="x", inputs=["image"])
    assert [spec.name for spec in asked.inputs] == ["prompt", "image"]
    assert recorded_source(asked, [1]).spec().inputs == ("image",)
    assert plain.called_with({}, ["image"]).inputs == asked.inputs
    with pytest.raises(ExportError, match="has no input 'imagine' that a bundle can take") as caught:
        Generator.from_pipeline(pipeline, source, name="x", inputs=["imagine"])
    assert caught.value.hint == "did you mean 'image'?"


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"clip_skpi": 1}, "takes no option 'clip_skpi'", "did you mean 'clip_skip'?"),
        ({"guidance_scale": 1}, "option 'guidance_scale' is not for a fixed value", "give --guidance"),
        ({"latents": 1}, "option 'latents' is not for a fixed value", "the seed is an input of the bundle"),
    ],
)
def test_options_that_are_none_are_refused_when_the_source_is_loaded(
    options: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        load(SourceSpec(str(turbo()), options=options))
    assert caught.value.hint == hint


def test_options_of_a_function_and_of_a_folder_are_loaded_alike() -> None:
    spec = SourceSpec(str(turbo()), options={"clip_skip": 1, "sigmas": [1.0, 0.4]})
    generator = load(spec)
    assert generator.options == {"clip_skip": 1, "sigmas": [1.0, 0.4]}
    assert (generator.steps, generator.default_steps) == ((2,), 2)
    assert load(str(turbo())).called_with(spec.options).options == generator.options
    again = recorded_source(generator, [2]).spec()
    assert again.options == spec.options
    with pytest.raises(ExportError, match="is a sampling function and takes no option"):
        plain_generator().called_with({"eta": 1.0})


def test_a_recipe_names_options() -> None:
    recipe = parse_recipe({"options": {"strength": 0.5}, "inputs": ["image"]}, where="r.toml", name="r")
    assert recipe.adapters == SourceSpec("", options={"strength": 0.5}, inputs=("image",))
    assert json.loads(json.dumps(recipe.to_json()))["options"] == {"strength": 0.5}
    given = SourceSpec("x", options={"strength": 0.9, "eta": 1.0}).otherwise(recipe.adapters)
    assert given.options == {"strength": 0.9, "eta": 1.0}
    for values, message in (
        ({"options": 1}, r"r.toml: \[options\] is 1, expected a table"),
        ({"inputs": "image"}, r"r.toml: inputs is 'image', expected a list"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(values, where="r.toml", name="r")


def test_bundle_is_verified_with_the_options_it_was_built_with(run: Run, tmp_path: Path) -> None:
    small = ("--prompts", "1", "--seeds", "1")
    options = ("--option", "sigmas=[0.9,0.2]", "--option", "eta=0.5")
    source = with_a_checker(tmp_path / "source")
    status, stdout, stderr = run("build", source, *options, *small, "-o", tmp_path / "bundle", "--json")
    assert status == 0, stderr
    assert json.loads(stdout)["parity"]["passed"]
    assert "] load " in stderr and "] compare components" in stderr  # a line for each stage
    manifest = fewstep.Bundle.open(tmp_path / "bundle").manifest
    assert manifest.caveats == tuple(fewstep.bundle.source.source_notes(manifest.source))
    assert len(manifest.caveats) == 2
    assert "would black out" in (tmp_path / "bundle" / "report" / "index.html").read_text(encoding="utf-8")
    assert manifest.source.options == {"sigmas": {"value": [0.9, 0.2]}, "eta": {"value": 0.5}}
    assert list(manifest.schedules) == [2]
    status, stdout, stderr = run("verify", tmp_path / "bundle", *small, "--json")
    assert status == 0, stderr
    assert "run now" in json.loads(stdout)["reference"]
    assert json.loads(stdout)["caveats"] == list(manifest.caveats)

    # What only Python has: the golden pack, and with --against a refusal that says so.
    path = tmp_path / "bundle" / "manifest.json"
    values = json.loads(path.read_text())
    values["source"]["options"]["sigmas"] = {"python": "ndarray"}
    path.write_text(json.dumps(values))
    fewstep.bundle.bundle.write_seal(tmp_path / "bundle")
    status, stdout, stderr = run("verify", tmp_path / "bundle", *small, "--json")
    assert status == 0, stderr
    assert "options sigmas were given in Python" in json.loads(stdout)["caveats"][0]
    status, stdout, stderr = run("verify", tmp_path / "bundle", "--against", source, *small)
    assert (status, stdout) == (2, "")
    assert "was built with sigmas from Python" in " ".join(stderr.split())


def test_lists_for_other_step_counts_are_refused(run: Run, tmp_path: Path) -> None:
    text = refused(run, turbo(), tmp_path, "--option", "sigmas=[0.9,0.2]", "--steps", "1,2")
    assert "option sigmas has 2 values, and the step counts are 1, 2" in text
    assert "hint: build with --steps 2" in text


RAISED: list[tuple[Exception, str]] = [
    (IndexError("index 0 is out of bounds"), "fails with 2 steps and these settings: IndexError: index 0 is out of"),
    (RuntimeError("sizes differ\nat all"), "fails with 2 steps and these settings: RuntimeError: sizes differ at all"),
    (AttributeError("no such thing"), "AttributeError: no such thing"),
    (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    (KeyError("x"), "KeyError: 'x'"),
    (AssertionError(), "AssertionError: no text"),
    (ValueError("give more"), "refuses 2 steps with these settings: give more"),
]


@pytest.mark.parametrize(("error", "text"), RAISED, ids=[type(e).__name__ for e, _ in RAISED])
@pytest.mark.parametrize("place", ["pipeline", "scheduler", "network", "check"])
def test_whatever_a_pipeline_raises_is_one_error_with_its_words(
    error: Exception, text: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load(str(turbo()))
    pipeline = generator.pipeline

    def fail(*_: Any, **__: Any) -> None:
        raise error

    owner, name, hint = {
        "pipeline": (type(pipeline), "prepare_latents", "does it run in diffusers alone"),
        "scheduler": (pipeline.scheduler, "set_timesteps", "its scheduler (EulerDiscreteScheduler) raised it"),
        "network": (pipeline.unet.conv_in, "forward", "its network unet raised it"),
        "check": (type(pipeline), "check_inputs", "change its options (--option NAME=VALUE)"),
    }[place]

    def check_inputs(self: Any, *_: Any, **__: Any) -> None:
        raise error

    def set_timesteps(self: Any, *_: Any, **__: Any) -> None:
        raise error

    def forward(self: Any, *_: Any, **__: Any) -> None:
        raise error

    methods: dict[str, Callable[..., None]] = {"check": check_inputs, "scheduler": set_timesteps, "network": forward}
    function = methods.get(place, fail)
    owner = owner if isinstance(owner, type) else type(owner)
    if place == "network":
        pipeline.unet.conv_in.__class__ = type("Broken", (owner,), {"forward": forward})
    else:
        monkeypatch.setattr(owner, name, function)
    with pytest.raises(PipelineError) as caught:
        describe(generator, [2])
    assert caught.value.message.startswith("StableDiffusionPipeline ")
    assert text in caught.value.message
    assert hint in str(caught.value.hint)
    assert caught.value.__cause__ is error


def test_a_strength_that_leaves_no_step() -> None:
    with pytest.raises(PipelineError, match="runs no step of its denoiser with 1 steps") as caught:
        describe(image_to_image(options={"strength": 0.4}), [1, 4])
    assert (
        caught.value.hint
        == "strength 0.4 of 1 steps leaves no step to run: give --steps 3 or more, or a larger strength"
    )


def test_a_sampling_function_that_fails() -> None:
    generator = plain_generator()
    generator.pipeline.sample = lambda *_, **__: 1 // 0
    with pytest.raises(PipelineError, match="plain fails with 1 steps and these settings: ZeroDivisionError") as caught:
        describe(generator, [1])
    assert "the sampling function itself fails" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        (Recipe("r", batch=2), "a batch"),
        (Recipe("r", decoder_tile=8), "a decoder in tiles"),
        (Recipe("r", form="specialized"), "the form specialized"),
        (Recipe("r", shape=((8, 8), (8, 16))), "one shape, and the recipe has 2"),
    ],
)
def test_what_a_target_cannot_do_is_refused_first(recipe: Recipe, what: str) -> None:
    check_graphs(["onnxruntime", "coreml"], recipe)
    with pytest.raises(RuntimeMissingError, match=what):
        check_graphs(["onnxruntime", "litert"], recipe)


def test_lines_in_place_of_bars(capfd: pytest.CaptureFixture[str]) -> None:
    with console.progress_bars(every=0.05) as progress:
        advance = progress.task("compile", 3)
        advance()
        __import__("time").sleep(0.3)
        advance()
        advance()
        done = capfd.readouterr()
        __import__("time").sleep(0.2)
    out, err = done
    assert out == ""
    assert "[0:00] compile (3)" in err
    assert "[0:00] ... compile, 1 of 3 done" in err
    assert "..." not in capfd.readouterr().err  # what is over is not told of again


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Returns a checkpoint whose networks are there as fp16 alone."""
    source = Path(shutil.copytree(turbo(), tmp_path / "halves"))
    for path in source.rglob("*.safetensors"):
        path.rename(path.with_suffix(f".fp16{path.suffix}"))
    return source


@pytest.mark.parametrize("stored", [False, True], ids=["loaded", "stored"])
def test_a_folder_of_variants_alone_loads(halves: Path, stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    if stored:
        monkeypatch.setattr(importlib.import_module("fewstep.export.source.load"), "STORED_BYTES", 0)
    for spec in (SourceSpec(str(halves)), SourceSpec(str(halves), variant="fp16")):
        generator = load(spec)
        assert (generator.stored is not None) == stored
        assert generator.source.variant == spec.variant
        assert replace(generator.source.spec(), kind=None) == spec
        unet = generator.pipeline.unet if not stored else generator.stored.module("unet", generator.pipeline.unet)
        assert torch.equal(unet.conv_in.weight, load(str(turbo()), eager=True).pipeline.unet.conv_in.weight)
    with pytest.raises(SourceError, match="no component has files of the variant 'bf16', there are: fp16"):
        load(SourceSpec(str(halves), variant="bf16"))


@pytest.mark.parametrize("stored", [False, True], ids=["loaded", "stored"])
def test_of_both_the_plain_files_are_taken_unless_asked(
    halves: Path, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    from safetensors.torch import load_file, save_file

    if stored:
        monkeypatch.setattr(importlib.import_module("fewstep.export.source.load"), "STORED_BYTES", 0)
    for path in sorted(halves.rglob("*.fp16.safetensors")):
        weights = load_file(path)
        if path.parent.name == "unet":
            weights["conv_in.bias"] = weights["conv_in.bias"] + 1
        save_file(weights, path.with_name(path.name.replace(".fp16", "")), metadata={"format": "pt"})

    def bias(spec: SourceSpec) -> torch.Tensor:
        generator = load(spec)
        like = generator.pipeline.unet
        found: torch.Tensor = (like if generator.stored is None else generator.stored.module("unet", like)).conv_in.bias
        return found

    plain, asked = bias(SourceSpec(str(halves))), bias(SourceSpec(str(halves), variant="fp16"))
    torch.testing.assert_close(plain, asked + 1)
    both = load(SourceSpec(str(halves))), load(SourceSpec(str(halves), variant="fp16"))
    assert both[0].source.sha256 != both[1].source.sha256
    # diffusers needs the variant's name when one component has no other files, and then takes it of all.
    (halves / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.testing.assert_close(bias(SourceSpec(str(halves))), asked)


def test_no_one_variant_for_all_components_is_refused(halves: Path) -> None:
    path = halves / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.bf16.safetensors"))
    for variant in (None, "fp16"):
        with pytest.raises(SourceError, match=r"no one variant loads every component: .*unet has fp16; vae has bf16"):
            load(SourceSpec(str(halves), variant=variant))


@pytest.mark.parametrize("stored", [False, True], ids=["loaded", "stored"])
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_no_tensor_is_made_up(tmp_path: Path, part: str, stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from safetensors.torch import load_file, save_file

    if stored:
        monkeypatch.setattr(importlib.import_module("fewstep.export.source.load"), "STORED_BYTES", 0)
    source = Path(shutil.copytree(turbo(), tmp_path / "source"))
    (path,) = (source / part).glob("*.safetensors")
    whole = load_file(path)
    name = sorted(whole)[len(whole) // 2]
    save_file({k: v for k, v in whole.items() if k != name}, path, metadata={"format": "pt"})
    # With a LoRA, a decoder or a component the whole is loaded at any size.
    for eager in (False, True):
        with pytest.raises(SourceError) as caught:
            load(str(source), eager=eager)
        assert name.removeprefix("text_model.") in caught.value.message
        assert f"{part} lacks" in caught.value.message
    if part == "vae":
        with pytest.raises(SourceError, match="lacks"):
            load(SourceSpec(str(turbo()), decoder=str(source / "vae")))
    save_file({**whole, "lora.up": torch.zeros(1)}, path, metadata={"format": "pt"})
    generator = load(str(source))
    assert generator.source.unused == {part: ("lora.up",)}
    (note,) = fewstep.bundle.source.source_notes(generator.source)
    assert "lora.up, for which the network has no place: not used" in note


def with_a_checker(source: Path) -> Path:
    """Returns the tiny checkpoint with filters that are never loaded."""
    shutil.copytree(turbo(), source)
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    (source / "model_index.json").write_text(json.dumps(index))
    return source


def test_components_that_are_left_out_are_told_of(tmp_path: Path) -> None:
    source = with_a_checker(tmp_path / "source")
    generator = load(str(source))
    assert generator.source.left_out == ("safety_checker", "image_encoder")
    checker, adapter = fewstep.bundle.source.source_notes(generator.source)
    assert "shows images that the pipeline would black out" in checker
    assert "IP-Adapter" in adapter
    with pytest.raises(SourceError, match="a safety checker cannot be compiled yet"):
        load(SourceSpec(str(source), keep_safety_checker=True))


def test_a_checker_of_a_pipeline_from_python_does_not_run() -> None:
    class Checker(torch.nn.Module):
        def forward(self, *_: Any, **__: Any) -> None:
            raise AssertionError("it ran")

    pipeline = load(str(turbo())).pipeline
    pipeline.safety_checker = Checker()
    generator = Generator.from_pipeline(pipeline, SourceInfo("x", "diffusers", "x"), name="x")
    assert generator.source.left_out == ("safety_checker",)
    assert pipeline.safety_checker is not None and generator.pipeline.safety_checker is None
    describe(generator, [1])

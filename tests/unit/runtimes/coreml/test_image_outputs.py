"""Core ML decoders that give an image of 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fewstep
from fewstep.bundle.contract import ComponentSpec, OutputSpec, TensorSpec
from fewstep.bundle.program import Program
from fewstep.errors import BundleError, ContractError, ExportError, RecipeError, RuntimeMissingError
from fewstep.numerics.metrics import sqnr_db
from fewstep.numerics.outputs import LEVELS, from_levels, to_levels
from fewstep.recipe.recipe import PRESETS, Recipe, parse_recipe
from fewstep.runtimes.coreml import runtime as coreml
from fewstep.runtimes.coreml.compile.lower import lower, quiet_coremltools
from fewstep.runtimes.coreml.image_outputs import from_metadata
from fewstep.runtimes.coreml.mil import Evaluator, open_package
from fewstep.runtimes.coreml.mil.program import MilProgram
from fewstep.runtimes.parity.harness import LOWERING_FP16
from tests.support import tiny

with quiet_coremltools() as ct:
    from fewstep.runtimes.coreml.compile.single_file import write_loop
    from fewstep.runtimes.coreml.debug.bisect import bisect

PICTURE = OutputSpec()
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


class Decoder(torch.nn.Module):
    """Two convolutions and an enlargement, ending in the convolution into which a scale could be folded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(4, 32, 3, padding=1)
        self.last = torch.nn.Conv2d(32, channels, 3, padding=1)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.silu(self.first(latent))
        return self.last(torch.nn.functional.interpolate(x, scale_factor=2.0))


def decoder(channels: int = 3, batch: int = 1) -> Program:
    torch.manual_seed(0)
    module = Decoder(channels).eval()
    for parameter in module.parameters():
        parameter.data.copy_((3 * parameter.data).half().float())
    latent = torch.ones(batch, 4, 8, 12)
    spec = ComponentSpec(
        (TensorSpec("latent", "float32", (batch, 4, 8, 12)),),
        (TensorSpec("sample", "float32", (batch, channels, 16, 24)),),
        {"latent": "sample"},
        "after",
    )
    feeds = ({"latent": latent_of(0, batch)},)
    return Program("decoder", "vae_decoder", torch.export.export(module, (latent,)), spec, feeds=feeds, picture=PICTURE)


def latent_of(seed: int, batch: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((batch, 4, 8, 12)).astype(np.float32)


def reference(program: Program, latent: Any) -> Any:
    with torch.no_grad():
        (result,) = (program.exported.module()(torch.from_numpy(latent)),)
    return result.numpy()


@pytest.fixture(scope="module", params=[3, 1], ids=["colour", "grey"])
def program(request: pytest.FixtureRequest) -> Program:
    return decoder(request.param)


@pytest.fixture(scope="module")
def package(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    return folder / lower(program, folder, "fp16").path


def shown(path: Path, program: Program, latent: Any) -> Any:
    with coreml.open_session(path, program.spec) as session:
        return session.run({"latent": latent})["sample"]


def test_the_package_gives_the_levels_of_the_picture(program: Program, package: Path) -> None:
    # coremltools reads the description; PyTorch computes the picture.
    (feature,) = ct.utils.load_spec(str(package.parent)).description.output
    size = feature.type.imageType
    assert (feature.name, size.height, size.width) == ("sample", 16, 24)
    raw = Evaluator(open_package(package.parent), precision="fp16").run({"latent": latent_of(1)})["sample"]
    expected = reference(program, latent_of(1))
    assert np.array_equal(raw, np.rint(raw)) and raw.min() == 0 and raw.max() == LEVELS
    wanted = np.rint(LEVELS * np.clip(expected / 2 + 0.5, 0, 1))
    assert np.abs(raw - wanted).max() <= 1
    assert np.mean(raw != wanted) < 0.1  # an error of 0.06 levels, at 60 dB, crosses so many borders at most


def test_sessions_give_what_the_levels_mean_and_the_exact_values_in_fp32(program: Program, package: Path) -> None:
    latent, expected = latent_of(1), reference(program, latent_of(1))
    rounded = shown(package, program, latent)
    assert rounded.shape == expected.shape and rounded.dtype == np.float32
    assert np.abs(rounded - np.clip(expected, -1, 1)).max() < 1.5 * 2 / LEVELS
    with coreml.open_exact(package, program.spec) as session:
        exact = session.run({"latent": latent})["sample"]
    assert np.abs(expected).max() > 1  # which the picture does not hold
    assert sqnr_db(expected, exact) >= 100


def test_bisect_looks_at_the_values_before_they_become_a_picture(program: Program, package: Path) -> None:
    feeds = {"latent": latent_of(1)}
    assert bisect(program, package, feeds, limit_db=100) is None
    other = package.parent.parent / "damaged.mlpackage"
    for file in (f for f in package.parent.rglob("*") if f.is_file()):
        copy = other / file.relative_to(package.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        data = bytearray(file.read_bytes())
        if file.name == "weight.bin":
            data[-400:] = bytes(400)  # of the larger weight
        copy.write_bytes(bytes(data))
    found = bisect(program, other / "Manifest.json", feeds, limit_db=100)
    assert found is not None and found.module_path in ("first", "last")


def test_core_ml_gives_an_image_of_which_the_session_makes_values(program: Program, package: Path) -> None:
    latent = latent_of(1)
    picture = to_levels(reference(program, latent), PICTURE)[0]

    class Model:
        """What `coremltools.models.MLModel` is on macOS."""

        def predict(self, feeds: dict[str, Any]) -> dict[str, Any]:
            assert feeds.keys() == {"latent"}
            if len(picture) == 1:
                return {"sample": Image.fromarray(picture[0])}
            alpha = np.full((1, *picture.shape[1:]), 255, np.uint8)
            return {"sample": Image.fromarray(np.concatenate([picture, alpha]).transpose(1, 2, 0))}

    pictures = coreml._pictures(open_package(package.parent))
    result = coreml._CoreMLSession(Model(), program.spec, pictures).run({"latent": latent})["sample"]
    assert np.array_equal(to_levels(result, PICTURE)[0], picture)


@given(st.floats(0.1, 4), st.floats(-2, 2), st.integers(0, 2**32 - 1))
def test_levels_and_values_are_each_others_inverse(scale: float, shift: float, seed: int) -> None:
    picture = OutputSpec(scale=scale, shift=shift)
    levels = np.random.default_rng(seed).integers(0, 256, (1, 3, 4, 4)).astype(np.uint8)
    assert np.array_equal(to_levels(from_levels(levels, picture), picture), levels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, spec=replace(p.spec, outputs=p.spec.outputs * 2)), r"expected one picture \[1, 1 or 3"),
        (lambda p: decoder(batch=2), r"gives \[\[2, 3, 16, 24\]\], expected one picture"),
        (lambda p: decoder(channels=4), r"gives \[\[1, 4, 16, 24\]\], expected one picture"),
    ],
    ids=["two outputs", "a batch", "four channels"],
)
def test_what_is_no_picture_is_refused(change: Callable[[Program], Program], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        lower(change(decoder()), tmp_path, "fp16")


def test_a_package_with_an_image_must_say_of_what() -> None:
    program = MilProgram(9, {}, "main", metadata={"fewstep.picture": '{"scale": "wide"}'})
    with pytest.raises(BundleError, match="does not say of which values"):
        from_metadata(program, "VAEDecoder")


def test_an_image_of_another_size_is_not_the_manifests(program: Program, package: Path) -> None:
    (output,) = program.spec.outputs
    other = replace(program.spec, outputs=(replace(output, shape=(1, output.shape[1], 8, 8)),))
    with pytest.raises(ContractError, match=r"sample is an image (RGB|GRAYSCALE) \[16, 24\], expected float32"):
        coreml.open_session(package, other)


def test_recipes_refuse_what_no_image_can_keep() -> None:
    assert parse_recipe({"base": "palette6", "image_output": True}, where="r", name="r").image_output
    with pytest.raises(RecipeError, match="image_output is 'yes', expected true or false"):
        parse_recipe({"base": "fp16", "image_output": "yes"}, where="r", name="r")
    with pytest.raises(RecipeError, match="image_output with fp32 weights"):
        Recipe("r", image_output=True)
    with pytest.raises(RecipeError, match="batch and image_output are both given"):
        replace(PRESETS["fp16"], image_output=True, batch=2)


def test_a_build_without_a_target_that_gives_images_is_refused(tmp_path: Path) -> None:
    source = str(tiny.lcm_folder(tmp_path / "source"))
    with pytest.raises(RuntimeMissingError, match="no target of onnxruntime gives an image"):
        fewstep.build(source, "fp16", ("onnxruntime",), tmp_path / "bundle", image_output=True)


@pytest.mark.slow
def test_a_bundle_with_pictures_is_verified_by_levels(tmp_path: Path) -> None:
    source = str(tiny.lcm_folder(tmp_path / "source"))
    options = fewstep.Options(prompts=1, seeds=1, profile=False, cache_root=tmp_path / "cache")
    bundle = fewstep.build(
        source,
        "fp16",
        ("coreml",),
        tmp_path / "bundle",
        steps=[1],
        shape="16x24,16x16",
        image_output=True,
        options=options,
    )
    verified = fewstep.verify(bundle, prompts=1, seeds=1)
    assert verified.report
    levels = [c for c in verified.report.checks if "levels" in c.metric]
    assert {(c.error, c.component) for c in levels} == {(LOWERING_FP16, "decoder")}
    for at, shape in ((bundle, (16, 24, 3)), (bundle.shaped("16x16"), (16, 16, 3))):
        picture = at.generate("a red apple", seed=1).output
        assert picture.shape == shape
        assert np.allclose(picture * LEVELS, np.rint(picture * LEVELS), atol=1e-3)
    with pytest.raises(ContractError, match="the last component gives an image"):
        write_loop(bundle, tmp_path / "loop.mlpackage")

"""Several pictures in one call: each is the one that its prompt and seed draw alone."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fewstep
from fewstep.bundle.manifest import Manifest
from fewstep.bundle.variants import nearest, parts, variant
from fewstep.cli import cli
from fewstep.errors import ContractError, ExportError, ParityError, RecipeError
from fewstep.export import Generator
from fewstep.export.custom_loop import Draw, Networks
from fewstep.export.record.run import result_tensor, run
from fewstep.numerics import noise
from fewstep.numerics.inputs import example_inputs, stacked
from fewstep.pipeline.shape_and_batch import joined
from fewstep.recipe.recipe import PRESETS, parse_recipe
from fewstep.runtimes.parity.harness import Check
from tests.support.bundles import built, plain_generator
from tests.support.families import generator_of
from tests.support.zoo import FAMILIES

PROMPTS, SEEDS = ["a cat", "a house by the sea"], [5, 9]
# ONNX Runtime sums in another order for another shape: some float32 roundings of values up to 1.
SAME = 2e-6
NETWORKS = ("unet", "text_encoder")


def options(folder: Path) -> fewstep.Options:
    return fewstep.Options(prompts=1, seeds=1, cache_root=folder / "cache", profile=False)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> fewstep.Bundle:
    """Returns a bundle with guidance in two passes that draws one or two pictures at once."""
    folder = tmp_path_factory.mktemp("guided")
    source = str(built("turbo").source)
    return fewstep.build(source, out=folder / "bundle", steps=[1], guidance=3.0, batch=2, options=options(folder))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> fewstep.Bundle:
    """Returns a bundle of a loop in plain PyTorch that is given a picture and a class, for one or three samples."""
    folder = tmp_path_factory.mktemp("plain")
    return fewstep.build(plain_generator(), out=folder / "bundle", batch=3, options=options(folder))


def test_each_picture_is_what_its_seed_draws_alone(guided: fewstep.Bundle) -> None:
    assert guided.manifest.contract.guidance.kind == "two_pass"
    several = guided.generate_batch(PROMPTS, SEEDS)
    for prompt, seed, sample in zip(PROMPTS, SEEDS, several, strict=True):
        alone = guided.generate(prompt, seed)
        assert (sample.prompt, sample.seed, sample.steps) == (prompt, seed, 1)
        np.testing.assert_allclose(sample.output, alone.output, rtol=0, atol=SAME)
        assert [x.shape for x in sample.latents] == [x.shape for x in alone.latents]
    assert np.abs(several[0].output - several[1].output).max() > 0.01


def test_the_pipeline_itself_draws_the_same_batch(guided: fewstep.Bundle) -> None:
    generator = fewstep.export.load(str(built("turbo").source), guidance=3.0).batched(2)
    theirs = result_tensor(run(generator, PROMPTS, 5, steps=1, guidance=3.0).result)
    ours = guided.generate_batch(PROMPTS, [5, 6])
    for picture_CHW, sample in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(sample.output, picture_CHW.permute(1, 2, 0).numpy(), rtol=0, atol=1e-4)  # 80 dB


def test_graphs_share_weights_and_every_one_is_verified(guided: fewstep.Bundle) -> None:
    manifest = fewstep.Bundle.open(guided.path).manifest
    assert [*manifest.shapes] == ["2x"]
    assert (manifest.contract.batch, manifest.batched(2).contract.batch) == (1, 2)
    files = sorted(p.name for p in (guided.path / "onnxruntime" / "unet").glob("model*"))
    assert files == ["model-2x.onnx", "model.onnx", "model.onnx.data"]
    checks = json.loads((guided.path / "report" / "parity.json").read_text())["all"]
    mine = [check for check in checks if str(check["sample"]).endswith(", 2x")]
    assert {"text_encoder", "denoiser", "decoder", "picture"} <= {check["component"] for check in mine}
    assert len({check["sample"] for check in mine if check["level"] == "picture"}) == 2


@pytest.mark.slow
def test_batches_of_every_shape(tmp_path: Path) -> None:
    bundle = fewstep.build(
        str(built("turbo").source),
        out=tmp_path / "bundle",
        steps=[1],
        shape="16x16,16x24",
        batch=2,
        options=options(tmp_path),
    )
    manifest = fewstep.Bundle.open(bundle.path).manifest
    assert (manifest.shape, *manifest.shapes) == ("16x16", "16x24", "2x16x16", "2x16x24")
    at = bundle.shaped("16x24")
    for prompt, seed, sample in zip(PROMPTS, SEEDS, at.generate_batch(PROMPTS, SEEDS), strict=True):
        np.testing.assert_allclose(sample.output, at.generate(prompt, seed).output, rtol=0, atol=SAME)
    found = {name: sorted(p.name for p in (bundle.path / "onnxruntime" / name).glob("model*")) for name in NETWORKS}
    assert found["unet"] == [
        "model-16x24.onnx",
        "model-2x16x16.onnx",
        "model-2x16x24.onnx",
        "model.onnx",
        "model.onnx.data",
    ]
    # Nothing of the text encoder depends on the shape: both shapes' batches have one graph.
    assert found["text_encoder"] == ["model-2x16x16.onnx", "model.onnx", "model.onnx.data"]
    checks = json.loads((bundle.path / "report" / "parity.json").read_text())["all"]
    for name in manifest.shapes:
        mine = [check for check in checks if check["sample"].endswith(f", {name}")]
        assert {"text_encoder", "denoiser", "decoder", "picture"} <= {check["component"] for check in mine}
        assert len({check["sample"] for check in mine}) == manifest.shaped(name).contract.batch


def test_inputs_beside_the_prompt(plain: fewstep.Bundle) -> None:
    inputs = [example_inputs(plain.manifest.contract.inputs, i) for i in range(3)]
    several = plain.generate_batch([""] * 3, [1, 2, 3], inputs=inputs, steps=2)
    for seed, given, sample in zip((1, 2, 3), inputs, several, strict=True):
        alone = plain.generate("", seed, inputs=given, steps=2)
        np.testing.assert_allclose(sample.output, alone.output, rtol=0, atol=SAME)


def pictures_of(checks: Sequence[Check], shape: str) -> set[str | None]:
    """Returns the samples of a shape or batch whose pictures were compared."""
    return {c.sample for c in checks if c.level == "picture" and str(c.sample).endswith(f", {shape}")}


def test_verified_again_with_and_without_the_source(
    guided: fewstep.Bundle, plain: fewstep.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = fewstep.verify(guided, prompts=1, seeds=1).report
    assert (
        report
        and len({c.sample for c in report.checks if c.level == "picture" and str(c.sample).endswith(", 2x")}) == 2
    )
    module = importlib.import_module("fewstep.pipeline.verify")  # the attribute of that name is the function
    monkeypatch.setattr(module, "usable_source", lambda *_: (None, "it is gone"))
    report = fewstep.verify(plain).report
    assert (
        report
        and len({c.sample for c in report.checks if c.level == "picture" and str(c.sample).endswith(", 3x")}) == 3
    )


def test_wrong_sizes(guided: fewstep.Bundle, plain: fewstep.Bundle) -> None:
    with pytest.raises(ContractError, match="bundle does not draw 4 pictures at once, it draws 1 or 2") as caught:
        guided.generate_batch(["cat"] * 4, range(4))
    assert caught.value.hint == "build it with --batch 4, or draw one after the other"
    with pytest.raises(ContractError, match="2 pictures at once, it draws 1\n"):
        built("turbo").bundle.batched(2)
    with pytest.raises(ContractError, match="a batch of 2 is given 2 prompts, 3 seeds and 2 sets of inputs"):
        guided.generate_batch(PROMPTS, [1, 2, 3])
    with pytest.raises(ContractError, match="input image is missing"):
        plain.generate_batch([""] * 3, [1, 2, 3])
    with pytest.raises(ContractError, match="bundle has no shape 24x24, it has the generator's own alone"):
        guided.shaped("24x24")


def test_on_the_command_line(guided: fewstep.Bundle, tmp_path: Path) -> None:
    arguments = ["generate", str(guided.path), "cat", "--seed", "7", "-o", str(tmp_path / "cat.png")]
    result = CliRunner().invoke(cli, [*arguments, "--batch", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["picture"] == [str(tmp_path / f"cat-{seed}.png") for seed in (7, 8)]
    alone = CliRunner().invoke(cli, [*arguments[:4], "8", "-o", str(tmp_path / "alone.png")])
    assert alone.exit_code == 0
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "cat-8.png").read_bytes()
    result = CliRunner().invoke(cli, [*arguments, "--batch", "3"])
    assert isinstance(result.exception, ContractError)


class _Mixing(torch.nn.Module):
    """A network whose samples see each other."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * 0.5 + 0.1 * x.mean(dim=0, keepdim=True)


class _OneAlone(torch.nn.Module):
    """A network that takes one sample."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.reshape(1, 3, 8, 8))


def test_samples_that_depend_on_each_other_are_refused(tmp_path: Path) -> None:
    def generator(network: torch.nn.Module) -> Generator:
        def sample(
            nets: Networks, inputs: Mapping[str, torch.Tensor], *, steps: int, guidance: float, noise: Draw
        ) -> torch.Tensor:
            x = noise((1, 3, 8, 8))
            return x - nets["denoiser"](x, torch.ones(1))

        return Generator.assemble("one", {"denoiser": network}, sample, steps=(1,))

    with pytest.raises(ParityError, match=r"denoiser, step 0, .*2x is below its limit"):
        fewstep.build(generator(_Mixing()), out=tmp_path / "mixing", batch=2, options=options(tmp_path))
    assert not (tmp_path / "mixing").exists()
    with pytest.raises(ExportError, match="one does not draw 2 samples at once: RuntimeError: shape") as caught:
        fewstep.build(generator(_OneAlone()), out=tmp_path / "alone", batch=2, options=options(tmp_path))
    assert caught.value.hint == "build it without a batch, and draw one sample after the other"


def test_a_tensor_for_all_samples_must_be_the_same(plain: fewstep.Bundle) -> None:
    inputs = [example_inputs(plain.manifest.contract.inputs, i) for i in range(2)]
    samples = [plain.generate("", i, inputs=inputs[i], steps=1) for i in range(2)]
    with pytest.raises(ExportError, match="differs between the samples of a batch, expected one row for each"):
        joined(samples, plain.manifest.components)


def test_rows_of_noise_are_those_of_their_seeds() -> None:
    rows = noise.rows([3, 8], 2, (2, 4, 5))
    assert np.array_equal(rows, np.stack([noise.normal(seed, 2, (4, 5)) for seed in (3, 8)]))
    assert noise.rows([3], 0, (1, 6)).tobytes() == noise.normal(3, 0, (1, 6)).tobytes()


def test_inputs_are_stacked() -> None:
    both = stacked([{"a": np.zeros((1, 2))}, {"a": np.ones((1, 2))}])
    assert both["a"].tolist() == [[0, 0], [1, 1]]


def test_recipes_name_a_batch() -> None:
    assert parse_recipe({"batch": 4}, where="r.toml", name="r").batch == 4
    for value in (1, 0, True, "4"):
        with pytest.raises(RecipeError, match=r"r.toml: batch is .*, expected a whole number from 2 to 4096"):
            parse_recipe({"batch": value}, where="r.toml", name="r")
    with pytest.raises(RecipeError, match="batch and quantization are both given"):
        parse_recipe({"batch": 4, "base": "w8a8"}, where="r.toml", name="r")
    assert PRESETS["fp32"].batch is None


@pytest.mark.parametrize(
    ("wanted", "names", "expected"),
    [
        ("512x768", ["", "512x768"], "512x768"),
        ("512x768", [""], ""),
        ("4x", ["", "4x"], "4x"),
        ("4x512x768", ["", "512x768", "4x512x512", "4x512x768"], "4x512x768"),
        ("4x512x768", ["", "4x512x512"], "4x512x512"),
        ("4x512x768", ["", "512x768"], "512x768"),
        ("4x512x512", ["", "512x768"], ""),
        ("4x", ["tile-8x8", "tile-8x4"], "tile-8x8"),
    ],
)
def test_the_graph_that_serves_a_variant(wanted: str, names: list[str], expected: str) -> None:
    assert nearest(wanted, names) == expected


def test_names_of_variants() -> None:
    assert [variant(s, n) for s, n in ((None, 1), (None, 4), ("8x9", 1), ("8x9", 4))] == ["", "4x", "8x9", "4x8x9"]
    assert [parts(name) for name in ("", "4x", "8x9", "4x8x9", "tile-8x9")] == [
        ("", 1),
        ("", 4),
        ("8x9", 1),
        ("8x9", 4),
        None,
    ]


def test_manifests_from_before_batches_are_read(plain: fewstep.Bundle) -> None:
    values = plain.manifest.to_json()
    del values["contract"]["batch"], values["shapes"]
    manifest = Manifest.from_json(values, where="manifest.json")
    assert manifest.contract.batch == 1 and not manifest.shapes


# Added conditions and glue between two text encoders; packed latents; a picture to start from; a second network in
# every step; folded frames; sound; classes; draws for the networks.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "lcm-sdxl",
        "sd3",
        "flux-schnell",
        "pixart-lcm",
        "sana-sprint",
        "dit",
        "img2img-lcm",
        "inpaint",
        "controlnet",
        "marigold-lcm",
        "animatediff-lcm",
        "flash-audio",
        "consistency-model-class",
        "meanflow",
        "dd-gan",
        "invsr",
    ],
)
def test_families_in_a_batch(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    generator = generator_of(family, tmp_path / "source")
    bundle = fewstep.build(
        generator, out=tmp_path / "bundle", steps=family.steps[:1], batch=2, options=options(tmp_path)
    )
    assert bundle.batched(2).manifest.contract.batch == 2

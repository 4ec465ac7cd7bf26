"""Pictures of another size than the checkpoint's own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner
from PIL import Image

import fewstep
from fewstep.cli import cli
from fewstep.errors import ContractError, RecipeError, RuntimeMissingError
from fewstep.pipeline.compile import check_shapes
from fewstep.recipe.recipe import parse_recipe
from tests.support.bundles import built


def test_a_bundle_of_another_shape_is_verified_as_such(tmp_path: Path) -> None:
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    bundle = fewstep.build(
        str(built("turbo").source), out=tmp_path / "bundle", steps=[1], shape="16x24", options=options
    )
    assert bundle.manifest.contract.latent_shape == (4, 8, 12)
    assert bundle.generate("cat", seed=1).output.shape == (16, 24, 3)
    assert fewstep.verify(bundle, prompts=1, seeds=1).report


def test_recipes_name_a_shape() -> None:
    assert parse_recipe({"shape": "16x24"}, where="r.toml", name="r").shape == ((16, 24),)
    assert parse_recipe({"shape": "16x24, 24x16,16x24"}, where="r.toml", name="r").shape == ((16, 24), (24, 16))
    with pytest.raises(RecipeError, match=r"r.toml: shape is '16', expected HEIGHTxWIDTH"):
        parse_recipe({"shape": "16"}, where="r.toml", name="r")


def test_runtimes_without_shared_weights_take_one_shape() -> None:
    check_shapes(("onnxruntime", "coreml"), ((16, 16), (16, 24)))
    with pytest.raises(RuntimeMissingError, match="runtime litert takes one shape, and the recipe has 2"):
        check_shapes(("coreml", "litert"), ((16, 16), (16, 24)))


SHAPES = ("16x16", "16x24")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> fewstep.Bundle:
    """Returns a bundle of two shapes."""
    folder = tmp_path_factory.mktemp("several")
    turbo = built("turbo")
    options = fewstep.Options(prompts=1, seeds=1, cache_root=turbo.options.cache_root, profile=False)
    return fewstep.build(
        str(turbo.source), out=folder / "bundle", steps=[1, 2], shape=",".join(SHAPES), options=options
    )


def test_shapes_share_one_file_of_weights(several: fewstep.Bundle) -> None:
    root = several.path / "onnxruntime"
    assert sorted(p.name for p in (root / "unet").glob("model*")) == [
        "model-16x24.onnx",
        "model.onnx",
        "model.onnx.data",
    ]
    # Nothing of the text encoder depends on the shape.
    assert [p.name for p in (root / "text_encoder").glob("model*")] == ["model.onnx"]
    for component in ("unet", "vae_decoder"):
        other = root / component / "model-16x24.onnx"
        assert _places(other) <= _places(root / component / "model.onnx")
        initializers = [v.const_value for v in ir.load(other).graph.initializers.values()]
        own = [t for t in initializers if t is not None and not isinstance(t, ir.ExternalTensor)]
        assert max(t.nbytes for t in own) <= 256, "too small for a place in a file"


def _places(path: Path) -> set[tuple[int, int]]:
    """Returns the places (offset, length) of the file of weights that a model refers to."""
    tensors = [value.const_value for value in ir.load(path).graph.initializers.values()]
    external = [t for t in tensors if isinstance(t, ir.ExternalTensor)]
    assert {t.location for t in external} == {"model.onnx.data"}
    return {(t.offset or 0, t.length or 0) for t in external}


def test_every_shape_is_verified_and_drawn(several: fewstep.Bundle, tmp_path: Path) -> None:
    manifest = fewstep.Bundle.open(several.path).manifest
    assert (manifest.shape, *manifest.shapes) == SHAPES
    checks = json.loads((several.path / "report" / "parity.json").read_text())["all"]
    samples = {check["sample"] for check in checks if "#" in str(check["sample"])}
    for shape in SHAPES[1:]:
        mine = [check for check in checks if str(check["sample"]).endswith(f", {shape}")]
        assert {"text_encoder", "denoiser", "decoder", "picture"} <= {check["component"] for check in mine}
    # Two step counts at the first shape, one sample at the other; two passes, and a negative prompt.
    assert len(samples) == 3 + 2
    for shape in SHAPES:
        height, width = map(int, shape.split("x"))
        assert several.shaped(shape).generate("cat", seed=1).output.shape == (height, width, 3)
    verified = fewstep.verify(several, prompts=1, seeds=1)
    # At each of both shapes: two step counts, another guidance scale, and a negative prompt.
    assert verified.report and len({c.sample for c in verified.report.checks if "#" in str(c.sample)}) == 2 * 4
    out = tmp_path / "cat.png"
    result = CliRunner().invoke(cli, ["generate", str(several.path), "cat", "--shape", "16x24", "-o", str(out)])
    assert result.exit_code == 0
    with Image.open(out) as picture:
        assert picture.size == (24, 16)


def test_shapes_are_verified_without_their_source(several: fewstep.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fewstep.pipeline.verify")  # the attribute of that name is the function
    monkeypatch.setattr(module, "usable_source", lambda *_: (None, "it is gone"))
    report = fewstep.verify(several).report
    assert report and {c.sample for c in report.checks if c.sample and c.sample.endswith("16x24")}


def test_a_shape_that_the_bundle_has_not(several: fewstep.Bundle) -> None:
    with pytest.raises(ContractError, match="bundle has no shape 32x32, it has 16x16, 16x24") as caught:
        several.shaped("32x32")
    assert caught.value.hint == "build it with --shape 16x16,16x24,32x32"
    with pytest.raises(ContractError, match="it has the generator's own alone"):
        built("turbo").bundle.shaped("32x32")


def test_a_shape_that_the_pipeline_refuses(tmp_path: Path) -> None:
    with pytest.raises(fewstep.FewstepError, match="have to be divisible by 8 but are 17 and 24") as caught:
        fewstep.build(str(built("turbo").source), out=tmp_path / "bundle", steps=[1], shape="17x24")
    assert caught.value.exit_status == 2 and caught.value.hint
    assert not (tmp_path / "bundle").exists()

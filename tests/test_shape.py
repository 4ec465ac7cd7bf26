"""Pictures of another size than the checkpoint's own."""

from __future__ import annotations

from pathlib import Path

import pytest

import fewstep
from fewstep.errors import RecipeError
from fewstep.recipe import parse_recipe
from tests.bundles import built


def test_a_bundle_of_another_shape_is_verified_as_such(tmp_path: Path) -> None:
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    bundle = fewstep.build(
        str(built("turbo").source), out=tmp_path / "bundle", steps=[1], shape="16x24", options=options
    )
    assert bundle.manifest.contract.latent_shape == (4, 8, 12)
    assert bundle.generate("cat", seed=1).output.shape == (16, 24, 3)
    assert fewstep.verify(bundle, prompts=1, seeds=1).report


def test_recipes_name_a_shape() -> None:
    assert parse_recipe({"shape": "16x24"}, where="r.toml", name="r").shape == (16, 24)
    with pytest.raises(RecipeError, match=r"r.toml: shape is '16', expected HEIGHTxWIDTH"):
        parse_recipe({"shape": "16"}, where="r.toml", name="r")


def test_a_shape_that_the_pipeline_refuses(tmp_path: Path) -> None:
    with pytest.raises(fewstep.FewstepError, match="have to be divisible by 8 but are 17 and 24") as caught:
        fewstep.build(str(built("turbo").source), out=tmp_path / "bundle", steps=[1], shape="17x24")
    assert caught.value.exit_status == 2 and caught.value.hint
    assert not (tmp_path / "bundle").exists()

"""Recipes: presets, files, and what is said of a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.errors import RecipeError
from fewstep.recipe.recipe import PRESETS, Limits, check_steps, load_recipe, parse_recipe


def parse(**values: object) -> object:
    return parse_recipe(values, where="r.toml", name="r")


def test_presets_load_by_name() -> None:
    for name, recipe in PRESETS.items():
        assert load_recipe(name) is recipe


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text('weights = "fp16"\nsteps = [4, 1, 4]\nguidance = 2\n[limits]\npicture_psnr_db = 70\n')
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.weights, recipe.steps, recipe.guidance) == ("small", "fp16", (1, 4), 2.0)
    assert recipe.limits.picture_psnr_db == 70.0
    assert recipe.limits.compression_psnr_db == PRESETS["fp16"].limits.compression_psnr_db
    assert recipe.limits.component_sqnr_db == Limits().component_sqnr_db


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": "fp16"}, "r.toml: unknown key 'weight'"),
        ({"weights": "int3"}, "weights is 'int3', expected one of fp32, fp16"),
        ({"steps": 4}, "steps is 4, expected a list"),
        ({"steps": [0]}, "0 is not a step count"),
        ({"steps": [True]}, "True is not a step count"),
        ({"guidance": "high"}, "guidance is 'high', expected a number"),
        ({"form": "tabel"}, "form is 'tabel', expected one of step, table, specialized"),
        ({"limits": 3}, "limits is 3, expected a table"),
        ({"limits": {"psnr": 3}}, r"\[limits\]: unknown key 'psnr'"),
        ({"limits": {"picture_psnr_db": "x"}}, "limits.picture_psnr_db is 'x', expected a number"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_values(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse(**values)
    assert caught.value.hint


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("weights = ")
    with pytest.raises(RecipeError, match="is not TOML"):
        load_recipe(str(tmp_path / "bad.toml"))
    with pytest.raises(RecipeError, match="cannot read recipe"):
        load_recipe(str(tmp_path / "none.toml"))


def test_steps_are_sorted_and_unique() -> None:
    assert check_steps([8, 1, 8], "steps") == (1, 8)

"""Bundles' manifests, recipes, tokenizers and requests that are no such: what is refused, and with what words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fewstep.bundle.manifest import Manifest
from fewstep.errors import BundleError, ContractError, FewstepError, RecipeError
from fewstep.recipe.recipe import load_recipe
from fewstep.strict import parse_json
from fewstep.text.patterns import pattern_problem, tokenizer_problem
from tests.support.bundles import built
from tests.support.command import Run
from tests.web import hostile
from tests.web.vectors import FOLDER

CORPUS = json.loads((FOLDER / "hostile-manifests.json").read_text(encoding="utf-8"))
PATTERNS = json.loads((FOLDER / "patterns.json").read_text(encoding="utf-8"))
TEXT = json.dumps(CORPUS["manifest"], separators=(",", ":"))


def read_manifest(text: str) -> Manifest:
    return Manifest.from_json(parse_json(text, "m", error=BundleError, hint="h"), where="m")


# --- manifests, patterns, tokenizers ----------------------------------------------------------------------------------


def test_a_manifest_with_something_of_everything_is_read() -> None:
    assert read_manifest(TEXT).name == "hostile"


@pytest.mark.parametrize("name", CORPUS["changes"])
def test_a_manifest_is_refused(name: str) -> None:
    spoiled = hostile.spoiled(TEXT, CORPUS["manifest"], CORPUS["changes"][name])
    assert spoiled != TEXT
    with pytest.raises(BundleError) as caught:
        read_manifest(spoiled)
    assert caught.value.hint


@pytest.mark.parametrize("pattern", PATTERNS["good"])
def test_patterns_of_tokenizers_are_run(pattern: str) -> None:
    assert pattern_problem(pattern) is None


@pytest.mark.parametrize("pattern", PATTERNS["bad"], ids=lambda pattern: pattern[:40])
def test_patterns_that_could_run_for_ever_are_not(pattern: str) -> None:
    assert pattern_problem(pattern)
    step = {"type": "Split", "pattern": {"Regex": pattern}}
    assert "has a pattern that" in str(
        tokenizer_problem({"model": {}, "pre_tokenizer": {"type": "S", "inner": [step]}})
    )


def test_replacements_that_make_a_text_longer_and_longer() -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}
    assert tokenizer_problem({"model": {}, "normalizer": {"type": "Sequence", "normalizers": [step]}}) is None
    many = {"model": {}, "normalizer": {"type": "Sequence", "normalizers": [step] * 9}}
    assert tokenizer_problem(many) == "makes texts up to 1000000000 times longer"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "the entry 'a' is there twice"),
        ("[" * 100_000, "is nested deeper than 64"),
        ("9" * 5_000, "a number of 5000 digits"),
        ('"\\ud800"', "half a surrogate pair"),
        ("[NaN]", "NaN is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        (b"\xff", "can't decode byte"),
    ],
)
def test_json_is_read_strictly(text: str | bytes, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        parse_json(text, "m", error=BundleError, hint="h")


# --- requests and recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": 7}, "the prompt is int, expected a text"),
        ({"prompt": None}, "the prompt is NoneType, expected a text"),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
        ({"seed": -1}, "the seed is -1, expected an integer from 0"),
        ({"seed": 2**64}, "the seed is 18446744073709551616"),
        ({"seed": 1.5}, "the seed is 1.5"),
        ({"seed": True}, "the seed is True"),
        ({"guidance": float("nan")}, "guidance is nan, expected a finite number"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"guidance": "7"}, "guidance is 7, expected a finite number"),
        ({"steps": 2.0}, "steps is 2.0, expected an integer"),
        ({"steps": "2"}, "steps is '2', expected an integer"),
        ({"steps": [2]}, r"steps is \[2\]"),
        ({"inputs": {"image": [[1], [2, 3]]}}, "unknown input 'image'"),
    ],
)
def test_requests_that_are_none(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ContractError, match=said) as caught:
        built("lcm").bundle.generate(**{"prompt": "cat", **arguments})
    assert caught.value.hint


@pytest.mark.parametrize("guidance", ["nan", "inf", "-inf"])
def test_the_command_line_refuses_what_is_no_guidance(run: Run, tmp_path: Path, guidance: str) -> None:
    path = tmp_path / "x.png"
    status, _, said = run("generate", built("lcm").bundle.path, "cat", f"--guidance={guidance}", "-o", path)
    assert status == 2 and "expected a finite number" in said
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("guidance = nan", "nan is no finite number"),
        ("guidance = 1e999", "1e999 is no finite number"),
        ("guidance = " + "9" * 5_000, "is not TOML: Exceeds the limit"),
        ("a = " + "[" * 100_000, "is nested deeper than 64"),
        ("base = ['fp32']", "base is ['fp32'], expected one of"),
        ("name = 7", "name is '7', expected a text in quotes"),
        ("shape = 7", "shape is '7', expected a text in quotes"),
        ("shape = '999999x999999'", "expected HEIGHTxWIDTH"),
        ("batch = 1000000000", "expected a whole number from 2 to 4096"),
        ("palette = 6.0", "palette is 6.0, expected one of"),
        ('decoder = "a\\u0000b"', "expected a path in quotes"),
        ("[quantization]\nsamples = 9999999999999999999", "samples is 9999999999999999999, expected a whole number"),
        ("[quantization]\nweights = 8.0", "weights is 8.0, expected one of"),
        ("[limits]\npicture_psnr_db = true", "picture_psnr_db is True, expected a number"),
    ],
)
def test_recipes_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert said in caught.value.message
    assert caught.value.hint


def test_a_recipe_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match="is a pipe, expected a file"):
        load_recipe(str(tmp_path / "recipe.toml"))
    with pytest.raises(FewstepError):
        load_recipe("a\0b.toml")

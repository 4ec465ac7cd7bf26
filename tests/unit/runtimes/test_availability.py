"""LiteRT and ExecuTorch where they are not installed, and what their recipes may ask for."""

from __future__ import annotations

from dataclasses import replace
from importlib import util
from pathlib import Path

import numpy as np
import pytest

from fewstep.bundle.contract import ComponentSpec
from fewstep.errors import ContractError, RecipeError, RuntimeMissingError
from fewstep.recipe.quantization import for_targets
from fewstep.recipe.recipe import load_recipe
from fewstep.recipe.target_profiles import PROFILES, REQUIRED
from fewstep.runtimes import get_runtime
from fewstep.runtimes.executorch import runtime as xnnpack
from fewstep.runtimes.litert import runtime as litert
from fewstep.runtimes.sampling.int32_feeds import narrow
from tests.support.quantized import W8A8, calls_of, plan_of, program_of, random, sites_of
from tests.support.quantized_net import Net

SPEC = ComponentSpec((), (), {}, "loop")


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Makes packages look as if they were not installed, and all others as if they were."""
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in packages else object())


@pytest.mark.parametrize(
    ("name", "hidden", "remedy"),
    [
        ("litert", "ai_edge_litert", "pip install ai-edge-litert"),
        ("executorch", "executorch", "pip install 'fewstep[executorch]'"),
    ],
)
def test_missing_runtime_says_what_to_install(
    name: str, hidden: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, hidden)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.0")
    state = get_runtime(name).availability()
    assert not state.compiles and not state.runs
    assert hidden.replace("_", "-") in state.detail and "not installed" in state.detail
    assert state.remedy == remedy
    with pytest.raises(RuntimeMissingError, match="not installed") as caught:
        get_runtime(name).open(Path("model"), SPEC, None)
    assert caught.value.hint == remedy


def test_litert_runs_where_it_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "litert_torch", "torch")
    monkeypatch.setattr(litert.metadata, "version", lambda _: "2.3.0")
    state = litert.availability()
    assert (state.compiles, state.runs, state.version) == (False, True, "2.3.0")
    assert state.detail == "CPU, XNNPACK; cannot compile without torch, litert_torch"
    assert state.remedy is not None and "environment of its own" in state.remedy


def test_executorch_needs_torch_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "torch")
    monkeypatch.setattr(xnnpack.metadata, "version", lambda _: "1.5.1")
    state = xnnpack.availability()
    assert (state.runs, state.detail) == (False, "torch not installed")


@pytest.mark.parametrize("target", ["litert", "executorch"])
def test_recipe_gets_the_profile_of_its_target(target: str) -> None:
    chosen = for_targets(load_recipe("w8a8").quantization, [target])
    assert chosen is not None and chosen.profile == REQUIRED[target] == target
    assert for_targets(None, [target]) is None
    plain = load_recipe("w8a8").quantization
    assert for_targets(plain, ["onnxruntime"]) is plain


def test_one_plan_cannot_be_of_two_profiles() -> None:
    with pytest.raises(RecipeError, match="a bundle has one plan for all of its targets"):
        for_targets(load_recipe("w8a8").quantization, ["onnxruntime", "litert"])


@pytest.mark.parametrize("target", ["litert", "executorch"])
def test_grids_of_steps_are_refused_before_anything_is_made(target: str) -> None:
    chosen = load_recipe("w8a8").quantization
    assert chosen is not None
    with pytest.raises(RecipeError, match=f"step_grids is 'each', and {target} has one grid for a tensor"):
        for_targets(replace(chosen, step_grids="each"), [target])


def test_executorch_refuses_recipes_that_only_store() -> None:
    with pytest.raises(RecipeError, match="can only multiply those") as caught:
        for_targets(load_recipe("w8").quantization, ["executorch"])
    assert caught.value.hint is not None and "w8a8" in caught.value.hint


def test_profiles_plan_what_xnnpack_computes() -> None:
    x = random(1, 4, 8, 8)
    program = program_of(Net(), x)
    litert_plan = plan_of(program, W8A8, calls_of(x), "litert")
    assert set(litert_plan.outputs) == set(litert_plan.computes) == set(sites_of(program))
    assert {grid.dtype for grid in litert_plan.activations.values()} == {"int8"}
    assert not PROFILES["executorch"].weight_only


def test_numbers_of_64_bits_are_narrowed_or_refused() -> None:
    given = {"i": np.array([-7, 1 << 30]), "x": np.ones(2, dtype=np.float32), "b": np.array([True])}
    found = narrow(given, "LiteRT")
    assert {name: str(array.dtype) for name, array in found.items()} == {"i": "int32", "x": "float32", "b": "bool"}
    np.testing.assert_array_equal(found["i"], given["i"])
    with pytest.raises(ContractError, match=f"i has {1 << 31}, beyond LiteRT's int32"):
        narrow({"i": np.array([1 << 31])}, "LiteRT")

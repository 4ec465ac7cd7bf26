"""The proof of a bundle: what is compared beside the networks' outputs, and that each of it can fail."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import fewstep
from fewstep.bundle.bundle import Bundle
from fewstep.bundle.samples import load_samples
from fewstep.errors import ContractError
from fewstep.pipeline.references import known_floor
from fewstep.proof.manifest_ties import check_limits, golden_ties
from fewstep.recipe.recipe import Limits
from fewstep.runtimes.onnxruntime.onnx_file import Cut, multiplies_unsigned, stored
from fewstep.runtimes.parity.harness import Agreement, Floor
from fewstep.runtimes.parity.host_arithmetic import first_place, host_checks
from fewstep.runtimes.parity.quantized import MOST_SPREAD_DB, floor_limit, recorded_floor_checks
from fewstep.runtimes.sampling.sampler import open_tokenizers
from tests.faults.__main__ import look
from tests.faults.seeded import FAULTS
from tests.support.bundles import built, plain
from tests.support.quantized import painted

LCM = (
    "b[0] + 1 %",
    "factor of the guidance embedding 1010",
    "pad id 0",
    "latent scale x 1.05",
    "output shift 0.52",
    "NaN for a word that no prompt has",
    "guidance scale 1 less",
)
PAINTER = ("lowest bit of one weight", "zero point + 1 where it is read", "bias of a product lost")


@pytest.mark.parametrize("name", LCM)
def test_a_seeded_fault_is_noticed_without_its_source_and_named(name: str) -> None:
    fault = next(fault for fault in FAULTS if fault.name == name)
    seen = look(fault, built("lcm").bundle.path)
    assert seen.golden and seen.localised, seen


@pytest.mark.parametrize("name", PAINTER)
def test_a_seeded_integer_is_noticed_without_its_source_and_named(name: str) -> None:
    fault = next(fault for fault in FAULTS if fault.name == name)
    seen = look(fault, painted("w8a8").bundle.path)
    assert seen.golden and seen.localised, seen


def test_golden_operations_are_compared_with_the_source_too() -> None:
    fault = next(fault for fault in FAULTS if fault.name == "integers of a golden operation")
    seen = look(fault, painted("w8a8").bundle.path, against="tests.support.quantized:painter")
    assert seen.live and seen.golden and seen.localised, seen


def test_a_right_bundle_passes_without_its_source() -> None:
    bundle = painted("w8a8").bundle
    result = fewstep.verify(bundle)
    assert result.report and result.place is None
    levels = {check.level for check in result.report.checks}
    assert {"stored", "host", "operation", "manifest"} <= levels
    assert any("one by one at those of the golden pack" in caveat for caveat in result.caveats)


def test_host_names_the_first_place_and_compares_every_sample() -> None:
    bundle = built("lcm").bundle
    golden = load_samples(bundle.path / "golden")
    tokenizers = open_tokenizers(bundle.path, bundle.manifest.tokenizers)
    right = host_checks(bundle.manifest, tokenizers, golden, 80.0)
    assert right and all(check.passed for check in right) and first_place(right) is None
    contract = replace(bundle.manifest.contract, latent_scale=bundle.manifest.contract.latent_scale * 1.05)
    wrong = host_checks(replace(bundle.manifest, contract=contract), tokenizers, golden, 80.0)
    assert first_place(wrong) == "latent scale"


def test_golden_heads_are_tied_to_the_manifest() -> None:
    bundle = built("lcm").bundle
    golden = load_samples(bundle.path / "golden")
    assert all(check.passed for check in golden_ties(bundle.manifest, golden))
    swapped = golden_ties(bundle.manifest, golden[::-1])
    assert {check.component for check in swapped if not check.passed} >= {"prompts"}


def test_limits_below_the_recipe_need_a_word() -> None:
    manifest = built("lcm").bundle.manifest
    low = {**manifest.recipe, "limits": {**manifest.recipe["limits"], "component_sqnr_db": 60.0}}
    assert check_limits(manifest) == Limits()
    with pytest.raises(ContractError, match="component_sqnr_db is 60 dB, expected 100 or more") as caught:
        check_limits(replace(manifest, recipe=low))
    assert "--limits bundle" in str(caught.value.hint)


def test_a_floor_that_no_network_has_is_refused() -> None:
    bundle = painted("w8a8").bundle
    assert known_floor(bundle).picture.median_db > 60
    parity = json.loads(json.dumps(bundle.manifest.parity))
    parity["floor"]["picture"]["median_db"] = -50.0
    with pytest.raises(ContractError, match="states a noise floor of -50 dB"):
        known_floor(Bundle(bundle.path, replace(bundle.manifest, parity=parity)))


def test_two_modes_make_no_loose_limit() -> None:
    two, sixteen = Agreement(60.0, 20.0, 2), Agreement(70.0, 20.0, 16)
    assert floor_limit(sixteen, 8, 60.0) == 60.0
    assert floor_limit(two, 2, 60.0) == 60.0 - 1 - 2 * 1.2533 * MOST_SPREAD_DB


def test_a_recorded_floor_far_below_the_measured_one_fails() -> None:
    measured = Floor({"denoiser": Agreement(50.0, 2.0, 16)}, Agreement(45.0, 2.0, 16))
    low = Floor({"denoiser": Agreement(30.0, 2.0, 16)}, Agreement(44.0, 2.0, 16))
    checks = recorded_floor_checks(low, measured, Limits(80.0, 60.0))
    assert [check.passed for check in checks] == [False, True]


def test_files_are_read_as_the_onnx_package_reads_them(tmp_path: Path) -> None:
    path = next(painted("w8a8").bundle.path.glob("onnxruntime/denoiser/model.onnx"))
    model = onnx.load(path)
    theirs = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    ours = dict(stored(path).constants())
    assert ours.keys() == {i for node in model.graph.node for i in node.input if i in theirs}
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values)
    assert multiplies_unsigned(path)
    assert not multiplies_unsigned(plain().path / "onnxruntime/denoiser/model.onnx")


def test_a_cut_model_is_a_model(tmp_path: Path) -> None:
    path = next(painted("w8a8").bundle.path.glob("onnxruntime/denoiser/model.onnx"))
    name = next(iter(stored(path).grids or {}))
    value = np.zeros((1, 3, 8, 8), dtype=np.uint8)
    cut = ir.load(Cut({name: value}, (name,)).write(path, tmp_path))
    assert f"{name}.given" in [v.name for v in cut.graph.inputs]
    assert [v.name for v in cut.graph.outputs] == [name]
    onnx.checker.check_model(onnx.load(path))


def test_nothing_hides_in_a_mask() -> None:
    from fewstep.runtimes.parity.stored_integers import _finite

    mask = np.triu(np.full((4, 4), -np.inf, dtype=np.float32), 1)
    assert _finite(mask)
    assert not _finite(np.array([1.0, math.nan], dtype=np.float32))
    assert not _finite(np.array([1.0, -math.inf], dtype=np.float32))
    assert not _finite(np.array([0.0, math.inf], dtype=np.float16))

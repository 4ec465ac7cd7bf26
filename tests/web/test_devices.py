"""A device's result is judged by the bundle's limits, and by what the golden pack would have compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.manifest import INTEGERS
from fewstep.bundle.samples import load_samples
from fewstep.cli import cli
from fewstep.errors import ContractError
from fewstep.pipeline.device_checks import MOST_BYTES, content_id, device_report, read_device_report
from fewstep.pipeline.verify import FLOOR_SAMPLES
from fewstep.runtimes.parity.harness import Agreement, ParityReport
from fewstep.runtimes.parity.quantized import floor_limit
from tests.support.bundles import built
from tests.support.quantized import painted
from tests.web.results import result_of


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return built("lcm").bundle


def written(folder: Path, result: Any) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps(result))
    return path


def test_good_result_is_one_more_executor(bundle: Bundle, tmp_path: Path) -> None:
    found = read_device_report(written(tmp_path, result_of(bundle)), bundle)
    assert found.report
    assert found.report.executor == "onnxruntime-web 1.30.0, wasm, 4 threads, in Chrome 140 on Android 15, 8 cores"
    assert found.to_json()["device"]["user_agent"] == "Mozilla/5.0"
    assert found.picture_ms == 400.0


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_compares_what_verify_compares_with_the_golden_pack(bundle: Bundle, precision: str) -> None:
    """Against an oracle that shares no code with the list of what is expected: the checks of a real verification."""
    bundle = bundle if precision == "fp32" else painted("w8a8").bundle
    from fewstep.bundle.samples import load_samples
    from fewstep.pipeline.verify import verify_against
    from fewstep.recipe.recipe import Limits

    golden = load_samples(bundle.path / "golden")
    checks = verify_against(bundle, golden, None, Limits(**bundle.manifest.recipe["limits"])).report.checks
    verified = {(c.level, c.component, c.step, c.sample, c.tensor, c.metric, c.limit) for c in checks}
    mine = device_report(result_of(bundle), bundle, where="result").report.checks
    found = {(c.level, c.component, c.step, c.sample, c.tensor, c.metric, c.limit) for c in mine}
    here = ("stored", "operation")  # a browser reads no files but as its runtime does
    assert verified - found == {key for key in verified if key[5] == "SSIM" or key[0] in here}
    assert found <= verified
    assert ("median SQNR dB" in {key[5] for key in found}) == (precision == "w8a8")


def test_whole_numbers_are_judged_by_the_noise_floor() -> None:
    bundle = painted("w8a8").bundle
    golden = load_samples(bundle.path / "golden")
    assert bundle.manifest.parity is not None
    floor = bundle.manifest.parity["floor"]
    floats = [a.component for a in bundle.manifest.artifacts if a.compute != INTEGERS]

    def judged(value: float) -> ParityReport:
        result = result_of(bundle, value)
        for check in result["checks"]:
            if check["level"] == "component" and check["component"] in floats:
                check["value"] = 130.0
        return device_report(result, bundle, where="result").report

    assert judged(60.0), "below float's limit, not below the floor's"
    report = judged(5.0)
    assert {"median SQNR dB", "median agreement dB"} <= {check.metric for check in report.failures}
    (pictures,) = (check for check in report.failures if check.level == "picture")
    assert pictures.limit == floor_limit(Agreement(**floor["picture"]), min(len(golden), FLOOR_SAMPLES), 60.0)


@pytest.mark.parametrize("value", [70.0, "nan", "-inf"])
def test_value_below_the_limit_fails_whatever_the_device_says(bundle: Bundle, value: float | str) -> None:
    result = result_of(bundle)
    result["checks"][3]["value"] = value
    report = device_report(result, bundle, where="result").report
    assert not report
    assert len(report.failures) == 1


def test_equal_results_pass(bundle: Bundle) -> None:
    assert device_report(result_of(bundle, math.inf), bundle, where="result").report


def test_what_was_not_compared_fails(bundle: Bundle) -> None:
    result = result_of(bundle)
    left_out = result["checks"].pop()
    report = device_report(result, bundle, where="result").report
    assert [check.sample for check in report.failures] == [left_out["sample"]]


def test_foreign_and_double_comparisons_are_refused(bundle: Bundle) -> None:
    result = result_of(bundle)
    result["checks"].append({**result["checks"][0], "component": "moon"})
    with pytest.raises(ContractError, match="result: the golden pack has no component of moon"):
        device_report(result, bundle, where="result")
    result["checks"][-1] = result["checks"][0]
    with pytest.raises(ContractError, match="is there twice"):
        device_report(result, bundle, where="result")


def test_file_that_is_no_result(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "large.json").write_bytes(b" " * (2 * MOST_BYTES))
    with pytest.raises(ContractError, match=f"has more than {MOST_BYTES} bytes"):
        read_device_report(tmp_path / "large.json", bundle)
    with pytest.raises(ContractError, match=r"executor/provider: 'npu' is not one of \['wasm', 'webgpu'\]"):
        changed = result_of(bundle)
        changed["executor"]["provider"] = "npu"
        read_device_report(written(tmp_path, changed), bundle)


def test_content_does_not_depend_on_reports(bundle: Bundle) -> None:
    from dataclasses import replace

    from fewstep.bundle.manifest import FileEntry

    other = FileEntry("0" * 64, 1)
    files = bundle.manifest.files
    report = replace(bundle.manifest, files={**files, "report/index.html": other})
    assert content_id(report) == content_id(bundle.manifest)
    network = replace(bundle.manifest, files={**files, bundle.manifest.artifacts[0].path: other})
    assert content_id(network) != content_id(bundle.manifest)


def test_verify_folds_results_in(bundle: Bundle, tmp_path: Path) -> None:
    path = written(tmp_path, result_of(bundle))
    options = ["--prompts", "1", "--seeds", "1"]
    done = CliRunner().invoke(cli, ["verify", str(bundle.path), *options, "--device-result", str(path), "--json"])
    assert done.exit_code == 0, done.output
    (device,) = json.loads(done.stdout)["devices"]
    assert device["passed"]
    assert device["executor"].startswith("onnxruntime-web 1.30.0")
    path = written(tmp_path, result_of(bundle, 20.0))
    done = CliRunner().invoke(cli, ["verify", str(bundle.path), *options, "--device-result", str(path)])
    assert done.exit_code == 1
    assert "device  onnxruntime-web 1.30.0, wasm, 4 threads, in Chrome 140 on Android 15" in done.stdout

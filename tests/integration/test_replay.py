"""A bundle replayed by another process: coverage is said, time is kept, and an injected difference is found."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from fewstep.bundle.bundle import Bundle, write_manifest
from fewstep.cli import cli
from fewstep.errors import RuntimeMissingError
from fewstep.optimize.quantize.apply import quantize
from fewstep.pipeline import replay as replaying
from fewstep.pipeline.replay import BETWEEN, replay
from fewstep.progress import Progress
from fewstep.runtimes.base import Executor, ExecutorState, Runtime
from fewstep.runtimes.executors import EXECUTORS
from fewstep.runtimes.executors.remote import Guest, Launch, remote_runtime
from fewstep.runtimes.onnxruntime import runtime as ort
from tests.support.bundles import plain
from tests.support.quantized import W8A8, calls_of, feeds, painted, plan_of, program_of, random

import torch  # isort: skip


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """Adds an executor that runs artifacts in a process of this machine."""
    return add(monkeypatch, Launch((sys.executable,), "another process", start_s=120, call_s=120))


def add(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> str:
    @contextmanager
    def at(runtime: Runtime, progress: Progress) -> Iterator[Runtime]:
        guest = Guest(launch, runtime.name)
        try:
            yield remote_runtime(runtime, guest)
        finally:
            guest.close()

    state = ExecutorState("elsewhere", True, "another process")
    monkeypatch.setitem(EXECUTORS, "elsewhere", Executor("elsewhere", lambda: state, at))
    return "elsewhere"


def test_a_float_bundle(elsewhere: str) -> None:
    found = replay(plain(), elsewhere)
    assert found.report
    assert "run by onnxruntime" in found.report.executor and "on another process" in found.report.executor
    assert "on this machine" in found.report.reference
    assert any(note.startswith("replayed all of the golden pack") for note in found.caveats)
    between = [check for check in found.report.checks if check.error == BETWEEN]
    assert {check.level for check in between} == {"component", "picture"}
    assert all(check.limit is not None and check.value > check.limit for check in between)


def test_a_bundle_of_whole_numbers(elsewhere: str) -> None:
    found = replay(painted("w8a8").bundle, elsewhere)
    assert found.report, found.report.failures
    assert any(c.metric == "median SQNR dB" for c in found.report.checks), "judged by the noise floor"
    assert any("not compared one by one" in note for note in found.caveats), "its source is gone: that is said"


def spoiled(folder: Path) -> Launch:
    """Returns a place that has other weights than this machine."""

    def put(path: Path) -> str:
        if path.suffix != ".onnx":
            return str(path)
        model = ir.load(path)
        initializers = [v for v in model.graph.initializers.values() if v.const_value is not None]
        value = max(initializers, key=lambda v: v.const_value.size)  # type: ignore[union-attr]
        array = value.const_value.numpy().copy()  # type: ignore[union-attr]
        array.flat[:4] = -array.flat[:4]
        value.const_value = ir.tensor(array, name=value.name)
        target = folder / path.name
        ir.save(model, target)
        return str(target)

    return Launch((sys.executable,), "another process", put=put, start_s=120, call_s=120)


def test_other_weights_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replay(plain(), add(monkeypatch, spoiled(tmp_path)))
    assert not found.report
    assert {check.error for check in found.report.failures} >= {"lowering", BETWEEN}


def test_coverage_is_said_where_time_is_short(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class _Slow(replaying._Budget):
        def took(self, started: float) -> None:
            self.longest_s = 1e6

    monkeypatch.setattr(replaying, "_Budget", _Slow)
    found = replay(painted("w8a8").bundle, elsewhere)
    assert len(found.results) == 1, "one in any case"
    (note,) = [note for note in found.caveats if note.startswith("replayed")]
    assert "replayed 3 of the golden pack's 6 network calls and 1 of its 3 pictures" in note
    assert found.report.checks


def test_native_is_the_trivial_case() -> None:
    found = replay(plain(), "native")
    assert found.report
    assert not [check for check in found.report.checks if check.error == BETWEEN]


def test_a_golden_pack_without_samples(tmp_path: Path) -> None:
    from fewstep.errors import BundleError

    folder = shutil.copytree(plain().path, tmp_path / "bundle")
    shutil.rmtree(folder / "golden")
    write_manifest(folder, plain().manifest)
    with pytest.raises(BundleError, match="has no golden samples"):
        replay(Bundle.open(folder), "native")


def test_operations_are_compared_one_by_one_elsewhere(tmp_path: Path) -> None:
    x = random(1, 16, 8, 8)
    program = program_of(torch.nn.Conv2d(16, 32, 3, padding=1), x)
    quantized = quantize(program, plan_of(program, replace(W8A8, weights=8), calls_of(x)))
    path = tmp_path / ort.RUNTIME.compile(quantized, tmp_path, "fp32").path
    guest = Guest(Launch((sys.executable,), "another process", start_s=120, call_s=120), "onnxruntime")
    try:
        there = remote_runtime(ort.RUNTIME, guest)
        assert there.compare_integers is not None
        found = there.compare_integers(quantized, path, feeds(program, x))
    finally:
        guest.close()
    assert ort.RUNTIME.compare_integers is not None
    assert found == ort.RUNTIME.compare_integers(quantized, path, feeds(program, x))
    assert found and all(point.largest <= 1 for point in found)
    assert np.isfinite([p.sqnr_db for p in found if p.sqnr_db is not None]).all()


def test_the_command_says_where_it_ran_and_how_much(elsewhere: str) -> None:
    arguments = ["verify", str(plain().path), "--executor", elsewhere, "--minutes", "3"]
    done = CliRunner().invoke(cli, [*arguments, "--json"], standalone_mode=False)
    values = json.loads(done.stdout)
    assert values["passed"] and "on another process" in values["executor"]
    assert any("of the golden pack" in note for note in values["caveats"])
    refused = CliRunner().invoke(cli, [*arguments, "--bisect"])
    assert refused.exit_code == 2 and "--bisect compares on this machine" in refused.output


def test_unknown_executor() -> None:
    with pytest.raises(RuntimeMissingError, match="unknown executor 'moon'"):
        replay(plain(), "moon")

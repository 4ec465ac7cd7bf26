"""`fewstep runtimes`: what compiles and runs here, and a runtime tried on this machine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from fewstep.cli import cli
from fewstep.cli.machines import print_trials
from fewstep.errors import RuntimeMissingError
from fewstep.pipeline.selftest import recipes_of, self_test
from fewstep.runtimes import RUNTIMES
from fewstep.runtimes.executors import get_executor
from fewstep.runtimes.onnxruntime import runtime as ort


def test_self_test_compiles_runs_and_compares() -> None:
    (trial,) = self_test("onnxruntime", ["fp32"])
    assert trial.error is None
    assert trial.checks > 3, "components, trajectory and result"
    assert trial.executor.startswith("onnxruntime")


def test_self_test_reports_a_runtime_that_computes_wrongly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def halved(path, spec, threads=None):  # type: ignore[no-untyped-def]
        session = ort.open_session(path, spec, threads)
        run = session.run
        session.run = lambda feeds: {name: 0.5 * value for name, value in run(feeds).items()}  # type: ignore[method-assign]
        return session

    monkeypatch.setitem(RUNTIMES, "onnxruntime", replace(ort.RUNTIME, open=halved))
    (trial,) = self_test("onnxruntime", ["fp32"])
    assert trial.error is not None and "below its limit" in trial.error
    print_trials("onnxruntime", [trial])
    assert "FAILED  onnxruntime fp32: " in capsys.readouterr().out


def test_recipes_of_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipes_of("onnxruntime") == ("fp32", "w8", "w8a8")
    monkeypatch.setitem(RUNTIMES, "floats", replace(ort.RUNTIME, name="floats", compare_integers=None))
    assert recipes_of("floats") == ("fp32", "w8"), "it has nothing to compare whole numbers with"


def test_a_runtime_that_cannot_run_is_listed_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> object:
        return replace(
            ort.availability(), runtime="gone", runs=False, detail="no engine", remedy="get one", stand_in="another"
        )

    monkeypatch.setitem(RUNTIMES, "gone", replace(ort.RUNTIME, name="gone", availability=gone))  # type: ignore[arg-type]
    done = CliRunner().invoke(cli, ["runtimes", "--json"], standalone_mode=False)
    values = json.loads(done.stdout)
    state = next(s for s in values["runtimes"] if s["runtime"] == "gone")
    assert (state["runs"], state["stand_in"], state["remedy"]) == (False, "another", "get one")
    assert {e["executor"] for e in values["executors"]} >= {"native"}
    text = CliRunner().invoke(cli, ["runtimes"], standalone_mode=False).stdout
    assert "no; checked" in text and "by another" in text


def test_unknown_names() -> None:
    with pytest.raises(RuntimeMissingError, match="unknown runtime 'nothing', expected one of onnxruntime"):
        self_test("nothing")
    with pytest.raises(RuntimeMissingError, match="unknown executor 'moon', expected one of native"):
        get_executor("moon")


def test_what_cannot_be_compiled_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> object:
        return replace(ort.availability(), compiles=False, detail="no compiler", remedy="install it")

    monkeypatch.setitem(RUNTIMES, "gone", replace(ort.RUNTIME, name="gone", availability=gone))  # type: ignore[arg-type]
    with pytest.raises(RuntimeMissingError, match="gone cannot be tried here: no compiler") as caught:
        self_test("gone")
    assert caught.value.hint == "install it"

"""What every test runs under: two cores, no network, the same random examples each time."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.command import Run

# Set before a test imports torch or a tokenizer. xdist runs one process per core, so each takes one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"

settings.register_profile("fewstep", deadline=None, derandomize=True)
settings.load_profile("fewstep")

# Optimum does not install beside transformers 5, and PEFT is not ours to need: `make interop` runs these.
collect_ignore = [f"interop/test_{name}.py" for name in ("optimum", "peft") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="session")
def repository() -> Path:
    """Returns the top folder of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture
def copy_bundle(tmp_path: Path) -> Callable[[str], Path]:
    """Returns a function that copies a tiny bundle, for tests that spoil it."""
    from tests.support.bundles import built

    def copy(kind: str) -> Path:
        return shutil.copytree(built(kind).bundle.path, tmp_path / f"{kind}-copy")

    return copy


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command line in this process and returns its status, stdout and stderr."""
    from fewstep import cli

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "stage-cache"))

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fewstep", *(str(a) for a in arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capfd.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table of the families that were built."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    found = [value for report in reports for name, value in report.user_properties if name == "family"]
    if found:
        from tests.support.families import Row, table

        terminalreporter.section("families")
        terminalreporter.write(table([Row.of(values) for values in found]))

"""The command line in this process, and what a refusal looks like."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command line in this process and returns its status, stdout and stderr."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "stage-cache"))

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fewstep", *(str(a) for a in arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capfd.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


def refused(run: Run, source: str | Path, tmp_path: Path, *options: str) -> str:
    """Builds, expects exit status 2 with a hint and no bundle or rest of one, and returns what was said."""
    out = tmp_path / "out" / "bundle"
    status, stdout, stderr = run("build", source, "-o", out, *options)
    assert status == 2, stderr
    assert "hint: " in stderr
    assert stdout == ""
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    return " ".join(stderr.split())

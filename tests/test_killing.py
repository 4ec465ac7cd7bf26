"""A few builds that are killed, and caches that are damaged; `make test-kill` does so with the built-in generator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny


@pytest.mark.slow  # eight builds
def test_killed_builds_resume_and_damaged_caches_are_repaired(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    source = tiny.lcm_folder(tmp_path / "source")
    build = [str(source), "--steps", "2", "--prompts", "1", "--seeds", "1"]
    command = [sys.executable, "-W", "ignore", "-m", "tests.killing", "--points", "3", "--damages", "2", "--", *build]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=repository)
    assert done.stdout, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["failures"] == []
    assert (outcome["killed"], outcome["damaged"], outcome["repaired"]) == (3, 2, 2)
    assert done.returncode == 0

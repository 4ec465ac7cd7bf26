"""Builds that are killed and caches that are damaged; `make test-kill` does so with the built-in generator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fewstep.cache import StageCache
from fewstep.disk import replacing, scratch
from fewstep.hashing import file_sha256


def pretended_build() -> None:
    """Stands for the command: two stages of a few files each, and a bundle of their results."""
    cache = StageCache()
    with replacing(Path(sys.argv[-1])) as folder:
        for n in range(2):

            def make(entry: Path, n: int = n) -> None:
                (entry / "deep").mkdir()
                for i in range(3):
                    with scratch() as temporary:
                        (temporary / "x").write_bytes(bytes([n, i]) * 500)
                        shutil.copyfile(temporary / "x", entry / "deep" / str(i))

            entry, _ = cache.get_or_make("stage", {"n": n}, make)
            shutil.copytree(entry / "deep", folder / str(n))
        (folder / "report").mkdir()
        (folder / "report" / "profile.json").write_text(str(time.time_ns()))
        files = {p.relative_to(folder).as_posix(): file_sha256(p) for p in folder.rglob("*") if p.is_file()}
        (folder / "manifest.json").write_text(json.dumps({"files": dict(sorted(files.items()))}))
    raise SystemExit(0)


def killed(before: str, repository: Path, *arguments: str) -> dict[str, Any]:
    """Returns what came of `tests.support.killing` in a process of its own, after some code."""
    code = f"from tests.support import killing\n{before}"
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=repository)
    assert done.stdout, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome | {"status": done.returncode}


_PRETENDED = """
import fewstep.cli
from tests.integration import test_killing
fewstep.cli.main = test_killing.pretended_build
"""
_RUN = "killing.main(libraries=False)"


def test_what_is_killed_50_times_resumes_and_what_is_damaged_50_times_is_repaired(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    outcome = killed(_PRETENDED + _RUN, repository, "--points", "50", "--damages", "50")
    assert outcome["failures"] == []
    assert (outcome["killed"], outcome["damaged"], outcome["repaired"], outcome["status"]) == (50, 50, 50, 0)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("from fewstep import cache; cache.damage = lambda *_: None", "other files"),
        ("from fewstep import owners, disk; disk.is_gone = lambda _: False", "left"),
        ("from fewstep import cache_entries, cache; cache.tidy = lambda _: None", "left"),
    ],
    ids=["unchecked", "nobody-gone", "untidy"],
)
def test_the_check_can_fail(
    fault: str, said: str, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    outcome = killed(f"{fault}\n{_PRETENDED}{_RUN}", repository, "--points", "20", "--damages", "10")
    assert outcome["status"] == 1
    assert any(said in failure for failure in outcome["failures"])


@pytest.mark.slow  # eight builds
def test_killed_builds_resume_and_damaged_caches_are_repaired(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    from tests.support import tiny

    source = tiny.lcm_folder(tmp_path / "source")
    build = [str(source), "--steps", "2", "--prompts", "1", "--seeds", "1"]
    outcome = killed("killing.main()", repository, "--points", "3", "--damages", "2", "--", *build)
    assert outcome["failures"] == []
    assert (outcome["killed"], outcome["damaged"], outcome["repaired"], outcome["status"]) == (3, 2, 2, 0)

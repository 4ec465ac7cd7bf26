"""Hostile bundles, recipes, plans, tokenizers and sources are refused with a sentence, in time, and nothing is done.

Each group is read in a process of its own, which watches its imports, writes and memory: see `tests.hostile`. `make
test-hostile` reads 11,000.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fewstep.errors import BundleError
from tests.hostile.cases import Case
from tests.hostile.watch import Watch
from tests.support.bundles import built, plain

ROOT = Path(__file__).parents[2]


def hostile(*arguments: str | Path) -> dict[str, Any]:
    """Returns what came of hostile inputs."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.hostile", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_bundles_tokenizers_and_recipes() -> None:
    found = hostile("--count", "460", "--bundles", built("lcm").bundle.path, plain().path)
    assert found["problems"] == []
    refused = sum(count for outcome, count in found["counts"].items() if outcome.endswith("refused"))
    assert refused > 270, "hostile inputs that nobody refuses show nothing"


def test_plans_and_sources() -> None:
    arguments = ("--bundles", built("lcm").bundle.path, "--sources", built("lcm").source)
    found = hostile("--count", "40", *arguments, "--kinds", "plan", "reference", "source")
    assert found["problems"] == []
    refused = sum(count for outcome, count in found["counts"].items() if outcome.endswith("refused"))
    assert refused > 15


def _wrong(what: str, tmp_path: Path) -> None:
    """Does something that no reader may do."""
    if what == "raises":
        raise KeyError("x")
    if what == "no hint":
        raise BundleError("x")
    if what == "writes":
        (tmp_path / "x").write_text("x")
    if what == "runs":
        subprocess.run(["true"], check=True)
    if what == "imports":
        __import__("hostile_canary")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raises", "KeyError"),
        ("no hint", "no hint: BundleError: x"),
        ("writes", "write "),
        ("runs", "subprocess.Popen"),
        ("imports", "import hostile_canary"),
    ],
)
def test_what_the_watch_notices(
    what: str, said: str, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.hostile.__main__ import _read

    (tmp_path / "hostile_canary.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    _, problem = _read(Case(lambda: _wrong(what, tmp_path)), watch)
    assert said in str(problem)
    assert _read(Case(lambda: None), watch) == ("read", None)


@pytest.fixture(scope="module")
def watch() -> Watch:
    """A hook cannot be taken away, so there is one."""
    return Watch()

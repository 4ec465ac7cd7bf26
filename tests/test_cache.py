"""The stage cache: results appear whole, and processes that make the same one at once do not disturb each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.cache import StageCache


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_result_is_made_once_for_each_key(tmp_path: Path) -> None:
    cache, made = StageCache(tmp_path), []

    def make(folder: Path) -> None:
        made.append((folder / "result").write_text("1"))

    first, second, other = (cache.get_or_make("stage", {"n": n}, make) for n in (1, 1, 2))
    assert [first[1], second[1], other[1]] == [False, True, False]
    assert first[0] == second[0] != other[0]
    assert len(made) == 2
    assert cache.folder("stage", {"n": 1}) == first[0]


def test_the_first_of_two_processes_keeps_its_result(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)

    def late(folder: Path) -> None:
        cache.get_or_make("stage", {}, lambda other: (other / "result").write_text("first"))
        (folder / "result").write_text("second")

    entry, known = cache.get_or_make("stage", {}, late)
    assert known
    assert (entry / "result").read_text() == "first"
    assert names(tmp_path / "stage") == [entry.name]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        StageCache(tmp_path).get_or_make("stage", {}, fail)
    assert names(tmp_path / "stage") == []

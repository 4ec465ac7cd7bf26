"""The stage cache: results appear whole, and processes that make the same one at once do not disturb each other."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewstep.cache import StageCache, default_limit, prune
from fewstep.cache_entries import INDEX, any_damage, content_name, damage, hold, is_as_named, size_bytes
from fewstep.errors import StorageError
from fewstep.owners import tag


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


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


DAMAGES = {
    "empty": lambda entry: (entry / "result").write_text(""),
    "flipped": lambda entry: (entry / "result").write_text("2"),
    "truncated": lambda entry: (entry / "deep" / "more").write_bytes(b"a" * 7),
    "missing": lambda entry: (entry / "deep" / "more").unlink(),
    "extra": lambda entry: (entry / "extra").touch(),
    "no-index": lambda entry: (entry / INDEX).unlink(),
    "empty-index": lambda entry: (entry / INDEX).write_text(""),
    "list-index": lambda entry: (entry / INDEX).write_text("[]"),
    "edited-index": lambda entry: edit(entry / INDEX, '"key": "', '"key": "0'),
    "link": lambda entry: (entry / "linked").symlink_to(entry / "result"),
    "only-the-folder": lambda entry: (shutil.rmtree(entry), entry.mkdir()),
}


def make_two(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "result").write_text("1")
    (folder / "deep" / "more").write_bytes(b"a" * 8)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_entries_are_made_again(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = StageCache(tmp_path)
    entry, _ = cache.get_or_make("stage", {}, make_two)
    assert damage(entry) is None
    DAMAGES[kind](entry)
    assert any_damage(entry) is not None
    again, known = cache.get_or_make("stage", {}, make_two)
    assert (again, known, damage(entry)) == (entry, False, None)
    assert (entry / "result").read_text() == "1"
    assert "damaged entry, which is made again" in caplog.text
    assert names(tmp_path / "stage") == [entry.name]


def test_an_entry_of_another_result_is_not_used(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    one, two = (cache.get_or_make("stage", {"n": n}, lambda at: (at / "x").touch())[0] for n in (1, 2))
    shutil.rmtree(two)
    shutil.copytree(one, two)
    assert cache.get_or_make("stage", {"n": 2}, lambda at: (at / "x").touch())[1] is False


def test_files_named_by_their_content_are_checked(tmp_path: Path) -> None:
    (tmp_path / "new.bin").write_bytes(b"abc")
    name = content_name("00000-key", tmp_path / "new.bin")
    (tmp_path / "new.bin").rename(tmp_path / name)
    assert is_as_named(tmp_path / name)
    assert any_damage(tmp_path) is None
    (tmp_path / name).write_bytes(b"abd")
    assert not is_as_named(tmp_path / name)
    assert any_damage(tmp_path) == f"{name} was altered"
    assert not is_as_named(tmp_path / "missing")


def filled(root: Path, count: int) -> list[Path]:
    """Makes entries of 1000 bytes and more, of which the first was used least recently, and lets go of them."""
    cache, entries = StageCache(root), []
    for n in range(count):
        entries.append(cache.get_or_make("stage", {"n": n}, lambda at: (at / "x").write_bytes(bytes(1000)))[0])
        os.utime(entries[-1], (n + 1, n + 1))
    return entries


def test_the_least_recently_used_goes_beyond_the_limit(tmp_path: Path) -> None:
    entries = filled(tmp_path, 4)
    size = size_bytes(entries[0])
    cache = StageCache(tmp_path, limit=3 * size + 100)
    cache.get_or_make("stage", {"n": 0}, lambda _: pytest.fail("is there"))
    cache.get_or_make("stage", {"n": 9}, lambda at: (at / "x").write_bytes(bytes(1000)))
    assert not entries[1].exists() and not entries[2].exists()
    assert entries[0].exists() and entries[3].exists(), "the first was used just now"


def test_what_is_in_use_is_not_pruned(tmp_path: Path) -> None:
    entries = filled(tmp_path, 2)
    held = StageCache(tmp_path)
    held.get_or_make("stage", {"n": 0}, lambda _: pytest.fail("is there"))
    other = hold(entries[1])
    foreign = other.with_name(other.name.replace(f"-{tag()}-", f"-{'0' * 8}-{'0' * 8}-1-1-"))
    other.rename(foreign)
    assert prune(tmp_path, older_s=None, most=0, now=time.time()) == [], "this process's and another machine's"
    del held
    foreign.unlink()
    assert len(prune(tmp_path, older_s=None, most=0, now=time.time())) == 2


def test_old_entries_and_abandoned_rests_are_pruned(tmp_path: Path) -> None:
    entries = filled(tmp_path, 3)
    os.utime(entries[2])
    (tmp_path / "stage" / ".partial-of-an-old-version").mkdir()
    assert prune(tmp_path, older_s=3600.0, most=None, now=time.time()) == entries[:2]
    later = prune(tmp_path, older_s=None, most=None, now=time.time() + 8 * 86400)
    assert [path.name for path in later] == [".partial-of-an-old-version"]
    assert names(tmp_path / "stage") == [entries[2].name]


def test_rests_of_killed_builds_go_with_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from fewstep.cache import StageCache\n"
        "def die(at): (at / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "StageCache(Path(sys.argv[1])).get_or_make('stage', {}, die)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert len(names(tmp_path / "stage")) == 1
    StageCache(tmp_path).get_or_make("other", {}, lambda at: (at / "x").touch())
    assert names(tmp_path / "stage") == []
    assert names(tmp_path / ".use") == []


@pytest.mark.parametrize(("text", "bytes_"), [("20GB", 20 * 10**9), ("none", None), ("", 64 * 10**9)])
def test_limits(text: str, bytes_: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE_LIMIT", text)
    assert default_limit() == bytes_


def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE_LIMIT", "much")
    with pytest.raises(StorageError, match="FEWSTEP_CACHE_LIMIT is 'much', expected a size"):
        StageCache()


def test_a_cache_that_is_full_or_read_only_is_one_sentence(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="no space left on the disk") as caught:
        StageCache(tmp_path).get_or_make("stage", {}, full)
    assert "FEWSTEP_CACHE" in str(caught.value.hint) or "TMPDIR" in str(caught.value.hint)
    (tmp_path / "file").touch()
    with pytest.raises((StorageError, NotADirectoryError)):
        StageCache(tmp_path / "file").get_or_make("stage", {}, make_two)

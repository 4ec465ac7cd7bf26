"""Entries of the stage cache as folders: sealed with the hash of their content, checked, listed and removed.

An entry is a folder of a stage, ``<root>/<stage>/<32 hex digits>``, of one of two kinds. A sealed one was made at once
and has an index with the size and hash of each of its files, written last. A filled one grows over several runs: each
of its data files has the hash of its content in its name.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fewstep import disk
from fewstep.disk import begin, discard, remove_stale, sync
from fewstep.hashing import file_sha256, value_sha256
from fewstep.owners import is_gone, tag

INDEX = ".index.json"
_ENTRY = re.compile(r"[0-9a-f]{32}")
_NAMED = re.compile(r".+-([0-9a-f]{32})\.[a-z]+")
_USE = ".use"  # a folder of notes, beside those of the stages
PARTIAL = "."
# Rests of processes that cannot be asked (of another machine, or of versions that did not say whose they are) are
# removed when nothing was written to them for so long.
_ABANDONED_S = 7 * 86400
_notes = itertools.count()


@dataclass(frozen=True)
class Entry:
    """A stage's result in the cache: how large it is, and when it was last used, in seconds since 1970."""

    path: Path
    bytes: int
    used: float

    @property
    def stage(self) -> str:
        """The stage whose result it is."""
        return self.path.parent.name


def seal(folder: Path, key: str) -> None:
    """Writes the index of a folder that is done, and waits until all of it is on the disk."""
    files = {name: [(folder / name).stat().st_size, file_sha256(folder / name)] for name in _files(folder)}
    content = {"key": key, "files": files}
    (folder / INDEX).write_text(json.dumps({**content, "sha256": value_sha256(content)}, indent=1), encoding="utf-8")
    sync(folder)


def damage(folder: Path, key: str | None = None) -> str | None:
    """Returns what is wrong with a sealed entry, None if every file is there as it was written and no other is."""
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if content.pop("sha256") != value_sha256(content):
            return f"{INDEX} was altered"
        files: dict[str, tuple[int, str]] = content["files"]
        if key is not None and content["key"] != key:
            return f"{INDEX} is of another result"
        present = _files(folder)
        for name in sorted(set(files) ^ present):
            return f"{name} is {'missing' if name in files else 'not its own'}"
        for name, (size, sha256) in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
            if file_sha256(folder / name) != sha256:
                return f"{name} was altered"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{INDEX} was altered"
    return None


def content_name(stem: str, content: Path) -> str:
    """Returns a name that carries the hash of a file's content, for an entry that grows over several runs."""
    return f"{stem}-{file_sha256(content)[:32]}{content.suffix}"


def is_as_named(path: Path) -> bool:
    """Returns whether a file's content is what its name says; False for one that cannot be read."""
    found = _NAMED.fullmatch(path.name)
    try:
        return found is not None and file_sha256(path)[:32] == found[1]
    except OSError:
        return False


def any_damage(entry: Path) -> str | None:
    """Returns what is wrong with an entry of either kind."""
    if (entry / INDEX).exists() or not any(_NAMED.fullmatch(path.name) for path in _inside(entry)):
        return damage(entry)
    bad = [p.name for p in sorted(_inside(entry)) if _NAMED.fullmatch(p.name) and not is_as_named(p)]
    return f"{bad[0]} was altered" if bad else None


def entries(root: Path) -> list[Entry]:
    """Returns the entries of a cache, those first that were used least recently."""
    found = []
    for stage in _inside(root):
        for path in _inside(stage):
            if _ENTRY.fullmatch(path.name):
                with suppress(FileNotFoundError):  # removed meanwhile
                    found.append(Entry(path, size_bytes(path), path.stat().st_mtime))
    return sorted(found, key=lambda entry: (entry.used, entry.path))


def size_bytes(folder: Path) -> int:
    """Returns the bytes of all files in a folder; those that vanish meanwhile are nothing."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += 0 if path.is_dir() else path.lstat().st_size
    return total


def touch(entry: Path) -> None:
    """Notes that an entry is used now; a cache that cannot be written keeps no such notes."""
    with suppress(OSError):
        os.utime(entry)


def hold(entry: Path) -> Path:
    """Notes that this process uses an entry, so that no other removes it; returns the note."""
    note = entry.parents[1] / _USE / f"{entry.parent.name}-{entry.name}-{tag()}-{next(_notes)}"
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    return note


def is_held(entry: Path) -> bool:
    """Returns whether a process that runs, or that cannot be asked, uses an entry."""
    notes = (p for p in _inside(entry.parents[1] / _USE) if p.name.startswith(f"{entry.parent.name}-{entry.name}-"))
    return any(not is_gone(note.name) for note in notes)


def remove_entry(entry: Path) -> bool:
    """Removes an entry that no process uses, and returns whether it did."""
    if is_held(entry):
        return False
    aside = begin(entry.parent, PARTIAL)
    try:
        entry.replace(aside / entry.name)
        if is_held(entry):  # somebody came between the look and the move
            with suppress(OSError):
                (aside / entry.name).replace(entry)
            return False
    except FileNotFoundError:
        return False
    finally:
        discard(aside)
    return True


def tidy(root: Path) -> None:
    """Removes what processes that have ended left: unfinished results, and notes of use."""
    remove_stale(root / _USE, "")
    for stage in _inside(root):
        remove_stale(stage, PARTIAL)


def abandoned(root: Path, now: float | None = None) -> Iterator[Path]:
    """Yields unfinished results whose processes cannot be asked, and which nothing was written to for a week."""
    now = time.time() if now is None else now
    for stage in _inside(root):
        for path in _inside(stage):
            if stage.name == _USE or path.name.startswith(f".{disk.PARTIAL}"):
                newest = max([_changed(path), *(_changed(p) for p in path.rglob("*"))])
                if now - newest > _ABANDONED_S:
                    yield path


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _files(folder: Path) -> set[str]:
    """Returns the names of all files of a folder but its index."""
    names = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    return names - {INDEX}


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []

"""A store of finished stage results, keyed by the hash of everything that determines them.

A build that was killed picks up at the first stage that had not finished. Entries appear by rename with the hash of
their content, are checked when they are used, and made again when they are damaged.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

from fewstep.cache_entries import (
    PARTIAL,
    abandoned,
    any_damage,
    damage,
    entries,
    hold,
    remove_entry,
    seal,
    tidy,
    touch,
)
from fewstep.disk import begin, discard, remove, sync_names
from fewstep.errors import RecipeError, StorageError
from fewstep.faults import Place, writing_to
from fewstep.hashing import folder_sha256, value_sha256
from fewstep.recipe.quantization import parse_size

_LIMIT = "FEWSTEP_CACHE_LIMIT"
_DEFAULT_LIMIT = "64GB"
_HINT = (
    "set FEWSTEP_CACHE to a folder that can be written and has more space; "
    "`fewstep cache prune --older 7` frees what was not used for a week"
)
_log = logging.getLogger("fewstep")


def default_root() -> Path:
    """Returns ``$FEWSTEP_CACHE``, or ``fewstep`` in the user's cache folder."""
    if explicit := os.environ.get("FEWSTEP_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"


def cache_place(root: Path | None = None) -> Place:
    """Returns the cache as a place that is written to, with what to do when it cannot be."""
    return Place(root or default_root(), "the stage cache", _HINT)


def default_limit() -> int | None:
    """Returns how many bytes the cache may hold: ``$FEWSTEP_CACHE_LIMIT``, a size or ``none``; 64GB unless set.

    Raises:
        StorageError: it is neither.
    """
    text = os.environ.get(_LIMIT) or _DEFAULT_LIMIT
    if text.strip().lower() == "none":
        return None
    try:
        return parse_size(text, _LIMIT)
    except RecipeError as error:
        raise StorageError(error.message, hint=f"for example {_DEFAULT_LIMIT}, or none") from error


@cache
def code_sha256() -> str:
    """Returns the hash of fewstep's own source, so that a changed compiler never reuses an old result."""
    root = Path(__file__).resolve().parent
    # Links among the folders are followed; the command line and the report decide no stage's result.
    return value_sha256([_python_sha256(root / name) for name in ("", *_CODE)])


# Folders whose code decides what a stage gives.
_CODE = (
    "bundle",
    "calibration",
    "export",
    "numerics",
    "optimize",
    "pipeline",
    "proof",
    "recipe",
    "runtimes",
    "text",
)


def _python_sha256(folder: Path) -> str:
    folder = folder.resolve()
    return folder_sha256(folder, folder.glob("*.py") if folder.name == "fewstep" else folder.rglob("*.py"))


class StageCache:
    """Folders by key. Those that were asked for are kept from pruning until this object is gone."""

    def __init__(self, root: Path | None = None, limit: int | None = None) -> None:
        """Opens a cache, which need not exist.

        Args:
            root: its folder; None takes `default_root`.
            limit: bytes that it may hold, beyond which the least recently used goes; None takes `default_limit`.

        Raises:
            StorageError: see `default_limit`.
        """
        self.root = root or default_root()
        self._limit = default_limit() if limit is None else limit
        self._notes: set[Path] = set()
        self._tidy = False
        weakref.finalize(self, _release, self._notes)

    def get_or_make(self, stage: str, key: Mapping[str, object], make: Callable[[Path], object]) -> tuple[Path, bool]:
        """Returns the folder of a stage's result and whether it was there; ``make(folder)`` fills a new one.

        Raises:
            StorageError: the cache cannot be written.
        """
        entry, digest = self.root / stage / self._name(stage, key)[:32], self._name(stage, key)
        self._use(entry)
        with writing_to(cache_place(self.root)):
            if self._is_good(entry, digest):
                return entry, True
            entry.parent.mkdir(parents=True, exist_ok=True)
            partial = begin(entry.parent, PARTIAL)
            try:
                make(partial)
                seal(partial, digest)
                made = self._appeared(partial, entry, digest)
            finally:
                discard(partial)
        self.shrink()
        return entry, not made

    def folder(self, stage: str, key: Mapping[str, object]) -> Path:
        """Returns a folder that a stage may fill over several runs, which knows itself what in it is finished.

        Its data files have names by `fewstep.cache_entries.content_name`.
        """
        entry = self.root / stage / self._name(stage, key)[:32]
        self._use(entry)
        touch(entry)
        return entry

    def shrink(self, most: int | None = None) -> list[Path]:
        """Removes what was used least recently until no more than so many bytes are left, and returns it.

        What a process uses stays. None takes the cache's own limit.
        """
        most = self._limit if most is None else most
        if most is None:
            return []
        kept = entries(self.root)
        total, removed = sum(entry.bytes for entry in kept), []
        for entry in kept:
            if total <= most:
                break
            if remove_entry(entry.path):
                removed.append(entry.path)
                total -= entry.bytes
        return removed

    def _name(self, stage: str, key: Mapping[str, object]) -> str:
        return value_sha256({"stage": stage, "code": code_sha256(), **key})

    def _use(self, entry: Path) -> None:
        if not self._tidy:
            self._tidy = True
            tidy(self.root)
        self._notes.add(hold(entry))

    def _is_good(self, entry: Path, digest: str) -> bool:
        """Returns whether there is an entry whose content is what was written; a damaged one is removed."""
        if not entry.is_dir():
            return False
        found = damage(entry, digest)
        if found is None:
            touch(entry)
            return True
        _log.warning("the stage cache had a damaged entry, which is made again: %s: %s", entry, found)
        aside = begin(entry.parent, PARTIAL)
        try:
            entry.replace(aside / entry.name)
        except FileNotFoundError:
            pass  # another process found the same
        finally:
            discard(aside)
        return False

    def _appeared(self, partial: Path, entry: Path, digest: str) -> bool:
        """Renames a folder that is done; returns False where another process was first with the same entry."""
        partial.chmod(0o755)
        try:
            partial.replace(entry)
        except OSError:
            if not entry.is_dir():
                raise
            if self._is_good(entry, digest):
                return False
            partial.replace(entry)
        sync_names(entry.parent)
        return True


def prune(root: Path, *, older_s: float | None, most: int | None, bad: bool = False, now: float) -> list[Path]:
    """Removes entries that were not used for so long, then the least recently used beyond a size; returns them.

    With ``bad``, damaged ones first.

    Unfinished results that nobody can be working on go, too. What a process uses stays.
    """
    tidy(root)
    removed = list(abandoned(root, now))
    for path in removed:
        remove(path)
    if bad:
        removed += [path for path, _ in damaged(root) if remove_entry(path)]
    if older_s is not None:
        removed += [e.path for e in entries(root) if now - e.used > older_s and remove_entry(e.path)]
    if most is not None:
        removed += StageCache(root, most).shrink()
    return removed


def damaged(root: Path) -> list[tuple[Path, str]]:
    """Returns the damaged entries of a cache, and what is wrong with each."""
    found = ((entry.path, any_damage(entry.path)) for entry in entries(root))
    return [(path, said) for path, said in found if said is not None]


def _release(notes: Iterable[Path]) -> None:
    for note in notes:
        remove(note)

"""A store of finished stage results, keyed by the hash of everything that determines them.

A build that was killed picks up at the first stage that had not finished. Entries appear by rename, so an entry that
exists is whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from fewstep.errors import BundleError
from fewstep.hashing import folder_sha256, value_sha256


def default_root() -> Path:
    """Returns ``$FEWSTEP_CACHE``, or ``fewstep`` in the user's cache folder."""
    if explicit := os.environ.get("FEWSTEP_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"


@cache
def code_sha256() -> str:
    """Returns the hash of fewstep's own source, so that a changed compiler never reuses an old result."""
    root = Path(__file__).resolve().parent
    folders = [root, *(root / name for name in ("export", "calibration", "optimize", "runtimes"))]
    return value_sha256([folder_sha256(f, f.resolve().glob("*.py")) if f is root else _linked(f) for f in folders])


def _linked(folder: Path) -> str:
    folder = folder.resolve()
    return folder_sha256(folder, folder.rglob("*.py"))


class StageCache:
    """Folders by key."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def get_or_make(self, stage: str, key: Mapping[str, object], make: Callable[[Path], object]) -> tuple[Path, bool]:
        """Returns the folder of a stage's result and whether it was there; ``make(folder)`` fills a new one."""
        digest = value_sha256({"stage": stage, "code": code_sha256(), **key})
        entry = self.root / stage / digest[:32]
        if entry.is_dir():
            return entry, True
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=entry.parent))
        except OSError as error:
            raise BundleError(
                f"cannot write the stage cache {self.root}: {error.strerror}",
                hint="set FEWSTEP_CACHE to a folder you can write",
            ) from error
        try:
            make(partial)
            return entry, not _appeared(partial, entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def folder(self, stage: str, key: Mapping[str, object]) -> Path:
        """Returns a folder that a stage may fill over several runs, which knows itself what in it is finished."""
        return self.root / stage / value_sha256({"stage": stage, "code": code_sha256(), **key})[:32]


def _appeared(partial: Path, entry: Path) -> bool:
    """Renames a folder that is done; returns False where another process was first with the same entry."""
    try:
        partial.replace(entry)
    except OSError:
        if not entry.is_dir():
            raise
        return False
    return True

"""Files and folders that appear whole or not at all, on the disk itself, and leave nothing behind a killed process."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fewstep.errors import StorageError
from fewstep.faults import Place, said_of, temporary_place, writing_to
from fewstep.owners import is_gone, tag

PARTIAL = "partial-"
_SCRATCH = "fewstep-"
_ELSEWHERE = "free some space there, or choose another folder"
# What this process has begun and not finished; whoever ends it at once removes these.
_begun: set[Path] = set()


@contextmanager
def replacing(target: Path, *, what: str = "the result", hint: str = _ELSEWHERE) -> Iterator[Path]:
    """Yields a temporary folder beside ``target`` that takes its place when the block ends without an error.

    What a killed process left of an earlier try is removed first. An existing folder is exchanged for the new one.

    Raises:
        StorageError: it cannot be written; ``hint`` says what to do.
    """
    target = target.resolve()
    with beside(target, what=what, hint=hint) as partial:
        yield partial
        sync(partial)
        partial.chmod(0o755)
        _take_place(partial, target)
        sync_names(target.parent)


@contextmanager
def beside(target: Path, *, what: str = "the result", hint: str = _ELSEWHERE) -> Iterator[Path]:
    """Yields a temporary folder beside ``target``, on its disk; what is left in it goes when the block ends.

    Raises:
        StorageError: it cannot be written; ``hint`` says what to do.
    """
    with writing_to(Place(target, what, hint, target.parent)):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = begin(target.parent, f".{target.name}.")
        try:
            yield partial
        finally:
            discard(partial)


def write_whole(path: Path, content: bytes, *, what: str = "the result", hint: str = _ELSEWHERE) -> None:
    """Writes a file whole or not at all.

    Raises:
        StorageError: it cannot be written; ``hint`` says what to do.
    """
    with beside(path, what=what, hint=hint) as folder:
        partial = folder / path.name
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yields a folder for temporary files that is removed when the block ends; those of killed processes go, too.

    Raises:
        StorageError: there is none, or it is full.
    """
    place = temporary_place()
    with writing_to(place):
        folder = begin(place.path, _SCRATCH)
        try:
            yield folder
        finally:
            discard(folder)


def begin(parent: Path, prefix: str) -> Path:
    """Returns a new folder whose name says whose it is, after removing those of processes that have ended."""
    remove_stale(parent, prefix + PARTIAL)
    made = Path(tempfile.mkdtemp(prefix=f"{prefix}{PARTIAL}{tag()}-", dir=parent))
    _begun.add(made)
    return made


def discard(folder: Path) -> None:
    """Removes a folder that was begun, or what is left of it."""
    shutil.rmtree(folder, ignore_errors=True)
    _begun.discard(folder)


def discard_all() -> None:
    """Removes all that this process has begun: for one that must end now."""
    for folder in list(_begun):
        discard(folder)


def remove_stale(parent: Path, prefix: str) -> list[Path]:
    """Removes files and folders of a prefix whose processes have ended, and returns them."""
    gone = [path for path in _inside(parent) if path.name.startswith(prefix) and is_gone(path.name)]
    for path in gone:
        remove(path)
    return gone


def remove(path: Path) -> None:
    """Removes a file or a folder; another process may be doing the same."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def check_place(parent: Path, hint: str) -> None:
    """Creates a folder if it is not there, and tries to write to it.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        said = said_of(error.errno) or error.strerror or str(error)
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            said = "it is not a folder"
        raise StorageError(f"cannot write to {parent}: {said}", hint=hint) from error


def sync(path: Path) -> None:
    """Waits until a file, or all of a folder, is on the disk: a power cut after a rename must not empty it."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if not p.is_symlink()]
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    for folder in [p for p in [path, *files] if p.is_dir()]:
        sync_names(folder)


def sync_names(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can say so."""
    with suppress(OSError):  # Windows opens no folders, some network disks cannot
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _take_place(partial: Path, target: Path) -> None:
    """Puts a folder where another may be: at no moment is there neither."""
    if not target.exists():
        partial.replace(target)
        return
    if _exchange(partial, target):
        return
    old = begin(target.parent, f".{target.name}.")
    target.replace(old / target.name)
    partial.replace(target)
    discard(old)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two names in one step, where the system can: renameat2(2) of Linux, renamex_np(2) of macOS."""
    names = os.fsencode(a), os.fsencode(b)
    system = platform.system()
    with suppress(AttributeError, OSError):
        if system == "Linux":
            here = -100  # AT_FDCWD
            return bool(ctypes.CDLL(None).renameat2(here, names[0], here, names[1], 2) == 0)  # RENAME_EXCHANGE
        if system == "Darwin":
            return bool(ctypes.CDLL(None).renamex_np(*names, 2) == 0)  # RENAME_SWAP
    return False

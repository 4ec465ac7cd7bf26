"""What goes wrong outside fewstep, as one sentence: a full disk, a missing package, too little memory.

Libraries report a full disk in many ways: an OSError with or without a path, a list of all files that could not be
copied, an error of their own with a number in its text. One place reads them all.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fewstep.errors import FewstepError, RuntimeMissingError, StorageError

_SAID = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
    errno.EFBIG: "the file would be larger than is allowed here",
    errno.EIO: "the disk reports a fault",
}
_FULL = errno.ENOSPC, errno.EDQUOT
_MEMORY = re.compile(r"DefaultCPUAllocator: (can't|not enough)|std::bad_alloc|[Cc]annot allocate memory")
_EXTRA = re.compile(r"([\w.-]+)[^;]*;.*\bextra == ['\"]([\w-]+)['\"]")
_READ_TOO = errno.EACCES, errno.EPERM, errno.EIO
# How libraries put an errno into a text: safetensors and tokenizers (Rust), Python's own in lists of errors, ONNX
# Runtime twice.
_NUMBERS = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]|errcode = (\d+)|system error number (\d+)")
# What of torch's and protobuf's writers is known to say no more than that they could not write.
_WRITERS = re.compile(r"PytorchStreamWriter failed writing|unexpected pos \d+ vs|basic_ios::clear|iostream error")
_NO_TEMPORARY = "No usable temporary directory"
_DEEP = 8


@dataclass(frozen=True)
class Place:
    """A folder that is written to: what it is for, and what to do when it cannot be written."""

    path: Path
    what: str
    hint: str
    within: Path | None = None
    """A temporary folder whose files are meant for ``path``."""

    def holds(self, name: Path) -> bool:
        """Returns whether a file is written for this place."""
        return any(name.is_relative_to(root) for root in (self.path, self.within) if root is not None)


_active: ContextVar[tuple[Place, ...]] = ContextVar("places that are written to, the innermost first", default=())


def temporary_place() -> Place:
    """Returns the folder of temporary files.

    Raises:
        StorageError: there is none that can be written.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        raise _no_temporary(error) from error
    return Place(folder, "temporary files", "free some space there, or set TMPDIR to a folder with more")


def _no_temporary(error: OSError) -> StorageError:
    return StorageError(
        f"there is no folder for temporary files: {error.strerror or error}",
        hint="set TMPDIR to a folder you can write",
    )


def said_of(number: int | None) -> str | None:
    """Returns what an errno of a disk is called, None for others."""
    return None if number is None else _SAID.get(number)


@contextmanager
def writing_to(place: Place) -> Iterator[None]:
    """Turns what a full or forbidden disk makes of the block into one sentence.

    Raises:
        StorageError: something could not be written there, or to the folder of temporary files.
    """
    token = _active.set((place, *_active.get()))
    try:
        yield
    except FewstepError:
        raise
    except Exception as error:
        found = storage_error(error)
        if found is None:
            raise
        raise found from error
    finally:
        _active.reset(token)


def storage_error(error: BaseException, places: Sequence[Place] = ()) -> StorageError | None:
    """Returns what an error says of a disk, None if it is about something else.

    Args:
        error: of any library; those that it came from are looked at, too.
        places: what may have been written beside those of `writing_to` now and the temporary files.
    """
    places = [*_active.get(), *places]
    for cause in _causes(error):
        if isinstance(cause, OSError) and _NO_TEMPORARY in str(cause):
            return _no_temporary(cause)
        number = _number(cause)
        if number in _SAID:
            return _sentence(number, _file_of(cause), [*places, temporary_place()])
    return None


def _sentence(number: int, name: Path | None, places: Sequence[Place]) -> StorageError | None:
    said, holding = _SAID[number], [place for place in places if name is None or place.holds(name)]
    if not holding:
        if number in _READ_TOO:
            return None  # it may be a file that was read
        hint = "free some space there, or choose another folder" if number in _FULL else "choose another folder"
        return StorageError(f"cannot write {name}: {said}", hint=hint)
    place = _fullest(holding) if number in _FULL else holding[0]
    return StorageError(f"cannot write {place.what} to {place.path}: {said}", hint=place.hint)


def _fullest(places: Sequence[Place]) -> Place:
    """Returns the place with the least room; of those on one disk, the first."""

    def free(place: Place) -> float:
        for folder in (place.path, *place.path.parents):
            with suppress(OSError):  # it is not there yet
                return shutil.disk_usage(folder).free
        return math.inf

    return min(places, key=free)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and those that it came from."""
    found: BaseException | None = error
    for _ in range(_DEEP):
        if found is None:
            return
        yield found
        found = found.__cause__ or found.__context__


def _number(error: BaseException) -> int | None:
    """Returns the errno of an error, from its text where it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, FewstepError):
        return None
    text = str(error)
    if found := _NUMBERS.search(text):
        return int(next(group for group in found.groups() if group))
    if os.strerror(errno.ENOSPC) in text or _WRITERS.search(text):
        return errno.ENOSPC
    return None


def _file_of(error: BaseException) -> Path | None:
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list) and error.args[0]:
        name = error.args[0][0][1]
    return Path(os.fsdecode(name)) if isinstance(name, (str, bytes, os.PathLike)) else None


def out_of_memory(error: BaseException) -> RuntimeMissingError | None:
    """Returns what an error says of memory, None if it is about something else."""
    for cause in _causes(error):
        if isinstance(cause, MemoryError) or _MEMORY.search(str(cause)):
            what = (str(cause).strip().splitlines() or [""])[0]
            return RuntimeMissingError(
                f"there is not enough memory{f': {what}' if what else ''}",
                hint="close other programs, or ask for less: a smaller shape, batch or model",
            )
    return None


def missing_package(error: ImportError) -> RuntimeMissingError | None:
    """Returns what an import that failed says to the user, None where it is fewstep itself that is broken."""
    name = (error.name or "").partition(".")[0]
    if not name or name == "fewstep" or name in sys.stdlib_module_names:
        return None
    extra = extra_of(name)
    wanted = f"pip install 'fewstep[{extra}]'" if extra else f"pip install {name}"
    if isinstance(error, ModuleNotFoundError):
        return RuntimeMissingError(f"{name} is not installed, and this needs it", hint=wanted)
    first = (str(error).splitlines() or [""])[0]
    return RuntimeMissingError(
        f"{name} cannot be imported: {first}", hint=f"install it anew: {wanted.replace('install', 'install --upgrade')}"
    )


@contextmanager
def naming_packages() -> Iterator[None]:
    """Raises a failed import in the block as a sentence with the extra to install; also a decorator of functions.

    Raises:
        RuntimeMissingError: a package that is not fewstep's own cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        found = missing_package(error)
        if found is None:
            raise
        raise found from error


def extra_of(module: str) -> str | None:
    """Returns the first extra of fewstep that installs a module, None if none does or fewstep is not installed."""
    try:
        required = metadata.requires("fewstep") or []
    except metadata.PackageNotFoundError:
        return None
    for text in required:
        found = _EXTRA.match(text)
        if found and _normal(found[1]) == _normal(module):
            return found[2]
    return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""How the command ends: every failure is one sentence with a hint, and an exit status that says whose it is.

0 fine, 1 a parity limit was exceeded, 2 what was asked for cannot be done here, 3 a bug of fewstep, 128 + n signal n.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from fewstep.cache import cache_place
from fewstep.disk import discard_all
from fewstep.errors import FewstepError, RuntimeMissingError
from fewstep.faults import Place, missing_package, out_of_memory, storage_error

BUG = 3
INTERRUPTED = "interrupted; nothing was written, finished stages are cached"
_SIGNALS = signal.SIGINT, signal.SIGTERM
_MOST_TEXT = 500
_HERE = Place(Path(), "files", "free some space there, or choose another folder")


class Interruptions:
    """The signals that ended a command."""

    def __init__(self) -> None:
        self.number = 0
        """Of the first signal that came, 0 before."""

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Takes a signal: the first is raised where the command is, the second ends it at once."""
        if self.number:
            leave(number)
        self.number = number
        raise KeyboardInterrupt

    @property
    def status(self) -> int:
        """What the command exits with."""
        return 128 + (self.number or signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[Interruptions]:
    """Raises KeyboardInterrupt in the block when the process is told to end, wherever Python is."""
    taken = Interruptions()
    before = {number: signal.signal(number, taken) for number in _SIGNALS}
    hook = sys.unraisablehook

    def lost(failure: sys.UnraisableHookArgs) -> None:
        """Ends the process for an interruption that Python would drop: in a destructor, or a callback of C code."""
        if issubclass(failure.exc_type, KeyboardInterrupt):
            leave(taken.number or signal.SIGINT)
        hook(failure)

    sys.unraisablehook = lost
    try:
        yield taken
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(number: int) -> NoReturn:
    """Ends the process at once, without anything half-written."""
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    discard_all()
    with suppress(OSError):
        os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(128 + number)


def told(error: BaseException) -> FewstepError | None:
    """Returns what an error of a library or the system says to the user, None for a bug."""
    if isinstance(error, FewstepError):
        return error
    try:
        found: FewstepError | None = storage_error(error, [cache_place(), _HERE]) or out_of_memory(error)
    except FewstepError as nowhere:  # there is not even a folder for temporary files
        return nowhere
    if found is None and isinstance(error, ImportError):
        found = missing_package(error)
    if found is None and isinstance(error, OSError):
        found = _of_the_system(error)
    return found


def _of_the_system(error: OSError) -> FewstepError:
    """Returns what an error of the operating system says; libraries raise some of no file, with a text alone."""
    if error.filename is None:
        return RuntimeMissingError(str(error) or type(error).__name__, hint="check the network, paths and permissions")
    return RuntimeMissingError(f"{error.filename}: {error.strerror}", hint="check the path and its permissions")


def of_a_bug(error: BaseException) -> str:
    """Returns what is said of an error that nobody foresaw: its first line, and the file that has the rest."""
    first = (str(error).strip().splitlines() or [""])[0][:_MOST_TEXT]
    text = "".join(traceback.format_exception(error))
    summary = f"{type(error).__name__}: {first}" if first else type(error).__name__
    for folder in (None, cache_place().path, _HERE.path):
        with suppress(OSError):
            number, name = tempfile.mkstemp(prefix="fewstep-traceback-", suffix=".txt", dir=folder)
            with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"fewstep {' '.join(sys.argv[1:])}\n\n{text}")
            return f"{summary}\n\nhint: this is a bug, the traceback is in {name}"
    return f"{summary}\n\nhint: this is a bug, and there was no room for a file with the traceback:\n{text}"

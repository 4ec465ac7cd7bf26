"""Runs requests to the untouched pipeline in a process of its own, beside what this one does."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from fewstep.disk import begin, discard
from fewstep.errors import ExportError
from fewstep.faults import temporary_place
from fewstep.untouched.__main__ import ENDED, LOG
from fewstep.untouched.request import ANSWER, Answer, Request

# -P: nothing of the folder that the command was called in takes the place of a library.
_COMMAND = (sys.executable, "-P", "-m", "fewstep.untouched")
_POLL_S = 0.05
_TOLD = 2000


class Asked:
    """A request that a process is answering."""

    def __init__(self, request: Request) -> None:
        self._folder = begin(temporary_place().path, "fewstep-call-")
        request.save(self._folder)
        self._process: subprocess.Popen[str] | None = None
        if not _serve(self._folder):
            self._process = self._start_alone()

    def answer(self) -> Answer:
        """Waits for the answer.

        Raises:
            ExportError: the process ended without one.
        """
        while not (self._folder / ANSWER).is_file():
            if self._process is None and self._never_begun():
                self._process = self._start_alone()  # the server's time was up before it read the request
            elif self._ended() and not (self._folder / ANSWER).is_file():
                raise ExportError(
                    f"the untouched pipeline could not be called: {self._last_words()}",
                    hint="does it load and run in diffusers alone, in float32 on the CPU?",
                )
            time.sleep(_POLL_S)
        return Answer.load(self._folder)

    def close(self) -> None:
        """Removes the request's folder; a process that is still at it ends."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        elif not (self._folder / ENDED).is_file():
            close_server()
        discard(self._folder)

    def _start_alone(self) -> subprocess.Popen[str]:
        with (self._folder / LOG).open("w", encoding="utf-8") as log:
            return _start([str(self._folder)], log)

    def _never_begun(self) -> bool:
        gone = _server is None or _server.poll() is not None
        return gone and not (self._folder / ENDED).is_file() and not (self._folder / LOG).is_file()

    def _ended(self) -> bool:
        if self._process is not None:
            return self._process.poll() is not None
        return (self._folder / ENDED).is_file() or _server is None or _server.poll() is not None

    def _last_words(self) -> str:
        """Returns the last line of the process's errors that is not empty, or how it ended."""
        log = self._folder / LOG
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        ended = self._folder / ENDED
        status = ended.read_text() if ended.is_file() else "?"
        return lines[-1][:_TOLD] if lines else f"its process ended with status {status}"


_server: subprocess.Popen[str] | None = None


def _serve(folder: Path) -> bool:
    """Hands a folder to the process that answers several requests, starting it if need be; False where none can be."""
    global _server
    if not hasattr(os, "fork") or sys.platform == "darwin":  # macOS: libraries of the system do not survive a fork
        return False
    if _server is None or _server.poll() is not None:
        close_server()
        _server = _start([], None)
        atexit.register(close_server)
    assert _server.stdin is not None
    try:
        _server.stdin.write(f"{folder}\n")
        _server.stdin.flush()
    except BrokenPipeError:  # it was idle for too long just now
        close_server()
        return False
    return True


def _start(arguments: list[str], log: IO[str] | None) -> subprocess.Popen[str]:
    # What this process finds, that one finds too: packages on a path that only this one was told of.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    # Two processes that each have a thread on every core wait for each other at every barrier: 28 s instead of 6 for
    # the references of the built-in generator. This one has half of the cores, and what the compiler leaves of them.
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // 2, 1)))
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    return subprocess.Popen(
        [*_COMMAND, *arguments],
        stdin=subprocess.PIPE if log is None else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log or subprocess.DEVNULL,
        env=environment,
        text=True,
        start_new_session=True,
    )


def close_server() -> None:
    """Ends the process that answers several requests, and what it is at."""
    global _server
    server, _server = _server, None
    if server is None:
        return
    assert server.stdin is not None
    try:
        os.killpg(server.pid, 9)  # its own group: the forked process that answers too
    except (ProcessLookupError, PermissionError):
        pass
    server.wait()
    server.stdin.close()

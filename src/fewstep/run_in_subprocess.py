"""Runs a function in a process of its own, so that its garbage is not ours and its peak of memory can be known."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fewstep import errors
from fewstep.disk import scratch
from fewstep.errors import ExportError, FewstepError

# An interruption reaches both processes, and it is the parent that tells of it.
_CHILD = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); from fewstep.run_in_subprocess import child; child()"
)
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Measured:
    """What a function returned, and the largest resident memory and the time of the process that ran it."""

    result: Any
    peak_bytes: int
    seconds: float


def run_isolated(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Measured:
    """Returns what a function of a module returns for JSON-ready arguments, run in a fresh interpreter.

    Raises:
        FewstepError: the one that the function raised.
        ExportError: the process ended without a result.
    """
    start = time.perf_counter()
    with scratch() as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        job = {"module": function.__module__, "function": function.__qualname__, "arguments": dict(arguments)}
        request.write_text(json.dumps(job))
        done = subprocess.run([sys.executable, "-c", _CHILD, str(request), str(answer)], check=False)
        if not answer.is_file():
            raise _ended(job, done.returncode)
        values = json.loads(answer.read_text())
    if "error" in values:
        raise getattr(errors, values["error"])(values["message"], hint=values["hint"])
    return Measured(values["result"], values["peak_bytes"], time.perf_counter() - start)


def child() -> None:
    """Runs the function that the process's first argument describes and writes the answer to the second."""
    job = json.loads(Path(sys.argv[1]).read_text())
    function = getattr(importlib.import_module(job["module"]), job["function"])
    answer: dict[str, Any]
    try:
        answer = {"result": function(**job["arguments"]), "peak_bytes": peak_bytes()}
    except FewstepError as error:
        answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    Path(sys.argv[2]).write_text(json.dumps(answer))


def peak_bytes() -> int:
    """Returns the largest resident memory that this process has had."""
    if _STATUS.is_file():  # ru_maxrss would be that of the parent, if it was larger when it started this process
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _ended(job: Mapping[str, Any], status: int) -> ExportError:
    what = f"the process of {job['module']}.{job['function']}"
    if status < 0:
        return ExportError(
            f"{what} was killed by signal {-status}", hint="was there enough memory? close other programs"
        )
    return ExportError(f"{what} ended with status {status} and no result", hint="its own message is above")

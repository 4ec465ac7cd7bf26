"""Sessions on artifacts that run in another process: on an emulated or another machine, through its two pipes."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.bundle.contract import ComponentSpec
from fewstep.bundle.program import Program
from fewstep.errors import ContractError, RuntimeMissingError
from fewstep.runtimes.base import Array, CheckedSession, PointResult, Runtime
from fewstep.runtimes.executors.worker import PREFIX, decode, encode

SCRIPT = Path(__file__).with_name("worker.py")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Launch:
    """How the guest script is started for a runtime, and how the place sees files of this machine.

    Attributes:
        argv: of the process; the script and the runtime's name come behind it.
        where: the place, for people: ``emulated ARM64 (...)``.
        put: makes a file visible there and returns its path there; a link or a copy, with its ``.data`` beside it.
        start_s: how long it may take until it has loaded the runtime.
        call_s: how long a call may take.
        environment: variables of the process; None takes those of this one.
        explain: what a signal that ended the process means there, as a hint; None where nothing is known.
    """

    argv: tuple[str, ...]
    where: str
    put: Callable[[Path], str] = str
    start_s: float = 300.0
    call_s: float = 900.0
    environment: Mapping[str, str] | None = None
    explain: Callable[[int], str | None] = lambda _: None


class Guest:
    """A process that runs artifacts with one runtime. A context manager would end it; so does `close`."""

    def __init__(self, launch: Launch, runtime: str, script: Path = SCRIPT) -> None:
        self._launch, self._runtime = launch, runtime
        self._ids = itertools.count()
        self._buffer = bytearray()
        self._errors = tempfile.TemporaryFile()
        argv = [*launch.argv, launch.put(script), runtime]
        pipe, variables = subprocess.PIPE, None if launch.environment is None else dict(launch.environment)
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=self._errors, env=variables)
        try:
            self.told, _ = self._receive(launch.start_s, f"start {runtime}")
        except BaseException:
            self.close()
            raise

    @property
    def where(self) -> str:
        """What runs artifacts there, for people."""
        return f"{self._runtime} {self.told['version']} on {self._launch.where}"

    def open(self, path: Path, threads: int | None, settings: Mapping[str, str] | None = None) -> int:
        """Returns the number of an artifact that is open there; ``settings`` are of the runtime's session.

        Raises:
            ContractError: the runtime there refuses it.
            RuntimeMissingError: the process ended or did not answer in time.
        """
        number = next(self._ids)
        there = {"path": self._launch.put(path.resolve()), "threads": threads, "settings": dict(settings or {})}
        self._call({"do": "open", "id": number, **there}, {}, path)
        return number

    def run(
        self, number: int, feeds: Mapping[str, Array], outputs: Sequence[str] | None, what: object
    ) -> dict[str, Array]:
        """Returns outputs by name; all of them if ``outputs`` is None. Raises as `open` does."""
        names = None if outputs is None else list(outputs)
        return self._call({"do": "run", "id": number, "outputs": names}, feeds, what)

    def drop(self, number: int) -> None:
        """Closes an artifact, if the process is still there."""
        if self._process.poll() is None:
            self._call({"do": "close", "id": number}, {}, f"artifact {number}")

    def close(self) -> None:
        """Ends the process; closing twice is fine."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                # It may have ended with a request unread; how it ended was said where that was found.
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._errors.close()

    def _call(self, values: Mapping[str, Any], arrays: Mapping[str, Array], what: object) -> dict[str, Array]:
        doing = f"{values['do']} {what}"
        if self._process.stdin is None or self._process.stdin.closed:
            raise ContractError(f"{self._launch.where}: cannot {doing}: its process was ended")
        try:
            self._process.stdin.write(encode(values, arrays))
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(doing) from None
        answer, results = self._receive(self._launch.call_s, doing)
        if "error" in answer:
            raise ContractError(f"{self.where}: cannot {doing}: {answer['error']}", hint="build the bundle again")
        return results

    def _receive(self, seconds: float, doing: str) -> tuple[dict[str, Any], dict[str, Array]]:
        deadline = time.monotonic() + seconds
        header, body = PREFIX.unpack(self._read(PREFIX.size, deadline, seconds, doing))
        return decode(
            self._read(header, deadline, seconds, doing), self._read(body, deadline, seconds, doing) if body else b""
        )

    def _read(self, count: int, deadline: float, seconds: float, doing: str) -> bytes:
        assert self._process.stdout is not None
        stream = self._process.stdout.fileno()
        while len(self._buffer) < count:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stream], [], [], left)[0]:
                self.close()
                raise RuntimeMissingError(
                    f"{self._launch.where}: no answer in {seconds:.0f} s to: {doing}",
                    hint="close other programs, or give a smaller generator",
                )
            chunk = os.read(stream, _CHUNK)
            if not chunk:
                raise self._ended(doing)
            self._buffer += chunk
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    def _ended(self, doing: str) -> RuntimeMissingError:
        """Returns the error of a process that ended before it had answered: the signal, or what it said last."""
        status = self._process.wait()
        self._errors.seek(0)
        said = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        hint = self._launch.explain(-status) if status < 0 else None
        last = f": {said[-1]}" if said else ""
        return RuntimeMissingError(f"{self._launch.where}: {how}, asked to {doing}{last}", hint=hint)


def open_remote(
    guest: Guest, path: Path, spec: ComponentSpec, threads: int | None, settings: Mapping[str, str] | None = None
) -> CheckedSession:
    """Returns a session on an artifact that runs elsewhere, whose outputs must be those of the manifest."""
    return CheckedSession(
        path.parent.name, spec, _RemoteSession(guest, path, spec, guest.open(path, threads, settings))
    )


def remote_runtime(runtime: Runtime, guest: Guest) -> Runtime:
    """Returns a runtime whose artifacts run in a guest."""

    def opened(path: Path, spec: ComponentSpec, threads: int | None) -> CheckedSession:
        return open_remote(guest, path, spec, threads, runtime.session_settings(path))

    def run(path: Path, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        number = guest.open(path, None, runtime.session_settings(path))
        try:
            return guest.run(number, feeds, outputs, path)
        finally:
            guest.drop(number)

    compare: Callable[[Program, Path, Mapping[str, Array]], list[PointResult]] | None = None
    compare_at = runtime.compare_integers_at
    if compare_at is not None:

        def compare(program: Program, path: Path, feeds: Mapping[str, Array]) -> list[PointResult]:
            return compare_at(program, path, feeds, run)

    return replace(
        runtime,
        open=opened,
        open_exact=None,
        open_mapped=None,  # the other process opens files as it does
        at_function=None,
        compare_integers=compare,
        executor=lambda: guest.where,
    )


class _RemoteSession:
    def __init__(self, guest: Guest, path: Path, spec: ComponentSpec, number: int) -> None:
        self._guest, self._path, self._spec = guest, path, spec
        self._number: int | None = number

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        if self._number is None:
            raise ContractError("the session is closed")
        results = self._guest.run(self._number, feeds, None, self._path)
        if results.keys() != {output.name for output in self._spec.outputs}:
            wanted = [output.name for output in self._spec.outputs]
            raise ContractError(f"{self._path}: model has {list(results)}, the manifest has {wanted}")
        for output in self._spec.outputs:
            output.check(results[output.name].shape, str(results[output.name].dtype), str(self._path))
        return results

    def close(self) -> None:
        """Closes the artifact there."""
        if self._number is not None:
            self._guest.drop(self._number)
            self._number = None

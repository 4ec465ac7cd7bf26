"""Kills builds at random points, and damages their caches as a power cut does: the next build gives the same bundle.

`make test-kill` does so with the built-in generator, fifty times a recipe; tests/integration/test_killing.py with a
tiny one.

A point is a number of changes to files that a build is let make before it is killed (SIGKILL), or a share of the time
of a whole build. Every build is a fork of one process that has loaded all libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# What depends on the clock: latencies, the page that shows them, and the hashes of both.
TIMED = {"report/profile.json", "report/index.html"}
OF_THE_MANIFEST = {"manifest.json", "bundle.sha256", "bundle.sig"}
# Kills of one build before it is let finish.
_A_BUILD = 5
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.copyfile"}


@dataclass
class Outcome:
    """What came of it: counts, and a sentence for everything that was not as it must be."""

    killed: int = 0
    finished_before: int = 0
    """Points that a build did not reach: it had done the rest already."""
    resumed: int = 0
    damaged: int = 0
    repaired: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """Where a build reads and writes."""

    arguments: tuple[str, ...]
    folder: Path

    @property
    def bundle(self) -> Path:
        return self.folder / "out" / "bundle"

    def run(self, *, changes: int | None = None, seconds: float | None = None) -> tuple[int, int]:
        """Returns the status of a build (negative: of the signal that ended it) and how many changes it made."""
        log = self.folder / "log.txt"
        counted = self.folder / "changes.txt"
        counted.unlink(missing_ok=True)
        process = os.fork()
        if process == 0:
            self._child(log, counted, changes, seconds)
        _, status = os.waitpid(process, 0)
        found = int(counted.read_text()) if counted.exists() else 0
        return os.waitstatus_to_exitcode(status), found

    def _child(self, log: Path, counted: Path, changes: int | None, seconds: float | None) -> None:
        status = 99
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["FEWSTEP_CACHE"] = str(self.folder / "cache")
            os.environ["TMPDIR"] = tempfile.tempdir = str(self.folder / "tmp")
            count = _count(self.folder, changes)
            if seconds is not None:
                threading.Thread(target=_kill_after, args=(seconds,), daemon=True).start()
            sys.argv = ["fewstep", "build", *self.arguments, "-o", str(self.bundle)]
            from fewstep.cli import main

            try:
                main()
            except SystemExit as ended:
                status = int(ended.code or 0)
            import atexit

            atexit._run_exitfuncs()  # what an interpreter that ends itself does
            counted.write_text(str(count[0]))
        finally:
            os._exit(status)


def _kill_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _count(folder: Path, most: int | None) -> list[int]:
    """Returns a count of the changes to files of a folder; at one of them the process kills itself."""
    count, own = [0], str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            path, changes = (arguments or (None,))[0], event in _CHANGES
        if changes and isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(own):
            count[0] += 1
            if count[0] == most:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def content(bundle: Path) -> dict[str, bytes | str]:
    """Returns all of a bundle that does not depend on the clock."""
    files = {path.relative_to(bundle).as_posix(): path for path in sorted(bundle.rglob("*")) if path.is_file()}
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if name not in TIMED}
    kept: dict[str, bytes | str] = {name: p.read_bytes() for name, p in files.items() if name not in TIMED}
    return {name: value for name, value in kept.items() if name not in OF_THE_MANIFEST} | {
        "manifest.json": json.dumps(manifest, indent=1)
    }


def rests(work: Work) -> list[str]:
    """Returns what a build left that is no bundle, no finished entry of the cache and no log."""
    stale = [path for name in ("cache", "tmp", "out") for path in (work.folder / name).rglob("*partial*")]
    stale += [path for path in (work.folder / "cache" / ".use").glob("*")]
    stale += [path for path in (work.folder / "tmp").glob("*") if path.name.startswith(("fewstep-", "tmp"))]
    return sorted({str(path.relative_to(work.folder)) for path in stale})


def differences(expected: dict[str, bytes | str], bundle: Path) -> list[str]:
    """Returns the names of all files that differ."""
    found = content(bundle) if (bundle / "manifest.json").is_file() else {}
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def damage(cache: Path, rng: random.Random) -> str:
    """Damages a file of an entry as a power cut or a bad disk does, and returns what was done."""
    files = sorted(path for path in cache.rglob("*") if path.is_file() and ".use" not in path.parts)
    path = rng.choice(files)
    data = path.read_bytes()
    at = rng.randrange(len(data)) if data else 0
    kind = rng.choice(["truncated", "emptied", "zeroed", "flipped", "removed", "joined"])
    if kind == "removed":
        path.unlink()
    elif kind == "joined":
        path.with_name("more.safetensors").write_bytes(data)
    else:
        flipped = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
        spoiled = {"truncated": data[:at], "emptied": b"", "zeroed": data[:at].ljust(len(data), b"\0")}
        path.write_bytes(spoiled.get(kind, data[:at] + flipped + data[at + 1 :]))
    return f"{path.relative_to(cache)} {kind} at {at} of {len(data)}"


def kill_builds(arguments: Sequence[str], folder: Path, *, points: int, damages: int, seed: int) -> Iterator[Outcome]:
    """Yields what came of so many kills and damages, after each build that was let finish."""
    rng, outcome = random.Random(seed), Outcome()
    whole = fresh(arguments, folder / "whole")
    begun = time.monotonic()
    status, changes = whole.run()
    duration = time.monotonic() - begun
    if status:
        outcome.failures.append(f"a build that nobody killed ended with {status}: {tail(whole)}")
        yield outcome
        return
    expected = content(whole.bundle)
    while outcome.killed < points:
        work = fresh(arguments, folder / "killed")
        for _ in range(min(_A_BUILD, points - outcome.killed)):
            by_time = rng.random() < 0.3
            share = rng.random()
            limit = {"seconds": share * duration} if by_time else {"changes": 1 + int(share * changes)}
            status, _ = work.run(**limit)  # type: ignore[arg-type]
            if status == -signal.SIGKILL:
                outcome.killed += 1
                if work.bundle.exists() and differences(expected, work.bundle):
                    outcome.failures.append(f"killed at {limit}: a half bundle")
            elif status:
                outcome.failures.append(f"ended with {status} at {limit}: {tail(work)}")
            else:
                outcome.finished_before += 1
                shutil.rmtree(work.bundle)
        check(work, expected, outcome, f"resumed after {outcome.killed} kills")
        outcome.resumed += 1
        yield outcome
    for _ in range(damages):
        done = damage(whole.folder / "cache", rng)
        outcome.damaged += 1
        before = len(outcome.failures)
        check(whole, expected, outcome, done)
        outcome.repaired += len(outcome.failures) == before
        yield outcome


def load_libraries() -> None:
    """Imports what a build does, so that no fork has to."""
    from fewstep import cli  # noqa: F401
    from fewstep.calibration import sets  # noqa: F401
    from fewstep.export import load  # noqa: F401
    from fewstep.optimize.quantize import quantized_programs as programs  # noqa: F401
    from fewstep.pipeline import compile as compiling  # noqa: F401
    from fewstep.pipeline import stages  # noqa: F401


def check(work: Work, expected: dict[str, bytes | str], outcome: Outcome, when: str) -> None:
    """Builds to the end, and notes what is not as it must be."""
    shutil.rmtree(work.bundle, ignore_errors=True)
    status, _ = work.run()
    if status:
        outcome.failures.append(f"{when}: ended with {status}: {tail(work)}")
    if found := differences(expected, work.bundle):
        outcome.failures.append(f"{when}: other files: {', '.join(found)}")
    if left := rests(work):
        outcome.failures.append(f"{when}: left {', '.join(left)}")


def fresh(arguments: Sequence[str], folder: Path) -> Work:
    """Returns a place for builds with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("out", "cache", "tmp"):
        (folder / name).mkdir(parents=True)
    return Work(tuple(arguments), folder)


def tail(work: Work) -> str:
    """Returns the end of what a build said."""
    return (work.folder / "log.txt").read_text()[-400:]


def main(*, libraries: bool = True) -> None:
    """Prints what came of it as JSON, a line after each build; exit 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=50, help="kills")
    parser.add_argument("--damages", type=int, default=20, help="damaged caches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of fewstep build")
    given = parser.parse_args()
    outcome = Outcome()
    if libraries:
        load_libraries()
    folder = Path(tempfile.mkdtemp(prefix="killing-"))  # an object would remove it at the end of each fork, too
    try:
        arguments = [a for a in given.arguments if a != "--"]
        for outcome in kill_builds(arguments, folder, points=given.points, damages=given.damages, seed=given.seed):
            sys.stdout.write(f"{json.dumps(asdict(outcome))}\n")
            sys.stdout.flush()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(bool(outcome.failures) or outcome.killed < given.points)


if __name__ == "__main__":
    main()

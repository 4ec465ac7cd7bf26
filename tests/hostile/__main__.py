"""Reads hostile inputs by seed, each within a time, and says what was not refused with a sentence and a hint."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fewstep.errors import FewstepError
from tests.hostile.cases import Case, Cases
from tests.hostile.mutate import CANARY
from tests.hostile.watch import Watch

# Shares of the kinds; those of the second group need torch, which takes 400 MB by itself.
LIGHT = {"bundle": 5, "file": 2, "tokenizer": 1, "recipe": 1}
HEAVY = {"plan": 3, "reference": 1, "source": 2}
SECONDS, MEMORY_BYTES = 5.0, 1 << 30
# An address space in which even a slip of some GB is an error, and no swapping machine.
_ADDRESSES = 24 << 30


def main() -> None:
    """Reads so many cases, prints one line of JSON, and exits with 1 if one was not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundles", nargs="*", default=[], type=_path)
    parser.add_argument("--sources", nargs="*", default=[], type=_path)
    parser.add_argument("--kinds", nargs="+", default=[*LIGHT])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    signal.signal(signal.SIGALRM, _too_long)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="fewstep-hostile-") as work:
        found = _run(options, Path(work))
    sys.stdout.write(f"{json.dumps(found)}\n")
    sys.exit(1 if found["problems"] else 0)


def _run(options: argparse.Namespace, work: Path) -> dict[str, object]:
    _place_canary(work)
    bundles = {f"bundle {i}": _linked(path, work / f"good-bundle-{i}") for i, path in enumerate(options.bundles)}
    sources = {f"source {i}": _linked(path, work / f"good-source-{i}") for i, path in enumerate(options.sources)}
    cases, watch = Cases(bundles, sources, work), Watch()
    kinds = [kind for kind in options.kinds for _ in range({**LIGHT, **HEAVY}[kind])]
    counts: Counter[str] = Counter()
    problems: list[str] = []
    slowest = 0.0
    for name in bundles:  # what the good ones are refused for would be all that is tested
        outcome, problem = _read(cases.good(name), watch)
        problems += [] if (outcome, problem) == ("read", None) else [f"{name} itself is {outcome}: {problem}"]
    for kind in options.kinds:
        for seed in (-1, -2):  # what is imported at the first use is imported now
            _read(cases.of(kind, seed), watch)
    warm = _peak()  # Python's packages and what good inputs take
    for i in range(options.first, options.first + options.count):
        kind = kinds[i % len(kinds)]
        case = cases.of(kind, i)
        started = time.process_time()
        outcome, problem = _read(case, watch)
        slowest = max(slowest, taken := time.process_time() - started)
        counts[f"{kind} {outcome}"] += 1
        if taken > SECONDS:
            problem = f"took {taken:.1f} s; {problem or ''}"
        if problem:
            problems.append(f"{kind} {i}: {problem}")
        shutil.rmtree(work / f"{kind}-{i}", ignore_errors=True)
    if (grown := _peak() - warm) > MEMORY_BYTES:
        problems.append(f"{grown >> 20} MiB of memory beyond {warm >> 20}")
    return {
        "cases": options.count,
        "counts": dict(sorted(counts.items())),
        "slowest_s": round(slowest, 2),
        "warm_mib": warm >> 20,
        "grown_mib": grown >> 20,
        "problems": problems,
    }


def _peak() -> int:
    """Returns the most memory that the process had until now, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read(case: Case, watch: Watch) -> tuple[str, str | None]:
    """Returns whether a case was refused, and what was wrong with how it was."""
    outcome, problem = "read", None
    signal.alarm(4 * int(SECONDS))
    with watch() as seen:
        try:
            case.read()
        except FewstepError as error:
            outcome = "refused"
            if not error.hint or not error.message.strip():
                problem = f"no hint: {type(error).__name__}: {error.message[:300]}"
        except BaseException as error:
            outcome = "raised"
            last = traceback.extract_tb(error.__traceback__)[-1]
            own = [f for f in traceback.extract_tb(error.__traceback__) if "fewstep" in f.filename]
            at = own[-1] if own else last
            problem = f"{type(error).__name__}: {str(error)[:200]} (at {Path(at.filename).name}:{at.lineno})"
    signal.alarm(0)
    if seen:
        problem = f"{problem or ''} {seen[:3]}"
    if CANARY in sys.modules:
        del sys.modules[CANARY]
        problem = f"{problem or ''} ran the code that it named"
    return outcome, problem


def _too_long(_: int, __: FrameType | None) -> NoReturn:
    raise TimeoutError("it took too long")


def _place_canary(work: Path) -> None:
    """Puts a module where Python finds it, and nobody has a reason to look."""
    folder = work / "path"
    folder.mkdir()
    (folder / f"{CANARY}.py").write_text("def make():\n    raise SystemExit('ran')\n")
    sys.path.insert(0, str(folder))
    os.chdir(folder)


def _path(text: str) -> Path:
    """Returns an argument's path as it is wherever the process goes."""
    return Path(text).absolute()


def _linked(path: Path, to: Path) -> Path:
    """Returns a copy on the disk where cases are made, which link to its files."""
    return Path(shutil.copytree(path, to))


if __name__ == "__main__":
    main()

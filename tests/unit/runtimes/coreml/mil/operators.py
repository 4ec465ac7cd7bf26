"""Writes docs/coreml-operators.md: coremltools' own tests of its operations, with our evaluator predicting.

``make coreml-operators``, or ``python -m tests.unit.runtimes.coreml.mil.operators > docs/coreml-operators.md``. Each
case leaves a record in ``build/coreml-operators`` (``--records`` names another folder) with a digest of the code that
evaluates its operations; what has a record of the present code is not run again. ``--page`` runs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

import fewstep.runtimes.coreml.mil
from fewstep.runtimes.coreml.mil.ops import OPS

# How cases are scored; records of another rule are not used. 3: each result is rounded to the type that the program
# declares for it, as on a device. 4: fp32 backends' cases on values of fp16 that fail are compared to fp16's precision.
RULE = 4
RESULTS = Path("build/coreml-operators")
# Beside every operation of interest: constants and the casts at a program's ends say nothing of it.
PLUMBING = {"const", "cast", "identity"}
# What became of a case on values of fp16 that passed only when compared to fp16's precision.
PASSED_HALF = "passed to fp16"
# What the record of a case says until its test ends.
INTERRUPTED = "the process ended"
_TESTS = "converters/mil/mil/ops/tests"
# Models of a process stay in its temporary folder until it ends.
_BATCH = 4000


def main() -> None:
    """Runs what has not been run and prints the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.unit.runtimes.coreml.mil.operators")
    parser.add_argument("--page", action="store_true", help="print the page of the records that there are")
    parser.add_argument(
        "--records", type=Path, default=RESULTS, help="the folder of the records (default: %(default)s)"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.records
    if not arguments.page:
        folder.mkdir(parents=True, exist_ok=True)
        sources = evaluator_sources()
        kept = [record for record in records(folder) if _counts(record, sources)]
        _records_of(folder).write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        while len(records(folder)) < sum(counts(folder).values()) or not counts(folder):
            before = len(records(folder))
            run(folder)
            if len(records(folder)) == before:
                raise RuntimeError("coremltools' tests wrote no records")
    sys.stdout.write(page(records(folder), counts(folder)))


def test_files() -> list[Path]:
    """Returns coremltools' test files of operations."""
    spec = util.find_spec("coremltools")
    assert spec is not None and spec.origin is not None, "coremltools is not installed"
    return sorted((Path(spec.origin).parent / _TESTS).glob("*/test_*.py"))


def evaluator_sources() -> dict[str, bytes]:
    """Returns the evaluator's source files by the name of their module."""
    package = fewstep.runtimes.coreml.mil
    assert package.__file__ is not None
    folder = Path(package.__file__).parent
    return {
        ".".join([package.__name__, *path.relative_to(folder).with_suffix("").parts]): path.read_bytes()
        for path in sorted(folder.rglob("*.py"))
    }


def evaluator_version(operations: Iterable[str], sources: Mapping[str, bytes]) -> str:
    """Returns a digest of the code that evaluates a program of these operations: that of all, and their modules."""
    modules = {module for operation in OPS.values() if (module := operation.__module__) in sources}
    used = {name: OPS[name].__module__ if name in OPS else "none" for name in {*operations, *PLUMBING}}
    shared = sorted(sources.keys() - modules)
    digest = hashlib.sha256(json.dumps(sorted(used.items())).encode())
    for module in [*shared, *sorted(set(used.values()) & sources.keys())]:
        digest.update(sources[module])
    return digest.hexdigest()[:12]


def _counts(record: Mapping[str, Any], sources: Mapping[str, bytes]) -> bool:
    """Returns whether a record is of the present code and of a test that ended."""
    current = record["evaluator"] == evaluator_version(record["operations"], sources)
    return current and record["reason"] != INTERRUPTED


def _records_of(folder: Path) -> Path:
    return folder / "cases.jsonl"


def _counts_of(folder: Path) -> Path:
    return folder / "collected.json"


def records(folder: Path) -> list[dict[str, Any]]:
    """Returns the last record of each case, of the present rule."""
    path = _records_of(folder)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines]
    return [*{record["test"]: record for record in found if record["rule"] == RULE}.values()]


def counts(folder: Path) -> dict[str, int]:
    """Returns how many cases each test file has."""
    path = _counts_of(folder)
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def run(folder: Path) -> None:
    """Runs the next cases in a process of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **os.environ,
            "FEWSTEP_MIL_RECORDS": str(_records_of(folder).resolve()),
            "FEWSTEP_MIL_COUNTS": str(_counts_of(folder).resolve()),
            "FEWSTEP_MIL_BATCH": str(_BATCH),
            "TMPDIR": scratch,
            "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
        }
        files = test_files()
        # No configuration of ours, which an environment inside of this folder would find.
        options = [
            "-c",
            os.devnull,
            "-q",
            "-W",
            "ignore",
            "-p",
            "no:cacheprovider",
            "-p",
            "tests.unit.runtimes.coreml.mil.stand_in",
            "--tb=no",
        ]
        command = [sys.executable, "-W", "ignore", "-m", "pytest", *options, f"--rootdir={files[0].parents[1]}"]
        done = subprocess.run([*command, *map(str, files)], env=environment, stdout=subprocess.PIPE, check=False)
        if done.returncode not in (0, 1):  # not: all passed, some failed
            sys.stderr.write(done.stdout.decode()[-2000:])


def classify(record: dict[str, Any]) -> str:
    """Returns what became of a case."""
    if record["unknown"]:
        return "unknown"
    if record["outcome"] == "skipped":
        # What is expected to fail on Core ML and gave another value here is a wrong value here.
        return "failed" if record["predictions"] else "skipped"
    if record["outcome"] == "failed":
        return "failed"
    if not record["predictions"]:
        return "not compared"
    return PASSED_HALF if record["wide"] else "passed"


def page(found: list[dict[str, Any]], collected: dict[str, int]) -> str:
    """Returns the page."""
    groups = Counter(classify(record) for record in found)
    passed = groups["passed"] + groups[PASSED_HALF]
    compared = passed + groups["failed"]
    by_operation: dict[str, Counter[str]] = defaultdict(Counter)
    for record in found:
        for operation in record["operations"]:
            by_operation[operation][classify(record)] += 1
    lines = [
        "# Operations of Core ML that the evaluator knows",
        "",
        f"coremltools {metadata.version('coremltools')} has tests of its operations with expected values, which",
        "compare predictions on macOS only. Here our evaluator predicts in Core ML's place, from the saved package,",
        "rounding each result to the type that the package declares. `make coreml-operators` writes this page.",
        "",
        *_reservations(found, collected),
        "| cases | |",
        "|---|---|",
        f"| evaluated and compared | {compared} |",
        f"| of these passed | {passed} ({100 * passed / max(1, compared):.1f} %) |",
        f"| of these to fp16's precision only, see below | {groups[PASSED_HALF]} |",
        f"| of these failed: a wrong value, or an error of the evaluator | {groups['failed']} |",
        f"| with an operation that the evaluator does not know (an error that names it) | {groups['unknown']} |",
        f"| that coremltools skips, or expects to fail and does not evaluate | {groups['skipped']} |",
        f"| that convert and compare nothing | {groups['not compared']} |",
        "",
        "A case that fails, on whatever grounds, is counted as failed and never as skipped.",
        "Some cases of fp32 backends have values of fp16, in the program or as what is expected, and the tolerance of",
        "fp32 (1e-5 of the value and 1e-4): fp16 is rounded by up to 5e-4 of a value. Such a case that fails is",
        "compared once more, to 2^-10 of its largest value; coremltools' own tolerance of fp16 is 5e-2 of the value",
        "and 0.5.",
        "Cases of neural networks, the format of before iOS 15, are not among those collected: the evaluator runs ML",
        "programs. Compute units make no difference to it; only 4 cases have another one than the CPU.",
        "",
        "| operation | compared | passed | failed |",
        "|---|---|---|---|",
    ]
    for operation, results in sorted(by_operation.items()):
        good = results["passed"] + results[PASSED_HALF]
        if total := good + results["failed"]:
            lines.append(f"| `{operation}` | {total} | {good} | {results['failed']} |")
    lines += ["", "## Failed", "", *_grouped(found, "failed")]
    lines += ["", "## Not known", ""]
    names = Counter(_unknown_name(record) for record in found if classify(record) == "unknown")
    lines += [", ".join(f"{name} ({count})" for name, count in sorted(names.items())) + "." if names else "None."]
    lines += ["", "## Skipped, or expected to fail, by coremltools", "", *_grouped(found, "skipped")]
    return "\n".join(lines) + "\n"


def _reservations(found: list[dict[str, Any]], collected: dict[str, int]) -> list[str]:
    """Returns what a reader must know before the figures, as lines of Markdown."""
    total = sum(collected.values())
    files = {record["test"].split("::")[0] for record in found}
    lines = [f"{len(found)} of {total} cases, in {len(files)} of {len(collected)} test files."]
    if len(found) < total:
        lines[0] = f"**Partial: {lines[0][:-1]} were run**, spread over the parameters of each test function."
    if missing := sorted(collected.keys() - files):
        lines.append(f"No case was run of {', '.join(missing)}.")
    sources = evaluator_sources()
    former = sum(not _counts(record, sources) for record in found)
    if former:
        lines.append(f"{former} of them were run before the last change of the evaluator.")
    return [*lines, ""]


def _grouped(found: list[dict[str, Any]], kind: str) -> list[str]:
    """Returns the cases of a kind by test function and reason, as lines of Markdown."""
    groups = Counter((record["test"].split("[")[0], _reason(record)) for record in found if classify(record) == kind)
    return [f"- `{test}` ({count}): {reason}" for (test, reason), count in sorted(groups.items())] or ["None."]


def _reason(record: dict[str, Any]) -> str:
    """Returns what a case said, and what is known of its kind."""
    said = str(record["reason"] or "no message")
    if "test_ios17_invalid_indices" in record["test"] and record["outcome"] == "failed":
        said += " (the case wants something else than its own value for an index whose result Core ML leaves undefined)"
    return said


def _unknown_name(record: dict[str, Any]) -> str:
    """Returns which operation it was, or the message where it was something else."""
    match = re.search(r"unknown operation (\S+)", record["unknown"])
    return f"`{match[1]}`" if match else str(record["unknown"])


if __name__ == "__main__":
    main()

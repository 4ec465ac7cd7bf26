"""Writes docs/coreml-operators.md: coremltools' own tests of its operations, with our evaluator predicting.

Run ``python -m tests.mil.operators > docs/coreml-operators.md``, or ``make coreml-operators``. Each of coremltools'
test files runs in a process of its own; its results are kept in ``build/coreml-operators`` and used again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from importlib import metadata, util
from pathlib import Path
from typing import Any

RESULTS = Path("build/coreml-operators")
_TESTS = "converters/mil/mil/ops/tests"
# Operations outside of our vocabulary, in files that test nothing else: counted from a few of their cases.
_UNKNOWN_FILES = ("test_recurrent", "test_random")


def main() -> None:
    """Runs what has not been run and prints the page."""
    most = int(os.environ.get("FEWSTEP_MIL_CASES", "0"))
    folder = RESULTS / (f"{most}" if most else "all")
    folder.mkdir(parents=True, exist_ok=True)
    for path in test_files():
        target = folder / f"{path.parent.name}-{path.stem}.json"
        if not target.is_file():
            sys.stderr.write(f"{path.parent.name}/{path.name}\n")
            run(path, target, most=2 if path.stem in _UNKNOWN_FILES else most)
    sys.stdout.write(page(folder, most))


def test_files() -> list[Path]:
    """Returns coremltools' test files of operations."""
    spec = util.find_spec("coremltools")
    assert spec is not None and spec.origin is not None, "coremltools is not installed"
    return sorted((Path(spec.origin).parent / _TESTS).glob("*/test_*.py"))


def run(path: Path, target: Path, *, most: int) -> None:
    """Runs one file with the stand-in, at most ``most`` cases of each function, and writes its records."""
    environment = {
        **os.environ,
        "FEWSTEP_MIL_RESULTS": str(target.resolve()),
        "FEWSTEP_MIL_CASES": str(most),
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
    }
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "tests.mil.stand_in", "--tb=no"]
    command = [sys.executable, "-W", "ignore", "-m", "pytest", *options, f"--rootdir={path.parent}", str(path)]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    if not target.is_file():
        raise RuntimeError(f"{path} wrote no results")


def page(folder: Path, most: int) -> str:
    """Returns the page for a folder of results."""
    done = {path.stem for path in folder.glob("*.json")}
    wanted = {f"{path.parent.name}-{path.stem}" for path in test_files()}
    by_file = {name: json.loads((folder / f"{name}.json").read_text()) for name in sorted(done & wanted)}
    records = [record for found in by_file.values() for record in found]
    # Records of before the arithmetic was chosen by the case's backend do not name it.
    former = [name for name, found in by_file.items() if any("arithmetic" not in record for record in found)]
    groups = Counter(classify(record) for record in records)
    compared = groups["passed"] + groups["failed"]
    by_operation: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for operation in record["operations"]:
            by_operation[operation][classify(record)] += 1
    how_many = "all cases" if not most else f"at most {most} cases of each test function, spread over its parameters"
    lines = [
        "# Operations of Core ML that the evaluator knows",
        "",
        f"coremltools {metadata.version('coremltools')} has tests of its operations with expected values, which",
        "compare predictions on macOS only. Here our evaluator predicts in Core ML's place, from the saved package,",
        f"rounding to fp16 in cases of an fp16 backend ({how_many}). `make coreml-operators` writes this page.",
        "",
        *_reservations(len(by_file), len(wanted), former),
        "| cases | |",
        "|---|---|",
        f"| evaluated and compared | {compared} |",
        f"| of these passed | {groups['passed']} ({100 * groups['passed'] / max(1, compared):.1f} %) |",
        f"| of these failed: a wrong value, or an error of the evaluator | {groups['failed']} |",
        f"| with an operation that the evaluator does not know (an error that names it) | {groups['unknown']} |",
        f"| that coremltools skips or expects to fail | {groups['skipped']} |",
        f"| that convert and compare nothing | {groups['not compared']} |",
        "",
        f"{len(done & wanted)} of {len(wanted)} test files were run"
        + (f"; not: {', '.join(sorted(wanted - done))}." if wanted - done else "."),
        "A case that fails, on whatever grounds, is counted as failed and never as skipped.",
        "",
        "| operation | compared | passed | failed |",
        "|---|---|---|---|",
    ]
    for operation, counts in sorted(by_operation.items()):
        total = counts["passed"] + counts["failed"]
        if total:
            lines.append(f"| `{operation}` | {total} | {counts['passed']} | {counts['failed']} |")
    lines += ["", "## Failed", ""]
    failed = [record for record in records if classify(record) == "failed"]
    lines += [f"- `{r['test'].split('/')[-1]}`: {r['reason'] or 'no message'}" for r in failed] or ["None."]
    lines += ["", "## Not known", ""]
    names = sorted({name for r in records if classify(r) == "unknown" for name in _unknown_names(r)})
    lines += [", ".join(f"`{name}`" for name in names) + "." if names else "None."]
    return "\n".join(lines) + "\n"


def _reservations(done: int, wanted: int, former: list[str]) -> list[str]:
    """Returns what a reader must know before the figures, as lines of Markdown."""
    lines = []
    if done < wanted:
        lines += [f"**Partial: {done} of {wanted} test files were run.** The figures say nothing of the others.", ""]
    if former:
        lines += [
            "**Two scoring rules are mixed.** The results of these files do not say in which arithmetic their cases",
            "were evaluated; some are of an earlier rule, which rounded to fp16 in cases of fp32 backends as well, and",
            f"so failed cases whose tolerances are for fp32: {', '.join(former)}. Delete them from `{RESULTS}` to run",
            "them again.",
            "",
        ]
    return lines


def classify(record: dict[str, Any]) -> str:
    """Returns what became of a case."""
    if record["unknown"]:
        return "unknown"
    if record["outcome"] == "skipped":
        return "skipped"
    if record["outcome"] == "failed":
        return "failed"
    return "passed" if record["predictions"] else "not compared"


def _unknown_names(record: dict[str, Any]) -> list[str]:
    message = record["unknown"]
    return [message.split("unknown operation ")[1].split(" ")[0]] if "unknown operation " in message else []


if __name__ == "__main__":
    main()

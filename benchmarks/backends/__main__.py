"""Builds and measures the built-in generator for every registered runtime, on every executor.

``python -m benchmarks.backends`` goes on where it was interrupted: rows of ``figures.json`` are not measured again, and
bundles in ``build/backends`` are not built again. Runtimes have environments of their own (`make bench-backends` goes
through them); without ``--runtimes`` those are measured that can be built for in this one. A recipe that a runtime
cannot express is a line that says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.backends.rows import RECIPES, Row, measure
from benchmarks.backends.table import markdown, measured
from benchmarks.scale.table import describe_machine
from fewstep.pipeline.replay import MINUTES
from fewstep.runtimes import RUNTIMES
from fewstep.runtimes.executors import EXECUTORS

RESULTS = Path(__file__).parent / "results"
WORK = Path("build/backends")


def main() -> None:
    """Measures the rows that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__)
    buildable = [name for name, runtime in RUNTIMES.items() if runtime.availability().builds]
    parser.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=buildable)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--executors", nargs="+", choices=list(EXECUTORS), default=list(EXECUTORS))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for a bundle on an executor that is not native")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--untimed", action="store_true", help="no latency and memory: the machine is busy")
    options = parser.parse_args()
    known = _load()["rows"]
    for recipe in options.recipes:
        for runtime in options.runtimes:
            for executor in options.executors:
                key = f"{runtime}/{recipe}/{executor}"
                if key in known and not options.again:
                    continue
                sys.stderr.write(f"{key}\n")
                row = measure(runtime, recipe, executor, WORK, minutes=options.minutes, timed=not options.untimed)
                _save({key: row.to_json()})
    _save({})


def _load() -> dict[str, Any]:
    path = RESULTS / "figures.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    # Rows of before a column was added lack it.
    figures["rows"] = {key: Row(**row).to_json() for key, row in figures["rows"].items()}
    return figures


def _save(rows: Mapping[str, Any]) -> None:
    """Adds rows to those that are there now: emulated ones take long, and others are measured meanwhile."""
    figures = _load()
    figures["rows"] |= rows
    figures["machine"] = describe_machine()
    RESULTS.mkdir(exist_ok=True)
    # Pictures that were drawn elsewhere are not here, and agree as they did.
    agreement = figures.setdefault("agreement", {})
    for recipe, names in measured(figures["rows"], WORK).items():
        for name, others in names.items():
            agreement.setdefault(recipe, {}).setdefault(name, {}).update(others)
    page = markdown(figures, "python -m benchmarks.backends")
    for name, text in (("figures.json", json.dumps(figures, indent=1) + "\n"), ("README.md", page)):
        partial = RESULTS / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.rename(RESULTS / name)


if __name__ == "__main__":
    main()

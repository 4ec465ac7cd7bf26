"""Counts what leaves the loop of networks of full size, and measures the forms of the built-in generator.

``python -m benchmarks.static [CASE ...] [--latency] [--stickers] [--memory] [--step-grids] [--step-bits]`` goes on
where it was interrupted: what is in ``figures.json`` is not measured again. Networks of full size are traced without
values: counting takes no memory for their weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.scale.table import describe_machine
from benchmarks.static import latency, step_bits, step_grids, stickers
from benchmarks.static.jobs import count
from benchmarks.static.networks import STATIC
from benchmarks.static.table import markdown
from fewstep.run_in_subprocess import run_isolated

RESULTS = Path(__file__).parent / "results"
WORK = Path("build/static")
STEPS = 4


def main() -> None:
    """Measures the cases that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(STATIC)}; all of them by default")
    parser.add_argument("--stickers", action="store_true", help="time the built-in generator too")
    parser.add_argument("--memory", action="store_true", help="hold its graphs in every way")
    parser.add_argument("--step-grids", action="store_true", help="draw with grids of activations by step")
    parser.add_argument("--step-bits", action="store_true", help="draw with more bits in one step")
    parser.add_argument("--latency", action="store_true", help="time the cases (they take gigabytes and minutes)")
    options = parser.parse_args()
    unknown = set(options.cases) - set(STATIC)
    if unknown:
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}")
    figures = _load()
    for case in options.cases or STATIC:
        if case not in figures["counts"]:
            sys.stderr.write(f"{case}\n")
            figures["counts"][case] = run_isolated(count, {"case": case, "steps": STEPS}).result
            _save(figures)
        timed = figures.setdefault("latency", {}) if options.latency else None
        if timed is not None and case not in timed:
            sys.stderr.write(f"{case}: latency\n")
            timed[case] = latency.measure(case, STEPS, WORK)
            _save(figures)
    for recipe in stickers.HELD if options.memory else ():
        held = figures.setdefault("memory", {})
        if recipe not in held:
            sys.stderr.write(f"memory: {recipe}\n")
            held[recipe] = stickers.hold_graphs(WORK, recipe)
            _save(figures)
    jobs = {
        "stickers": (options.stickers, lambda: stickers.time_pictures(WORK)),
        "step_grids": (options.step_grids, lambda: step_grids.measure(WORK)),
        "step_bits": (options.step_bits, lambda: step_bits.measure(WORK)),
    }
    for name, (wanted, job) in jobs.items():
        if wanted and name not in figures:
            sys.stderr.write(f"{name}\n")
            figures[name] = job()
            _save(figures)
    _save(figures)


def _load() -> dict[str, Any]:
    path = RESULTS / "figures.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"counts": {}}
    return figures


def _save(figures: dict[str, Any]) -> None:
    figures["machine"] = describe_machine()
    RESULTS.mkdir(exist_ok=True)
    for name, text in (("figures.json", json.dumps(figures, indent=1) + "\n"), ("README.md", markdown(figures))):
        partial = RESULTS / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.rename(RESULTS / name)


if __name__ == "__main__":
    main()

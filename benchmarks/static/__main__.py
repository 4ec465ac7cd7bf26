"""Counts what leaves the loop of networks of full size, and times both forms of the built-in generator.

``python -m benchmarks.static [CASE ...] [--stickers]`` goes on where it was interrupted: what is in ``figures.json`` is
not measured again. Networks of full size are traced without values: counting takes no memory for their weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.scale.table import describe_machine
from benchmarks.static.jobs import count
from benchmarks.static.networks import STATIC
from benchmarks.static.table import markdown
from fewstep.isolated import run_isolated

RESULTS = Path(__file__).parent / "results"
WORK = Path("build/static")
STEPS = 4
_RUNS = 15


def main() -> None:
    """Measures the cases that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(STATIC)}; all of them by default")
    parser.add_argument("--stickers", action="store_true", help="time the built-in generator too")
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
    if options.stickers and "stickers" not in figures:
        figures["stickers"] = _stickers()
    _save(figures)


def _stickers() -> dict[str, Any]:
    """Returns sizes, and times of a picture in turns, at each step count."""
    import fewstep
    from fewstep.runtimes.sampler import open_sampler

    options = fewstep.Options(prompts=2, seeds=1, profile=False)
    bundles = {}
    for form in ("step", "table"):
        out = WORK / f"stickers-{form}"
        bundles[form] = (
            fewstep.Bundle.open(out) if out.is_dir() else fewstep.build("stickers", form=form, out=out, options=options)
        )
    samplers = {form: open_sampler(bundle, threads=1) for form, bundle in bundles.items()}
    times: dict[str, dict[str, list[float]]] = {}
    for steps, schedule in sorted(bundles["step"].manifest.schedules.items()):
        found: dict[str, list[float]] = {form: [] for form in samplers}
        for seed in range(_RUNS + 2):
            for form, sampler in samplers.items():
                start = time.perf_counter()
                sampler("a red apple", seed, schedule)
                found[form].append(1e3 * (time.perf_counter() - start))
        times[str(steps)] = {form: _summary(values[2:]) for form, values in found.items()}
    sizes = {form: {a.component: a.bytes for a in bundle.manifest.artifacts} for form, bundle in bundles.items()}
    return {"picture_ms": times, "bytes": sizes, "where_ms": _where(samplers["table"], bundles["table"])}


def _where(sampler: Any, bundle: Any) -> dict[str, list[float]]:
    """Returns the calls in a picture of the default steps and the least time of one, by component."""
    manifest = bundle.manifest
    sample = sampler("a red apple", 0, manifest.schedule(manifest.default_steps))
    found = {}
    for component in manifest.components:
        feeds = [feed for feed in sample.feeds if feed.component == component]
        times = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            sampler.session(component).run(feeds[0].inputs)
            times.append(1e3 * (time.perf_counter() - start))
        found[component] = [len(feeds), round(min(times), 2)]
    return found


def _summary(times_ms: list[float]) -> list[float]:
    """Returns median and least time."""
    return [round(statistics.median(times_ms), 1), round(min(times_ms), 1)]


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

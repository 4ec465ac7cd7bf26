"""The built-in generator in every form: time of a picture, sizes, memory of its graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fewstep
from benchmarks.static import memory
from fewstep.pipeline import stages
from fewstep.progress import Silent
from fewstep.runtimes.sampling.sampler import Sampler, open_sampler

# Name of a bundle, with recipe and form.
BUNDLES = {"step": ("fp32", "step"), "table": ("fp32", "table"), "int8": ("w8a8", "table")}
HELD = ("fp32", "w8a8")
_RUNS = 15
_PROMPT = "a red apple"


def time_pictures(work: Path) -> dict[str, Any]:
    """Returns ms of a picture of each bundle at each step count, taken in turns, sizes, and where the time goes."""
    bundles = {name: _bundle(work, recipe, form) for name, (recipe, form) in BUNDLES.items()}
    samplers = {name: open_sampler(bundle, threads=1) for name, bundle in bundles.items()}
    times = {}
    for steps in sorted(bundles["step"].manifest.schedules):
        found: dict[str, list[float]] = {name: [] for name in samplers}
        for seed in range(_RUNS + 2):
            for name, sampler in samplers.items():
                schedule = bundles[name].manifest.schedule(steps)
                start = time.perf_counter()
                sampler(_PROMPT, seed, schedule)
                found[name].append(round(1e3 * (time.perf_counter() - start), 2))
        times[str(steps)] = {name: values[2:] for name, values in found.items()}
    sizes = {name: {a.component: a.bytes for a in bundle.manifest.artifacts} for name, bundle in bundles.items()}
    where = {name: _where(samplers[name], bundles[name]) for name in ("table", "int8")}
    return {"picture_ms": times, "bytes": sizes, "where_ms": where}


def hold_graphs(work: Path, recipe: str) -> dict[str, Any]:
    """Returns what the ways to hold the graphs of 4 steps take."""
    paths = {form: _graphs(work / "graphs", recipe, form) for form in ("step", "table", "specialized")}
    sizes = {
        form: sum(p.stat().st_size for p in {*listed, *(q for p in listed for q in p.parent.glob(f"{p.name}.data"))})
        for form, listed in paths.items()
    }
    ways = memory.measure(paths["step"][0], paths["table"][0], paths["specialized"])
    return {"graphs": len(paths["specialized"]), "bytes": sizes, "ways": ways}


def _graphs(work: Path, recipe: str, form: str) -> list[Path]:
    """Returns the graphs of the denoiser, compiled now unless they are there; their bundle is not verified."""
    out = work / f"{recipe}-{form}"
    if not out.is_dir():
        toml = work / f"{recipe}-{form}.toml"
        work.mkdir(parents=True, exist_ok=True)
        toml.write_text(f'base = "{recipe}"\nform = "{form}"\n')
        stages.compile(
            "stickers", out, targets=["onnxruntime"], recipe=str(toml), steps=[4], guidance=None, progress=Silent()
        )
    return sorted((out / "onnxruntime" / "unet").glob("*.onnx"), key=lambda path: (len(path.name), path.name))


def _bundle(work: Path, recipe: str, form: str) -> fewstep.Bundle:
    """Returns a bundle of stickers, built now unless it is there."""
    out = work / f"stickers-{recipe}-{form}"
    if out.is_dir():
        return fewstep.Bundle.open(out)
    options = fewstep.Options(prompts=2, seeds=1, profile=False)
    return fewstep.build("stickers", recipe, form=form, out=out, options=options)


def _where(sampler: Sampler, bundle: fewstep.Bundle) -> dict[str, list[float]]:
    """Returns the calls in a picture of the default steps and the least time of one, by component."""
    manifest = bundle.manifest
    sample = sampler(_PROMPT, 0, manifest.schedule(manifest.default_steps))
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


def ratio(times: Mapping[str, Sequence[float]], a: str, b: str) -> str:
    """Returns the median of a / b over the turns, with the middle 80 % of it."""
    each = sorted(x / y for x, y in zip(times[a], times[b], strict=True))
    low, high = each[len(each) // 10], each[-1 - len(each) // 10]
    return f"{statistics.median(each):.3f} ({low:.2f} to {high:.2f})"


def markdown(figures: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the tables of `time_pictures`."""
    lines = [
        f"ONNX Runtime on one thread of {machine['processor']}: the bundles draw the same picture in turns, {_RUNS} "
        "times. Median ms of a picture, from prompt to pixels; ratios are medians of those of each turn, with the "
        "middle 80 %.",
        "",
        "| steps | step form | table form | int8, table form | table / step | int8 / fp32, table form |",
        "|---" * 6 + "|",
    ]
    for steps, times in figures["picture_ms"].items():
        medians = " | ".join(f"{statistics.median(times[name]):.1f}" for name in BUNDLES)
        lines.append(f"| {steps} | {medians} | {ratio(times, 'table', 'step')} | {ratio(times, 'int8', 'table')} |")
    sizes = {name: sum(found.values()) for name, found in figures["bytes"].items()}
    lines += [
        "",
        "All components: "
        + ", ".join(f"{name} {size / (1 << 20):.1f} MiB ({size / sizes['step']:.3f})" for name, size in sizes.items())
        + ".",
        "",
        "Where the time of a picture goes (table form, default steps, least ms of a call):",
        "",
        "| component | calls | fp32, ms | together | int8, ms | together |",
        "|---" * 6 + "|",
    ]
    for component, (calls, ms) in figures["where_ms"]["table"].items():
        _, integer = figures["where_ms"]["int8"][component]
        lines.append(f"| {component} | {calls} | {ms} | {calls * ms:.1f} | {integer} | {calls * integer:.1f} |")
    return lines

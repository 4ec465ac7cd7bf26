"""How long a bundle takes beside the fp32 bundle: both open in one process, call by call in turn, one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from fewstep.bundle.bundle import Bundle
from fewstep.runtimes.profiling import profile
from fewstep.runtimes.sampling.sampler import open_sampler

CALLS, PICTURES, WARM_UP = 50, 15, 5


def measure(bundle: str, reference: str, steps: int) -> dict[str, Any]:
    """Returns times in ms of every component and of a whole picture, of both bundles, and their ratio.

    ``ratio`` is the median of the bundle over the median of the reference in the same run, ``least_ratio`` the least
    over the least, which says something on a quiet machine only: on a crowded one few calls run undisturbed.
    """
    samplers = [open_sampler(Bundle.open(path), threads=1) for path in (reference, bundle)]
    manifest = Bundle.open(reference).manifest
    schedule, prompt = manifest.schedule(steps), manifest.prompts[0]
    sample = samplers[0](prompt, 0, schedule)
    samplers[1](prompt, 0, schedule)
    measured = {}
    for component in manifest.components:
        inputs = next(f.inputs for f in sample.feeds if f.component == component)
        first, second = (s.session(component) for s in samplers)
        measured[component] = in_turn(lambda: first.run(inputs), lambda: second.run(inputs), CALLS)  # noqa: B023
    measured["picture"] = in_turn(
        lambda: samplers[0](prompt, 0, schedule), lambda: samplers[1](prompt, 0, schedule), PICTURES
    )
    for sampler in samplers:
        sampler.close()
    peak = profile(Bundle.open(bundle), steps=steps, runs=1, threads=1).peak_memory_bytes
    return {"threads": 1, "times": measured, "peak_memory_bytes": peak}


def in_turn(reference: Callable[[], object], other: Callable[[], object], runs: int) -> dict[str, Any]:
    """Returns the times in ms of two calls and their ratio, as `measure` has them of every component."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(WARM_UP + runs):
        # Who comes first changes, so that neither has the warmer caches throughout.
        for which in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            (reference, other)[which]()
            if i >= WARM_UP:
                times[which].append(1e3 * (time.perf_counter() - start))
    ratio = statistics.median(times[1]) / statistics.median(times[0])
    return {
        "runs": runs,
        "reference_ms": _spread(times[0]),
        "ms": _spread(times[1]),
        "ratio": round(ratio, 4),
        "least_ratio": round(min(times[1]) / min(times[0]), 4),
    }


def _spread(times_ms: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times_ms)
    tenth = len(ordered) // 10
    return {
        "median": round(statistics.median(ordered), 3),
        "least": round(ordered[0], 3),
        "low": round(ordered[tenth], 3),
        "high": round(ordered[-1 - tenth], 3),
    }

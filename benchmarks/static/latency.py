"""Time of a step of networks of full size in ONNX Runtime, in step form and in table form."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.static.memory import random_feeds
from fewstep.bundle.program import Program
from fewstep.run_in_subprocess import run_isolated
from fewstep.runtimes.onnxruntime.runtime import session_options

# The form's programs that are timed: of the table form, what runs in a step and what runs once.
PARTS = ("step", "table", "once")


def measure(case: str, steps: int, work: Path, *, runs: int = 2) -> dict[str, Any]:
    """Returns the least CPU seconds of a call and the peak of memory of each part, each in a process of its own.

    Weights are zeros, which dense kernels multiply as fast as any. One model lies on disk at a time, stored in halves.
    """
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    for part in PARTS:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            made = run_isolated(compile_part, {"case": case, "steps": steps, "part": part, "folder": folder}).result
            if made is not None:
                done = run_isolated(time_part, {"path": made, "runs": runs})
                found[part] = {"seconds": done.result, "peak_bytes": done.peak_bytes}
    return found


def compile_part(case: str, steps: int, part: str, folder: str) -> str | None:
    """Returns the path of the model of a part, None where the network has no such part."""
    from fewstep.runtimes.onnxruntime.compile.lower import lower  # needs torch, whose memory is not that of a device

    program = _program(case, steps, part)
    return None if program is None else str(Path(folder) / lower(program, Path(folder), "fp16").path)


def time_part(path: str, runs: int) -> float:
    """Returns the least CPU seconds of a call of a model, after one that warms up: the machine may be shared."""
    session = onnxruntime.InferenceSession(path, session_options(threads=1), providers=["CPUExecutionProvider"])
    feeds = random_feeds(session)
    times = []
    for _ in range(runs + 1):
        start = time.process_time()
        session.run(None, feeds)
        times.append(time.process_time() - start)
    return round(min(times[1:]), 3)


def _program(case: str, steps: int, part: str) -> Program | None:
    from benchmarks.static.jobs import program_of
    from benchmarks.static.networks import STATIC
    from fewstep.export.specialize.hoist import specialize

    program = program_of(STATIC[case])
    if part == "step":
        return program
    static = specialize(program, [{"timestep": 999.0 - 100.0 * k} for k in range(steps)])
    return static.step if part == "table" else static.conditions


def markdown(figures: Mapping[str, Any], steps: int) -> list[str]:
    """Returns the lines of a table."""
    lines = [
        f"CPU time of one thread, fp32 arithmetic, zeros for weights; least of 2 calls. A picture is {steps} steps, "
        "in table form with what runs once. Memory is the peak of a process.",
        "",
        "| network | step form, s | table form, s | once, s | picture, table / step | step form, GiB | table form, GiB "
        "| ratio |",
        "|---" * 8 + "|",
    ]
    for case, parts in figures.items():
        step, table = parts["step"], parts["table"]
        once = parts.get("once", {"seconds": 0.0})["seconds"]
        ratio = (once + steps * table["seconds"]) / (steps * step["seconds"])
        peaks = [part["peak_bytes"] / (1 << 30) for part in (step, table)]
        cells = [
            case,
            *(f"{value:.2f}" for value in (step["seconds"], table["seconds"], once)),
            f"{ratio:.3f}",
            *(f"{peak:.2f}" for peak in peaks),
            f"{peaks[1] / peaks[0]:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines

"""The figures as a page: tables, fitted exponents, and whether each limit is kept."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.scale import shapes, tiles

Figures = dict[str, Any]
_MIB, _GIB = 1 << 20, 1 << 30
_STAGES = ("import", "trace", "translate", "save")
_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime")


def describe_machine() -> dict[str, Any]:
    """Returns the processor, memory and versions that figures depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / _GIB),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }


def exponents(compiled: Figures) -> dict[str, float]:
    """Returns the exponents e of c n^e fitted to peak memory and CPU time of the denoisers of n parameters."""
    denoisers = [case["denoiser"] for case in compiled.values() if "denoiser" in case]
    if len(denoisers) < 2:
        return {}
    sizes = np.log([d["parameters"] for d in denoisers])
    curves = {
        "peak memory": [d["total_peak_bytes"] for d in denoisers],
        "CPU time": [sum(d["cpu_seconds"].values()) for d in denoisers],
    }
    return {name: float(np.polyfit(sizes, np.log(values), 1)[0]) for name, values in curves.items()}


def markdown(figures: Figures) -> str:
    """Returns the page."""
    machine, compiled = figures["machine"], figures["compile"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# Compiling networks of full size",
        "",
        "Real architectures with random fp16 weights to ONNX with fp16 weights, each component in a process of its "
        "own; written by `python -m benchmarks.scale`.",
        "",
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB; {machine['system']}, "
        f"Python {machine['python']}, {versions}. The machine was shared: CPU seconds compare, wall seconds are upper "
        "bounds.",
        "",
        "| case | component | parameters, M | fp16 weights, MiB | peak, MiB | peak / weights | "
        + " | ".join(f"{stage}, CPU s" for stage in _STAGES)
        + " | wall, s | files, MiB |",
        "|---" * (8 + len(_STAGES)) + "|",
    ]
    for case, components in compiled.items():
        lines += [_compile_row(case, name, figure) for name, figure in components.items()]
    lines += ["", *(f"- {text}" for text in _verdicts(compiled))]
    if figures["sessions"]:
        lines += ["", "## The denoisers in ONNX Runtime, one thread", "", *_session_table(figures["sessions"])]
    if figures.get("shapes"):
        lines += shapes.section(figures["shapes"])
    if figures.get("tiles"):
        lines += tiles.section(figures["tiles"])
    return "\n".join(lines) + "\n"


def _compile_row(case: str, component: str, figure: Figures) -> str:
    weights, peak = 2 * figure["parameters"], figure["total_peak_bytes"]
    cells = [
        case,
        component,
        f"{figure['parameters'] / 1e6:.1f}",
        f"{weights / _MIB:.0f}",
        f"{peak / _MIB:.0f}",
        f"{peak / weights:.2f}",
        *(f"{figure['cpu_seconds'][stage]:.1f}" for stage in _STAGES),
        f"{figure['total_seconds']:.0f}",
        " + ".join(f"{size / _MIB:.1f}" for size in figure["files"].values()),
    ]
    return f"| {' | '.join(cells)} |"


def _verdicts(compiled: Figures) -> list[str]:
    texts = []
    if "sd15" in compiled:
        peak = max(figure["total_peak_bytes"] for figure in compiled["sd15"].values())
        limit = 1.3 * 2 * max(figure["parameters"] for figure in compiled["sd15"].values()) + _GIB
        seconds = sum(figure["total_seconds"] for figure in compiled["sd15"].values())
        cpu_seconds = sum(sum(figure["cpu_seconds"].values()) for figure in compiled["sd15"].values())
        texts.append(f"SD 1.5 size: peak {peak / _MIB:.0f} MiB, limit {limit / _MIB:.0f}: {_kept(peak <= limit)}")
        texts.append(
            f"SD 1.5 size: {cpu_seconds:.0f} CPU s ({seconds:.0f} s on this machine), limit 600 on an idle one: "
            f"{_kept(cpu_seconds <= 600)}"
        )
    if "sdxl" in compiled:
        peak = max(figure["total_peak_bytes"] for figure in compiled["sdxl"].values())
        texts.append(f"SDXL size: peak {peak / _MIB:.0f} MiB, limit {24 * _GIB // _MIB}: {_kept(peak <= 24 * _GIB)}")
    for name, exponent in exponents(compiled).items():
        texts.append(
            f"growth of {name} with parameters: exponent {exponent:.2f}, limit 1.05: {_kept(exponent <= 1.05)}"
        )
    return texts


def _session_table(sessions: Figures) -> list[str]:
    stages = ("open", "first call", "second call")
    lines = [
        "| case | session | " + " | ".join(f"peak after {s}, MiB" for s in stages) + " | open, CPU s | call, CPU s |",
        "|---" * (4 + len(stages)) + "|",
    ]
    for case, figures in sessions.items():
        for name, figure in figures.items():
            peaks = [f"{figure['peak_bytes'][stage] / _MIB:.0f}" for stage in stages]
            times = [f"{figure['cpu_seconds'][stage]:.1f}" for stage in ("open", "second call")]
            lines.append(f"| {' | '.join([case, name, *peaks, *times])} |")
    return lines


def _kept(kept: bool) -> str:
    return "kept" if kept else "**exceeded**"


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

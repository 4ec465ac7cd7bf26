"""What compiling FLUX.1-schnell (12 B) takes, from its configurations alone: no weights are read, and none written.

    python -m benchmarks.scale.plan

Sizes follow from the parameters' shapes. Tracing and translating to ONNX do not look at values, so both are run at full
size, on weights that are not there. What remains is writing, and its time is that of the bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.scale.networks import FLUX
from benchmarks.scale.planned import plan_component
from benchmarks.scale.table import describe_machine
from fewstep.run_in_subprocess import run_isolated

RESULTS = Path(__file__).parent / "results"
_MIB, _GIB = 1 << 20, 1 << 30


def writing_seconds(fp16_bytes: int, compiled: Mapping[str, Any]) -> float:
    """Returns the CPU seconds of writing so many bytes, at the rate of the largest network that was measured."""
    measured = [component for case in compiled.values() for component in case.values()]
    largest = max(measured, key=lambda component: int(component["artifact_bytes"]))
    return fp16_bytes * float(largest["cpu_seconds"]["save"]) / float(largest["artifact_bytes"])


def page(figures: Mapping[str, Any], compiled: Mapping[str, Any]) -> str:
    """Returns the plan as a page.

    Args:
        figures: of `plan_component`, by component, under ``components``.
        compiled: what compiling other networks took, as ``figures.json`` has it under ``compile``.
    """
    machine, components = figures["machine"], figures["components"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# A plan for FLUX.1-schnell",
        "",
        "From its configurations alone, written by `python -m benchmarks.scale.plan`: 1024x1024 pictures, prompts of "
        "256 tokens. Sizes count parameters; in int8 and int4 matrices and kernels are quantized (int8 with an fp16 "
        "scale for each output channel, int4 with one for 32 weights), vectors stay fp16. *Trace* and *translate* were "
        "run at full size on weights that are not there, each component in a process of its own. *Write* is computed: "
        "bytes at the rate of the largest network that was written (README.md here). None of this was run on a device.",
        "",
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB; {machine['system']}, "
        f"Python {machine['python']}, {versions}. The machine was shared.",
        "",
        "| component | class | parameters, M | fp16, MiB | int8, MiB | int4, MiB | nodes | peak, MiB | trace, CPU s | "
        "translate, CPU s | write, CPU s (computed) |",
        "|---" * 11 + "|",
    ]
    total = dict.fromkeys(("parameters", "fp16", "int8", "int4"), 0)
    seconds = 0.0
    for name, figure in components.items():
        sizes, cpu = figure["sizes"], figure["cpu_seconds"]
        for key in total:
            total[key] += sizes[key]
        write = writing_seconds(sizes["fp16"], compiled)
        seconds += sum(cpu.values()) + write
        cells = [name, figure["class"], f"{sizes['parameters'] / 1e6:.1f}"]
        cells += [f"{sizes[key] / _MIB:.0f}" for key in ("fp16", "int8", "int4")]
        cells += [str(figure["nodes"]), f"{figure['total_peak_bytes'] / _MIB:.0f}"]
        cells += [f"{cpu['trace']:.0f}", f"{cpu['translate']:.0f}", f"{write:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    sums = [f"{total['parameters'] / 1e6:.1f}", *(f"{total[k] / _MIB:.0f}" for k in ("fp16", "int8", "int4"))]
    lines.append(f"| all | | {' | '.join(sums)} | | | | | |")
    peaks = {name: figure["total_peak_bytes"] for name, figure in components.items()}
    # A tensor is read as it is stored, and rounded or turned beside that.
    writing = {name: peak + 2 * components[name]["sizes"]["largest_fp16"] for name, peak in peaks.items()}
    denoiser = components["denoiser"]["sizes"]
    lines += [
        "",
        f"- Compiling: at least {max(peaks.values()) / _MIB:.0f} MiB, which is what tracing and translating took. "
        "While weights are written, the largest tensor is beside that, stored and rounded: at most "
        f"{max(writing.values()) / _MIB:.0f} MiB is to be expected. All of it takes about {seconds / 60:.0f} minutes "
        "of CPU time, one component after the other.",
        f"- Disk: {2 * total['fp16'] / _GIB:.0f} GiB for the fp16 checkpoint and its fp16 bundle.",
        "- Verifying on a CPU: ONNX Runtime widens fp16 weights to fp32 when it opens them, so the denoiser takes "
        f"{2 * denoiser['fp16'] / _GIB:.0f} GiB, and PyTorch's reference as much.",
        f"- Weights of the denoiser: {denoiser['fp16'] / _GIB:.1f} GiB in fp16, {denoiser['int8'] / _GIB:.1f} in int8, "
        f"{denoiser['int4'] / _GIB:.1f} in int4.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures what is missing in ``results/flux.json`` and writes the page."""
    path = RESULTS / "flux.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"components": {}}
    for name in FLUX:
        if name not in figures["components"]:
            sys.stderr.write(f"flux: {name}\n")
            measured = run_isolated(plan_component, {"name": name})
            figures["components"][name] = {"total_peak_bytes": measured.peak_bytes, **measured.result}
            figures["machine"] = describe_machine()
            path.write_text(json.dumps(figures, indent=1) + "\n")
    compiled = json.loads((RESULTS / "figures.json").read_text())["compile"]
    (RESULTS / "flux.md").write_text(page(figures, compiled))


if __name__ == "__main__":
    main()

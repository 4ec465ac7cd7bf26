"""Builds a whole generator of real size: compiles every component, draws one picture and compares it with PyTorch.

    python -m benchmarks.scale.bundle sd15 [--steps 4]

Compiling and the whole build run in processes of their own, so that each has its own peak of memory. The first is what
a user's machine must have to compile; comparing needs PyTorch's and ONNX Runtime's fp32 copies of the networks beside
it, and is measured on its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.scale.builds import build_and_verify, compile_all
from benchmarks.scale.folder import write_folder
from fewstep.run_in_subprocess import run_isolated

ROOT = Path("build/scale")
RESULTS = Path(__file__).parent / "results"
_MIB = 1 << 20


def main() -> None:
    """Runs a case and keeps its figures in ``results``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=["sd15", "sdxl"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    source = write_folder(options.case, ROOT / options.case / "folder")
    largest = max(p.stat().st_size for p in source.rglob("*.safetensors"))
    job = {"source": str(source), "steps": options.steps}
    figures: dict[str, Any] = {"case": options.case, "steps": options.steps, "largest_weights_bytes": largest}
    out = ROOT / options.case / "compiled"
    if not out.exists():
        compiled = run_isolated(compile_all, {**job, "out": str(out)})
        figures["compile"] = asdict(compiled)
        _keep(figures)
    if not options.compile_only:
        built = run_isolated(build_and_verify, {**job, "out": str(ROOT / options.case / "bundle")})
        figures["build"] = asdict(built)
        _keep(figures)


def _keep(figures: dict[str, Any]) -> None:
    path = RESULTS / f"bundle-{figures['case']}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **figures}, indent=1) + "\n")
    cases = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("bundle-*.json"))]
    (RESULTS / "bundles.md").write_text(_page(cases))
    sys.stderr.write(f"{path}\n")


def _page(cases: list[dict[str, Any]]) -> str:
    """Returns the figures as a page."""
    lines = [
        "# Building whole generators of full size",
        "",
        "Random fp16 weights, recipe fp16, written by `python -m benchmarks.scale.bundle CASE`. *Compile* makes every "
        "component; *build* also runs PyTorch's own pipeline and the bundle in fp32 and compares them. Peaks are of "
        "the process, imports included. The machine was shared: seconds are upper bounds.",
        "",
        "| case | largest weights, MiB | compile: peak, MiB | peak / weights | compile, s | files, MiB | "
        "build: peak, MiB | build, s | least component SQNR, dB | picture PSNR, dB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        largest, compiled, built = case["largest_weights_bytes"], case.get("compile"), case.get("build")
        cells = [f"{case['case']}, {case['steps']} steps", f"{largest / _MIB:.0f}"]
        if compiled:
            size = sum(compiled["result"].values())
            peak = compiled["peak_bytes"]
            cells += [f"{peak / _MIB:.0f}", f"{peak / largest:.2f}", f"{compiled['seconds']:.0f}", f"{size / _MIB:.0f}"]
        else:
            cells += [""] * 4
        if built:
            worst = built["result"]["worst"]
            cells += [f"{built['peak_bytes'] / _MIB:.0f}", f"{built['seconds']:.0f}"]
            cells += [f"{worst[f'lowering.{level}']['value']:.1f}" for level in ("component", "picture")]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

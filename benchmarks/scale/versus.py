"""Compiles a generator of SD 1.5 size beside optimum-onnx: memory, time and sizes of both, one after the other.

    python -m benchmarks.scale.versus --peer .venv-interop/bin/python

Each compiles every component of the same diffusers folder, in a process of its own. optimum-onnx needs an environment
of its own, which `make interop` and `make bench-scale` make.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.scale.builds import compile_timed
from benchmarks.scale.folder import write_folder
from benchmarks.scale.table import describe_machine
from fewstep.run_in_subprocess import run_isolated

ROOT = Path("build/scale")
RESULTS = Path(__file__).parent / "results"
_MIB = 1 << 20
_PEER = "optimum-onnx, fp32"


def main() -> None:
    """Runs what is missing in ``results/versus.json`` and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=["sd15", "sdxl"], default="sd15")
    parser.add_argument("--peer", type=Path, required=True, help="Python of an environment with optimum-onnx.")
    options = parser.parse_args()
    source = write_folder(options.case, ROOT / options.case / "folder")
    path = RESULTS / "versus.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"case": options.case, "runs": {}}
    for name in ("fewstep, fp16", "fewstep, fp32", _PEER):
        if name not in figures["runs"]:
            sys.stderr.write(f"{options.case}: {name}\n")
            out = ROOT / options.case / "versus"
            shutil.rmtree(out, ignore_errors=True)
            if name.startswith("fewstep"):
                figures["runs"][name] = _ours(source, out, name.rpartition(" ")[2])
            else:
                figures["runs"][name] = _theirs(options.peer, source, out)
            shutil.rmtree(out, ignore_errors=True)
            figures["machine"] = describe_machine()
            path.write_text(json.dumps(figures, indent=1) + "\n")
    (RESULTS / "versus.md").write_text(page(figures))


def _ours(source: Path, out: Path, recipe: str) -> dict[str, Any]:
    # A cache of its own, so that nothing was compiled before.
    arguments = {"source": str(source), "out": str(out), "recipe": recipe, "cache": str(out.with_name("cache"))}
    measured = run_isolated(compile_timed, arguments)
    shutil.rmtree(out.with_name("cache"))
    return {"seconds": measured.seconds, "peak_bytes": measured.peak_bytes, **measured.result}


def _theirs(python: Path, source: Path, out: Path) -> dict[str, Any]:
    command = [str(python.absolute()), "-m", "benchmarks.scale.peer_export", str(source), str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return figures


def page(figures: dict[str, Any]) -> str:
    """Returns the figures as a page."""
    machine = figures["machine"]
    ours = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    theirs = figures["runs"].get(_PEER, {}).get("versions", {})
    peer = ", ".join(f"{name} {version}" for name, version in theirs.items()) or "not run on this machine yet"
    lines = [
        f"# Compiling every component beside optimum-onnx: {figures['case']}",
        "",
        "The same diffusers folder with random fp16 weights, each compiler in a process of its own; written by "
        "`python -m benchmarks.scale.versus`. One run of each: no spread. Peaks are of the process, imports included. "
        "fewstep compiles what the pipeline calls; optimum-onnx exports the VAE's encoder too.",
        "",
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB; {machine['system']}, "
        f"Python {machine['python']}. fewstep: {ours}. Peer: "
        f"{peer}. The machine was shared: CPU seconds "
        "compare, wall seconds are upper bounds.",
        "",
        "| compiler, weights | peak, MiB | wall, s | CPU, s | components | files, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in figures["runs"].items():
        sizes = run["files_bytes"]
        cells = [name, f"{run['peak_bytes'] / _MIB:.0f}", f"{run['seconds']:.0f}", f"{run['cpu_seconds']:.0f}"]
        cells += [", ".join(sorted(sizes)), f"{sum(sizes.values()) / _MIB:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

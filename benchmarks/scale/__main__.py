"""Measures compiling networks of growing size and writes the figures as JSON and Markdown.

``python -m benchmarks.scale small middle sd15 sdxl`` goes on where it was interrupted: what is in ``figures.json``
is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.scale.networks import CASES
from benchmarks.scale.table import describe_machine, markdown
from fewstep.run_in_subprocess import run_isolated

RESULTS = Path(__file__).parent / "results"
WORK = Path("build/scale")
# Entries of an ONNX Runtime session's configuration, by what they are for.
SESSIONS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "without prepacking": {"session.disable_prepacking": "1"},
    "without constant folding": {"optimization.disable_specified_optimizers": "ConstantFolding"},
    "without either": {
        "optimization.disable_specified_optimizers": "ConstantFolding",
        "session.disable_prepacking": "1",
    },
}


def main() -> None:
    """Measures the cases that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all of them by default")
    parser.add_argument("--sessions", action="store_true", help="measure opening and running the denoisers too")
    parser.add_argument(
        "--shapes", action="store_true", help="measure several shapes over the same weights, and no cases"
    )
    parser.add_argument("--tiles", action="store_true", help="measure decoding whole and in tiles, and no cases")
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}")
    figures = _load()
    if options.shapes:
        _measure_shapes(figures)
    if options.tiles:
        _measure_tiles(figures)
    if options.shapes or options.tiles:
        return
    for case in options.cases or CASES:
        for component in CASES[case]:
            if component not in figures["compile"].get(case, {}):
                figures["compile"].setdefault(case, {})[component] = _compile(case, component)
                _save(figures)
        if options.sessions:
            for name, settings in SESSIONS.items():
                if name not in figures["sessions"].get(case, {}):
                    figures["sessions"].setdefault(case, {})[name] = _run(case, settings)
                    _save(figures)
    _save(figures)


def _compile(case: str, component: str) -> dict[str, Any]:
    from benchmarks.scale.checkpoint import write_checkpoint
    from benchmarks.scale.jobs import compile_component

    _tell(f"{case}: {component}")
    folder = write_checkpoint(CASES[case][component], WORK / case / "source" / component)
    out = WORK / case / "onnxruntime"
    shutil.rmtree(out / CASES[case][component].part.folder, ignore_errors=True)
    arguments = {"case": case, "component": component, "folder": str(folder), "out": str(out), "weights": "fp16"}
    measured = run_isolated(compile_component, arguments)
    return {"total_seconds": round(measured.seconds, 2), "total_peak_bytes": measured.peak_bytes, **measured.result}


def _run(case: str, settings: dict[str, str]) -> dict[str, Any]:
    from benchmarks.scale.jobs import run_component

    _tell(f"{case}: denoiser in ONNX Runtime with {settings}")
    folder = CASES[case]["denoiser"].part.folder
    path = WORK / case / "onnxruntime" / folder / "model.onnx"
    result: dict[str, Any] = run_isolated(run_component, {"path": str(path), "settings": settings}).result
    return result


def _measure_shapes(figures: dict[str, Any]) -> None:
    """Compiles the denoiser for several shapes, unless that was done before."""
    from benchmarks.scale.checkpoint import write_checkpoint
    from benchmarks.scale.shapes import compile_shapes

    if "shapes" not in figures:
        folder = write_checkpoint(CASES["sd15"]["denoiser"], WORK / "sd15" / "source" / "denoiser")
        out = WORK / "shapes"
        shutil.rmtree(out, ignore_errors=True)
        measured = run_isolated(compile_shapes, {"folder": str(folder), "out": str(out)})
        figures["shapes"] = {"files": measured.result, "peak_bytes": measured.peak_bytes}
        shutil.rmtree(out)
        _save(figures)


def _measure_tiles(figures: dict[str, Any]) -> None:
    """Compiles and runs the decoder for each case that was not measured before."""
    from benchmarks.scale import tiles
    from benchmarks.scale.checkpoint import write_checkpoint

    folder = write_checkpoint(CASES["sd15"]["decoder"], WORK / "sd15" / "source" / "decoder")
    for pixels, tile in tiles.CASES:
        name = tiles.name_of(pixels, tile)
        if name in figures.setdefault("tiles", {}):
            continue
        _tell(name)
        out = WORK / "tiles"
        shutil.rmtree(out, ignore_errors=True)
        arguments = {"out": str(out), "pixels": pixels, "tile": tile}
        files = run_isolated(tiles.compile_decoder, {"folder": str(folder), **arguments}).result
        figures["tiles"][name] = {"files": files, "decode": run_isolated(tiles.decode, arguments).result}
        _save(figures)


def _load() -> dict[str, Any]:
    path = RESULTS / "figures.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"compile": {}, "sessions": {}}
    return figures


def _save(figures: dict[str, Any]) -> None:
    figures["machine"] = describe_machine()
    RESULTS.mkdir(exist_ok=True)
    for name, text in (("figures.json", json.dumps(figures, indent=1) + "\n"), ("README.md", markdown(figures))):
        partial = RESULTS / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.rename(RESULTS / name)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

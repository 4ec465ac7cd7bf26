"""How much memory the evaluator takes for a network of full size: SD 1.5's UNet, one call at a small latent.

``python -m benchmarks.coreml.memory FOLDER``, with a folder of random weights as ``benchmarks.scale`` makes it
(``build/scale/sd15/folder``), writes ``results/memory.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from fewstep.isolated import run_isolated

RESULTS = Path(__file__).parent / "results"
CASE, COMPONENT, SIZE = "sd15", "unet", 16


def convert(folder: str, out: str) -> dict[str, Any]:
    """Returns the bytes of the weights of the UNet converted to fp16, without choosing fp32 operations."""
    from benchmarks.scale.networks import CASES, tensors
    from fewstep.export.fake_trace import stored_program
    from fewstep.runtimes import coreml_lower

    described = CASES[CASE][COMPONENT]
    arguments = {**described.arguments, "sample": (described.arguments["sample"][0], (1, 4, SIZE, SIZE))}
    program = stored_program(Path(folder), COMPONENT, described.part, tensors(arguments))
    path = Path(out) / "Unet.mlpackage"
    coreml_lower.save(coreml_lower.convert(program, "fp16"), path)
    return {"weight_bytes": sum(file.stat().st_size for file in path.rglob("weight.bin"))}


def evaluate(package: str) -> dict[str, Any]:
    """Returns the largest magnitude of the outputs of one call on random inputs, rounding to fp16."""
    import numpy as np

    from fewstep.runtimes.mil import Evaluator, open_package

    program = open_package(Path(package))
    rng = np.random.default_rng(0)
    feeds = {
        feature.name: rng.standard_normal(feature.shape).astype(feature.dtype.numpy)
        for feature in program.inputs[program.default]
        if feature.dtype is not None
    }
    outputs = Evaluator(program, precision="fp16").run(feeds)
    return {"largest": max(float(np.abs(value).max()) for value in outputs.values())}


def main() -> None:
    """Converts, evaluates and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coreml.memory", description=__doc__)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory(prefix="fewstep-coreml-") as out:
        sys.stderr.write("convert\n")
        converted = run_isolated(convert, {"folder": folder, "out": out})
        sys.stderr.write("evaluate\n")
        evaluated = run_isolated(evaluate, {"package": str(Path(out) / "Unet.mlpackage")})
    weights = converted.result["weight_bytes"]
    figures = {
        "latent": SIZE,
        "weight_bytes": weights,
        "convert": {"peak_bytes": converted.peak_bytes, "seconds": round(converted.seconds, 1)},
        "evaluate": {
            "peak_bytes": evaluated.peak_bytes,
            "of_weights": round(evaluated.peak_bytes / weights, 3),
            "seconds": round(evaluated.seconds, 1),
            "largest": evaluated.result["largest"],
        },
    }
    (RESULTS / "memory.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

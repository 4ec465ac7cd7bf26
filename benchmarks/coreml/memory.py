"""How much memory the evaluator takes for a network of full size: one call of SD 1.5's UNet.

``python -m benchmarks.coreml.memory FOLDER``, with a folder of random weights as ``benchmarks.scale`` makes it
(``build/scale/sd15/folder``), writes ``results/memory-64.json``; ``--latent 16`` is the same
weights with a smaller picture.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.coreml.large import convert, evaluate
from fewstep.run_in_subprocess import run_isolated

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Converts, evaluates and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coreml.memory", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--latent", type=int, default=64, help="its height and width (default: %(default)s)")
    arguments = parser.parse_args()
    folder, latent = arguments.folder, arguments.latent
    with tempfile.TemporaryDirectory(prefix="fewstep-coreml-") as out:
        sys.stderr.write("convert\n")
        converted = run_isolated(convert, {"folder": folder, "out": out, "latent": latent})
        sys.stderr.write("evaluate\n")
        evaluated = run_isolated(evaluate, {"package": str(Path(out) / "Unet.mlpackage")})
    weights = converted.result["weight_bytes"]
    figures = {
        "latent": latent,
        "weight_bytes": weights,
        "convert": {"peak_bytes": converted.peak_bytes, "seconds": round(converted.seconds, 1)},
        "evaluate": {
            "peak_bytes": evaluated.peak_bytes,
            "of_weights": round(evaluated.peak_bytes / weights, 3),
            "seconds": round(evaluated.seconds, 1),
            "largest": evaluated.result["largest"],
        },
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"memory-{latent}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

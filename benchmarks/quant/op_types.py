"""What each operator type costs and gains when ONNX Runtime's ``quantize_static`` quantizes it beside the products.

    python -m benchmarks.quant.op_types

Quantizes the denoiser with Conv, MatMul and Gemm, then with one further type at a time, then with all of the tool's
own, and writes ``results/op-types.md``. `python -m benchmarks.quant` must have recorded the calls before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.quant import models
from benchmarks.quant.cells import Cells, sources_sha256
from benchmarks.quant.reference import ALL
from benchmarks.quant.rows import Method
from fewstep.bundle.bundle import Bundle
from fewstep.run_in_subprocess import run_isolated

HERE = Path(__file__).parent
RESULTS, WORK = HERE / "results", Path("build/quant")
PRODUCTS = ("Conv", "MatMul", "Gemm")
FURTHER = (
    "Add",
    "Mul",
    "Div",
    "Sigmoid",
    "Softmax",
    "Concat",
    "Split",
    "Slice",
    "Resize",
    "Reshape",
    "Transpose",
    "Unsqueeze",
    "InstanceNormalization",
    "LayerNormalization",
)
SAMPLES, CALLS = 16, 30


def compare(model: str, base: str, samples: str) -> dict[str, Any]:
    """Returns the SQNR of a denoiser at each step, in dB, and its latency over that of ``base``, called in turn."""
    import onnxruntime

    from fewstep.bundle.contract import DENOISER
    from fewstep.bundle.samples import load_samples
    from fewstep.numerics.metrics import sqnr_db

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sessions = [
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in (base, model)
    ]
    feeds = [f for s in load_samples(Path(samples))[:SAMPLES] for f in s.feeds if f.component == DENOISER]
    by_step: dict[int, list[float]] = {}
    for feed in feeds:
        value = sessions[1].run(None, dict(feed.inputs))[0]
        by_step.setdefault(feed.step or 0, []).append(sqnr_db(next(iter(feed.outputs.values())), value))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(CALLS):
        for session, kept in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, dict(feeds[0].inputs))
            kept.append(1e3 * (time.perf_counter() - start))
    return {
        "step_sqnr_db": [round(statistics.fmean(by_step[k]), 2) for k in sorted(by_step)],
        "ratio": round(min(times[1]) / min(times[0]), 3),
    }


def measure(bundle: Bundle, op_types: tuple[str, ...], name: str, cells: Cells) -> dict[str, Any]:
    """Returns the comparison of the denoiser with these types quantized, measured unless it has been."""
    path = bundle.manifest.artifact(models.RUNTIME, "denoiser").path
    options = {"activations": "u8", "per_channel": True, "op_types": list(op_types)}
    key = {
        "network": bundle.manifest.files[path].sha256[:16],
        "options": options,
        **sources_sha256(HERE / "op_types.py", HERE / "prompts.py", HERE / "reference.py"),
    }

    def make() -> dict[str, Any]:
        out, base = (WORK / "op-types" / f"{n}.onnx" for n in (name, "products"))
        method = Method(name, name, "ort", "ort_static", options)
        models.quantize(method, "denoiser", bundle.file(path), WORK / "calls" / ALL / "denoiser.npz", out)
        arguments = {"model": str(out), "base": str(base), "samples": str(WORK / "reference")}
        found: dict[str, Any] = run_isolated(compare, arguments).result
        if name != "products":
            out.unlink()
        return found

    missing = name == "products" and not (WORK / "op-types" / "products.onnx").is_file()
    return cells.get_or_make(f"op-types/{name}", key, make, again=missing)


def main() -> None:
    """Measures every type and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quant.op_types", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/stickers"), help="the fp32 bundle of stickers")
    bundle = Bundle.open(parser.parse_args().bundle)
    cells = Cells(RESULTS / "cells")
    lines = [
        "# What further operator types cost when ONNX Runtime quantizes them",
        "",
        "The denoiser by `quantize_static`, u8s8, weights per channel, calibrated on all steps: Conv, MatMul and Gemm, "
        "then one further type beside them. SQNR of the output given the fp32 bundle's inputs; least latency over that "
        "of the first row, called in turn, one thread. Written by `python -m benchmarks.quant.op_types`.",
        "",
        "| quantized | step SQNR, dB | latency |",
        "|---|---|---|",
    ]
    variants = {"products": PRODUCTS, **{op: (*PRODUCTS, op) for op in FURTHER}, "all": ()}
    labels = {"products": "Conv, MatMul, Gemm", "all": "all of the tool's own types"}
    for name, op_types in variants.items():
        found = measure(bundle, op_types, name, cells)
        label = labels.get(name, f"+ {name}")
        if "error" in found:
            lines.append(f"| {label} | {found['error']} | |")
        else:
            lines.append(
                f"| {label} | {' / '.join(f'{v:.1f}' for v in found['step_sqnr_db'])} | {found['ratio']:.2f} |"
            )
    (RESULTS / "op-types.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from benchmarks.quant import op_types  # under its own name: an isolated process cannot import from __main__

    op_types.main()

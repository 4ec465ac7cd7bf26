"""NNCF's ``nncf.quantize`` on the ONNX model."""

from __future__ import annotations

from typing import Any

import nncf
import onnx
from calls import each_call, run_job


def quantize(job: dict[str, Any]) -> None:
    """Writes the quantized model; options: model_type (null or transformer), preset (null, mixed or performance)."""
    options = job["options"]
    calls = list(each_call(job["calls"]))
    model_type, preset = options["model_type"], options["preset"]
    quantized = nncf.quantize(
        onnx.load(job["model"]),
        nncf.Dataset(calls),
        subset_size=len(calls),
        model_type=None if model_type is None else nncf.ModelType(model_type),
        preset=None if preset is None else nncf.QuantizationPreset(preset),
    )
    onnx.save(quantized, job["out"])


if __name__ == "__main__":
    run_job(quantize)

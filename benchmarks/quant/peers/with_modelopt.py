"""NVIDIA ModelOpt's ``modelopt.onnx.quantization.quantize`` with calibration on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from calls import read_calls, run_job
from modelopt.onnx.quantization import quantize as modelopt_quantize


def quantize(job: dict[str, Any]) -> None:
    """Writes the quantized model; options: method (max or entropy)."""
    calls = {name: np.concatenate(list(array)) for name, array in read_calls(job["calls"]).items()}
    modelopt_quantize(
        job["model"],
        quantize_mode="int8",
        calibration_data=calls,
        calibration_method=job["options"]["method"],
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=job["out"],
    )


if __name__ == "__main__":
    run_job(quantize)

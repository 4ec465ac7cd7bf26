"""ONNX Runtime's ``quantize_static``, as its documentation says: pre-process, then Q/DQ with calibrated ranges."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from calls import each_call, run_job
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

_TYPES = {"u8": QuantType.QUInt8, "s8": QuantType.QInt8}


class _Reader(CalibrationDataReader):
    def __init__(self, path: str) -> None:
        self._calls = each_call(path)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._calls, None)


def quantize(job: dict[str, Any]) -> None:
    """Writes the quantized model; options: activations (u8, s8), per_channel, op_types (empty: the tool's own)."""
    options = job["options"]
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "model.onnx"
        quant_pre_process(job["model"], prepared)
        quantize_static(
            prepared,
            job["out"],
            _Reader(job["calls"]),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=options["op_types"] or None,
            per_channel=options["per_channel"],
            activation_type=_TYPES[options["activations"]],
            weight_type=QuantType.QInt8,
        )


if __name__ == "__main__":
    run_job(quantize)

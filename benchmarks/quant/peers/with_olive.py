"""Olive's ``OnnxStaticQuantization`` pass, run as an Olive workflow."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from calls import each_call, run_job
from olive.data.registry import Registry
from olive.workflows import run

_DATASET = "recorded_calls"


@Registry.register_dataset(_DATASET)
def recorded_calls(path: str, **_: Any) -> Any:
    """Returns the recorded calls as a dataset of (inputs, label), the form that Olive's calibration reads."""
    return [(call, 0) for call in each_call(path)]


def quantize(job: dict[str, Any]) -> None:
    """Writes the quantized model; options: op_types, activations and weights (int8, uint8), per_channel."""
    options = job["options"]
    with tempfile.TemporaryDirectory() as folder:
        run(
            {
                "input_model": {"type": "ONNXModel", "model_path": job["model"]},
                "data_configs": [
                    {
                        "name": "calibration",
                        "type": "DataContainer",
                        "load_dataset_config": {"type": _DATASET, "params": {"path": job["calls"]}},
                        "pre_process_data_config": {"type": "skip_pre_process"},
                        "post_process_data_config": {"type": "skip_post_process"},
                        "dataloader_config": {"type": "no_auto_batch_dataloader"},
                    }
                ],
                "passes": {
                    "quantize": {
                        "type": "OnnxStaticQuantization",
                        "data_config": "calibration",
                        "op_types_to_quantize": options["op_types"],
                        "activation_type": options["activations"],
                        "precision": options["weights"],
                        "per_channel": options["per_channel"],
                    }
                },
                "cache_dir": f"{folder}/cache",
                "output_dir": f"{folder}/out",
                "log_severity_level": 1,
            }
        )
        # With operators that it cannot quantize Olive logs the failure, writes no model and returns normally.
        for model in Path(folder, "out").rglob("*.onnx"):
            shutil.copy(model, job["out"])


if __name__ == "__main__":
    run_job(quantize)

"""What is measured, each in a process of its own: compiling one component, and opening and running it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fewstep.errors import ContractError
from fewstep.run_in_subprocess import peak_bytes


def compile_component(case: str, component: str, folder: str, out: str, weights: str) -> dict[str, Any]:
    """Returns seconds of each stage, the peak of memory after it, and sizes."""
    stages = Stages()
    from benchmarks.scale.networks import CASES, tensors
    from fewstep.export.trace.fake_trace import stored_program
    from fewstep.runtimes.onnxruntime.compile import lower as ort_lower

    described = CASES[case][component]
    stages.done("import")
    program = stored_program(Path(folder), component, described.part, tensors(described.arguments))
    stages.done("trace")
    model = ort_lower.translate(program, halves=weights == "fp16").model
    stages.done("translate")
    artifact = ort_lower.save(program, model, Path(out), weights)
    stages.done("save")
    files = sorted((Path(out) / described.part.folder).glob("model.onnx*"))
    return {
        "parameters": sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value),
        "nodes": len(model.graph),
        **stages.figures(),
        "artifact_bytes": artifact.bytes,
        "files": {file.name: file.stat().st_size for file in files},
    }


def run_component(path: str, settings: dict[str, str]) -> dict[str, Any]:
    """Returns seconds and peaks of memory of opening a compiled component in ONNX Runtime and of two calls.

    Args:
        path: the ``model.onnx``.
        settings: entries of the session's configuration.

    Raises:
        ContractError: a result is not finite.
    """
    import numpy as np
    import onnxruntime

    stages = Stages()
    stages.done("import")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    stages.done("open")
    random = np.random.default_rng(0)
    feeds = {value.name: _array(value.type, value.shape, random) for value in session.get_inputs()}
    for stage in ("first call", "second call"):
        outputs = session.run(None, feeds)
        stages.done(stage)
        if not all(np.isfinite(output).all() for output in outputs):
            raise ContractError(f"{path}: the {stage} gave values that are not finite", hint="are the weights?")
    return stages.figures()


def _array(kind: str, shape: list[int], random: Any) -> Any:
    if kind == "tensor(int64)":
        return random.integers(0, 1000, shape)
    return random.standard_normal(shape).astype("float32")


class Stages:
    """Wall and CPU seconds of each stage and the peak of memory after it. On a busy machine only CPU time compares."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._cpu_seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._last = time.perf_counter(), 0.0

    def done(self, stage: str) -> None:
        """Ends a stage."""
        now = time.perf_counter(), time.process_time()
        self._seconds[stage], self._cpu_seconds[stage] = (
            round(new - old, 2) for new, old in zip(now, self._last, strict=True)
        )
        self._peaks[stage] = peak_bytes()
        self._last = now

    def figures(self) -> dict[str, Any]:
        """Returns the figures of all stages."""
        return {"seconds": self._seconds, "cpu_seconds": self._cpu_seconds, "peak_bytes": self._peaks}

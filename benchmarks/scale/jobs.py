"""What is measured, each in a process of its own: compiling one component, and opening and running it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fewstep.isolated import peak_bytes


def compile_component(case: str, component: str, folder: str, out: str, weights: str) -> dict[str, Any]:
    """Returns seconds of each stage, the peak of memory after it, and sizes."""
    stages = _Stages()
    from benchmarks.scale.networks import CASES, tensors
    from fewstep.export.fake_trace import stored_program
    from fewstep.runtimes import ort_lower

    described = CASES[case].components[component]
    stages.done("import")
    program = stored_program(Path(folder), component, described.part, tensors(described.arguments))
    stages.done("trace")
    model = ort_lower.translate(program, halves=weights == "fp16").model
    stages.done("translate")
    artifact = ort_lower.save(program, model, Path(out), weights)
    stages.done("save")
    assert program.weights is not None
    parameters = sum(parameter.numel() for _, parameter in program.exported.named_parameters())
    return {
        "parameters": parameters,
        "seconds": stages.seconds,
        "peak_bytes": stages.peak_bytes,
        "nodes": len(model.graph),
        "artifact_bytes": artifact.bytes,
    }


def run_component(path: str, settings: dict[str, str], optimize: bool, run: bool) -> dict[str, Any]:
    """Returns seconds and peaks of memory of opening a compiled component in ONNX Runtime and of one call.

    Args:
        path: the ``model.onnx``.
        settings: entries of the session's configuration.
        optimize: whether ONNX Runtime rewrites the graph.
        run: whether to call it.
    """
    import numpy as np
    import onnxruntime

    stages = _Stages()
    stages.done("import")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    stages.done("open")
    if run:
        random = np.random.default_rng(0)
        feeds = {i.name: _value(i.type, i.shape, random) for i in session.get_inputs()}
        outputs = session.run(None, feeds)
        stages.done("run")
        finite = all(bool(np.isfinite(output).all()) for output in outputs)
    return {"seconds": stages.seconds, "peak_bytes": stages.peak_bytes, "finite": finite if run else None}


def _value(kind: str, shape: list[int], random: Any) -> Any:
    if kind == "tensor(int64)":
        return random.integers(0, 1000, shape)
    return random.standard_normal(shape).astype("float32")


class _Stages:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self._last = time.perf_counter()

    def done(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 2)
        self.peak_bytes[stage] = peak_bytes()
        self._last = now

"""The pictures of a bundle in Python, for the tests of the web app."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import onnxruntime
from safetensors.numpy import save_file

from fewstep.bundle import Bundle
from fewstep.metrics import psnr_db
from fewstep.runtimes.base import Array, CheckedSession
from fewstep.runtimes.sampler import Sampler, open_sampler, open_tokenizers


class _PlainSession:
    """An ONNX model as it is written, without ONNX Runtime's graph optimizations: another correct execution."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def close(self) -> None:
        """Nothing to free before the object is."""


def write(bundle: str, out: str, *, prompts: int = 8, seeds: int = 2) -> None:
    """Writes the pictures of the bundle's prompts as safetensors, by number, with what they are of."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    schedule = manifest.schedule(manifest.default_steps)

    def open_plain(component: str) -> CheckedSession:
        path = opened.file(manifest.artifact("onnxruntime", component).path)
        return CheckedSession(component, manifest.components[component], _PlainSession(path))

    native = open_sampler(opened)
    plain = Sampler(
        manifest.contract, manifest.components, open_tokenizers(opened.path, manifest.tokenizers), open_plain
    )
    pictures, cases = {}, []
    for prompt in manifest.prompts[:prompts]:
        for seed in range(seeds):
            picture, other = (sampler(prompt, seed, schedule).output for sampler in (native, plain))
            pictures[str(len(cases))] = picture
            floor = min(psnr_db(picture, other), 1000.0)  # JSON has no infinity
            cases.append({"prompt": prompt, "seed": str(seed), "floor_db": floor})
    worst = manifest.artifact("onnxruntime", "denoiser")
    head = {"cases": cases, "precision": f"{worst.weights} weights, {worst.compute} compute"}
    save_file(pictures, out, metadata={"fewstep": json.dumps(head)})

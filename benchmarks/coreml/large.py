"""SD 1.5's UNet, converted and evaluated: what `benchmarks.coreml.memory` runs in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CASE, COMPONENT = "sd15", "denoiser"


def convert(folder: str, out: str, latent: int) -> dict[str, Any]:
    """Returns the bytes of the weights of the UNet converted to fp16, without choosing fp32 operations.

    ``latent`` is the height and width of the latent: 64 for pictures of 512.
    """
    from benchmarks.scale.networks import CASES, tensors
    from fewstep.export.trace.fake_trace import stored_program
    from fewstep.runtimes.coreml.compile import lower as coreml_lower

    described = CASES[CASE][COMPONENT]
    arguments = {**described.arguments, "sample": (described.arguments["sample"][0], (1, 4, latent, latent))}
    program = stored_program(Path(folder, described.part.folder), COMPONENT, described.part, tensors(arguments))
    path = Path(out) / "Unet.mlpackage"
    coreml_lower.save(coreml_lower.convert(program, "fp16"), path)
    return {"weight_bytes": sum(file.stat().st_size for file in path.rglob("weight.bin"))}


def evaluate(package: str) -> dict[str, Any]:
    """Returns the largest magnitude of the outputs of one call on random inputs, rounding to fp16."""
    import numpy as np

    from fewstep.runtimes.coreml.mil import Evaluator, open_package

    program = open_package(Path(package))
    rng = np.random.default_rng(0)
    feeds = {
        feature.name: rng.standard_normal(feature.shape).astype(feature.dtype.numpy)
        for feature in program.inputs[program.default]
        if feature.dtype is not None
    }
    outputs = Evaluator(program, precision="fp16").run(feeds)
    return {"largest": max(float(np.abs(value).max()) for value in outputs.values())}

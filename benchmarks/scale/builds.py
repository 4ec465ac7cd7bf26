"""What the benchmark of whole generators runs in processes of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def compile_all(source: str, out: str, steps: int) -> dict[str, Any]:
    """Returns the sizes of a generator's artifacts, compiled with fp16 weights."""
    from fewstep.pipeline import stages
    from fewstep.progress import Silent

    paths = stages.compile(
        source, Path(out), targets=["onnxruntime"], recipe="fp16", steps=[steps], guidance=None, progress=Silent()
    )
    return {p.parent.name: sum(f.stat().st_size for f in p.parent.glob("model.onnx*")) for p in paths}


def compile_timed(source: str, out: str, recipe: str, cache: str) -> dict[str, Any]:
    """Returns the sizes of a generator's artifacts and the CPU seconds of this process, with an empty stage cache."""
    os.environ["FEWSTEP_CACHE"] = cache
    from fewstep.pipeline import stages
    from fewstep.progress import Silent

    paths = stages.compile(
        source, Path(out), targets=["onnxruntime"], recipe=recipe, steps=[4], guidance=None, progress=Silent()
    )
    sizes = {p.parent.name: sum(f.stat().st_size for f in p.parent.glob("model.onnx*")) for p in paths}
    return {"files_bytes": sizes, "cpu_seconds": time.process_time()}


def build_and_verify(source: str, out: str, steps: int) -> dict[str, Any]:
    """Returns the parity of one picture of a generator's bundle."""
    import fewstep

    options = fewstep.Options(prompts=1, seeds=1, profile=False)
    bundle = fewstep.build(source, "fp16", out=out, steps=[steps], options=options)
    assert bundle.manifest.parity is not None
    return bundle.manifest.parity

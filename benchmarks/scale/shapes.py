"""Size on disk of an SD 1.5-size denoiser for one shape and for several over the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

# Heights and widths in pixels.
SHAPES = ((512, 512), (512, 768), (768, 512))
_SCALE = 8


def compile_shapes(folder: str, out: str) -> dict[str, Any]:
    """Returns the sizes of the files of the denoiser's graphs, one for each of `SHAPES`, with fp16 weights."""
    import torch

    from benchmarks.scale.networks import CASES, tensors
    from fewstep.export.trace.fake_trace import stored_program
    from fewstep.runtimes.onnxruntime.compile import lower as ort_lower

    described = CASES["sd15"]["denoiser"]

    def program(height: int, width: int) -> Any:
        latent = (torch.float32, (1, 4, height // _SCALE, width // _SCALE))
        arguments = tensors({**described.arguments, "sample": latent})
        return replace(stored_program(Path(folder), "denoiser", described.part, arguments), variant=f"{height}x{width}")

    ort_lower.lower_variants((program(*shape) for shape in SHAPES), Path(out), "fp16")
    files = sorted((Path(out) / described.part.folder).iterdir())
    return {path.name: path.stat().st_size for path in files}


def section(figures: dict[str, Any]) -> list[str]:
    """Returns the lines of the page."""
    files = figures["files"]
    one = files["model.onnx"] + files["model.onnx.data"]
    ratio = sum(files.values()) / one
    lines = ["", "## Several shapes over one file of weights", ""]
    lines += [f"The SD 1.5-size denoiser for {', '.join(f'{h}x{w}' for h, w in SHAPES)}, fp16 weights:", ""]
    lines += ["| file | MiB |", "|---|---|", *(f"| {name} | {size / 2**20:.1f} |" for name, size in files.items())]
    kept = "kept" if ratio <= 1.02 else "**exceeded**"
    lines += ["", f"- all of them: {ratio:.4f} times the files of one shape, limit 1.02: {kept}"]
    lines += [f"- compiling all: peak {figures['peak_bytes'] / 2**20:.0f} MiB"]
    return lines

"""Memory of decoding an SD 1.5-size latent whole and in tiles, each in a process of its own."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.bundle.tiles import Tiles
from fewstep.run_in_subprocess import peak_bytes

# Picture and tile in pixels; None: whole.
CASES: tuple[tuple[int, int | None], ...] = ((512, None), (512, 256), (1024, None), (1024, 512), (1024, 256))
_SCALE = 8


def name_of(pixels: int, tile: int | None) -> str:
    """Returns what a case is called."""
    return f"{pixels}x{pixels}, " + ("whole" if tile is None else f"tiles of {tile}")


def tiles_of(tile: int) -> Tiles:
    """Returns the scheme that diffusers has for tiles of so many pixels."""
    size, blend = tile // _SCALE, tile // 4
    return Tiles(size, size * 3 // 4, _SCALE, blend, tile - blend)


def compile_decoder(folder: str, out: str, pixels: int, tile: int | None) -> dict[str, Any]:
    """Returns the sizes of the files of a decoder's graphs with fp16 weights: one, or those of the tiles."""
    import torch

    from benchmarks.scale.networks import CASES as NETWORKS
    from benchmarks.scale.networks import tensors
    from fewstep.export.trace.fake_trace import stored_program
    from fewstep.runtimes.onnxruntime.compile import lower as ort_lower
    from fewstep.runtimes.sampling.tiled_decoder import tile_variant

    described = NETWORKS["sd15"]["decoder"]
    side = pixels // _SCALE
    shapes = [(side, side)] if tile is None else tiles_of(tile).shapes(side, side)
    programs = (
        replace(
            stored_program(
                Path(folder),
                "decoder",
                described.part,
                tensors({**described.arguments, "z": (torch.float32, (1, 4, *shape))}),
            ),
            variant=tile_variant(shape),
        )
        for shape in shapes
    )
    ort_lower.lower_variants(programs, Path(out), "fp16")
    files = sorted(path for path in (Path(out) / described.part.folder).iterdir())
    return {path.name: path.stat().st_size for path in files}


def decode(out: str, pixels: int, tile: int | None) -> dict[str, Any]:
    """Returns the peak of memory before and after decoding a latent once, and the seconds of it, opening included."""
    import numpy as np
    import onnxruntime  # noqa: F401  # its own memory is no part of decoding

    from fewstep.bundle.contract import ComponentSpec, TensorSpec
    from fewstep.numerics import noise
    from fewstep.runtimes.base import CheckedSession
    from fewstep.runtimes.onnxruntime import runtime as ort
    from fewstep.runtimes.sampling.tiled_decoder import TiledSession, tile_spec, tile_variant

    side = pixels // _SCALE
    folder = Path(out) / "vae_decoder"
    latent, picture = TensorSpec("latent_sample", "float32", (1, 4, side, side)), (1, 3, pixels, pixels)
    spec = ComponentSpec((latent,), (TensorSpec("sample", "float32", picture),), {})
    spec = spec if tile is None else replace(spec, tiles=tiles_of(tile))
    first = None if tile is None else tiles_of(tile).shapes(side, side)[0]

    def open_tile(shape: tuple[int, int]) -> CheckedSession:
        path = folder / ("model.onnx" if shape == first else f"model-{tile_variant(shape)}.onnx")
        return ort.open_session(path, tile_spec(spec, shape))

    before, start = peak_bytes(), time.perf_counter()
    if spec.tiles is None:
        session = ort.open_session(folder / "model.onnx", spec)
    else:
        session = CheckedSession("decoder", spec, TiledSession(spec, spec.tiles, open_tile))
    with session:
        result = session.run({"latent_sample": noise.normal(0, 0, latent.shape)})["sample"]
    assert np.isfinite(result).all()
    return {"before_bytes": before, "peak_bytes": peak_bytes(), "seconds": round(time.perf_counter() - start, 2)}


def section(figures: dict[str, Any]) -> list[str]:
    """Returns the lines of the page."""
    lines = [
        "",
        "## Decoding in tiles",
        "",
        "The SD 1.5-size decoder with fp16 weights in ONNX Runtime, one picture, opening its graphs included. *Above "
        "idle* is the peak of resident memory beyond that of the process with its imports. The machine was shared: "
        "seconds are upper bounds.",
        "",
        "| picture and tiles | above idle, MiB | of whole | s | graphs | files, MiB |",
        "|---|---|---|---|---|---|",
    ]
    growth = {name: f["decode"]["peak_bytes"] - f["decode"]["before_bytes"] for name, f in figures.items()}
    for name, figure in figures.items():
        whole = growth.get(f"{name.partition(',')[0]}, whole")
        share = "" if whole is None else f"{growth[name] / whole:.2f}"
        files = figure["files"]
        cells = [name, f"{growth[name] / 2**20:.0f}", share, f"{figure['decode']['seconds']:.1f}"]
        cells += [str(sum(f.endswith(".onnx") for f in files)), f"{sum(files.values()) / 2**20:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines

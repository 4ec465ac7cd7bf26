"""A component that runs tile by tile, as one session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from fewstep.bundle.contract import ComponentSpec
from fewstep.bundle.tiles import Tiles, decode_tiles
from fewstep.runtimes.base import Array, CheckedSession

Shape = tuple[int, int]


def tile_variant(shape: Shape) -> str:
    """Returns the name of the graph for tiles of a height and width."""
    return f"tile-{shape[0]}x{shape[1]}"


def tile_spec(spec: ComponentSpec, shape: Shape) -> ComponentSpec:
    """Returns what the graph for tiles of a height and width takes and gives, one tile at a time."""
    assert spec.tiles is not None
    (latent,), (picture,) = spec.inputs, spec.outputs
    height, width = shape
    scale = spec.tiles.scale
    return replace(
        spec,
        inputs=(replace(latent, shape=(1, latent.shape[1], height, width)),),
        outputs=(replace(picture, shape=(1, picture.shape[1], scale * height, scale * width)),),
        tiles=None,
    )


def first_tile(spec: ComponentSpec, feeds: Mapping[str, Array]) -> tuple[ComponentSpec, dict[str, Array], str]:
    """Returns what the graph for a component's first tile takes and gives, its input, and the graph's name."""
    assert spec.tiles is not None
    (latent,) = spec.inputs
    height, width = shape = spec.tiles.shapes(*latent.shape[2:])[0]
    tile = np.ascontiguousarray(feeds[latent.name][:1, :, :height, :width])
    return tile_spec(spec, shape), {latent.name: tile}, tile_variant(shape)


class TiledSession:
    """Cuts its input into tiles, runs a graph on each and blends what comes out.

    One graph is open at a time: each holds the weights. Of a batch, one picture is decoded after the other: tiles are
    there to save memory.
    """

    def __init__(self, spec: ComponentSpec, tiles: Tiles, open_tile: Callable[[Shape], CheckedSession]) -> None:
        self._input, self._output = spec.inputs[0].name, spec.outputs[0].name
        self._tiles = tiles
        self._open_tile = open_tile
        self._open: tuple[Shape, CheckedSession] | None = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the blended output by name."""
        rows = feeds[self._input]
        return {self._output: np.concatenate([decode_tiles(self._tiles, x[None], self._decode) for x in rows])}

    def _decode(self, tile_NCHW: Array) -> Array:
        height, width = tile_NCHW.shape[2:]
        if self._open is None or self._open[0] != (height, width):
            self.close()
            self._open = (height, width), self._open_tile((height, width))
        return self._open[1].run({self._input: tile_NCHW})[self._output]

    def close(self) -> None:
        """Closes the graph that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

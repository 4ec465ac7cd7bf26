"""Decoding in overlapping tiles that are blended, so that memory is that of one tile.

The scheme is that of diffusers' AutoencoderKL with tiling enabled: tiles from the top left, those at the right and the
bottom as small as what is left, each blended over the ends of its neighbours above and to the left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tiles:
    """How a latent is cut and how the pictures of its tiles are put together.

    ``size`` and ``stride`` count elements of the latent: each tile has up to ``size`` of them to a side, and the next
    one starts ``stride`` later. ``blend`` and ``keep`` count pixels: so many of a tile's first rows and columns are
    blended with its neighbours' last ones, and so many are kept. ``scale`` is pixels to an element.
    """

    size: int
    stride: int
    scale: int
    blend: int
    keep: int

    def starts(self, height: int, width: int) -> tuple[range, range]:
        """Returns where tiles begin in a latent, downwards and across; one that fits in a tile is not cut."""
        whole = max(height, width) <= self.size
        return range(0, height, height if whole else self.stride), range(0, width, width if whole else self.stride)

    def shapes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Returns the sizes of the tiles of a latent, each once, the largest first."""
        tops, lefts = self.starts(height, width)
        heights = {min(self.size, height - top) for top in tops}
        widths = {min(self.size, width - left) for left in lefts}
        return sorted(((h, w) for h in heights for w in widths), reverse=True)


def decode_tiles(tiles: Tiles, latent_NCHW: Array, decode: Callable[[Array], Array]) -> Array:
    """Returns the picture of a latent, float32 [1, C, scale * H, scale * W], decoded tile by tile.

    Args:
        tiles: the scheme.
        latent_NCHW: the latent, float32.
        decode: makes the picture of a tile; called for all tiles of one size before those of the next.
    """
    tops, lefts = tiles.starts(*latent_NCHW.shape[2:])
    if len(tops) == len(lefts) == 1:
        return decode(latent_NCHW)
    cut = {
        (top, left): latent_NCHW[:, :, top : top + tiles.size, left : left + tiles.size]
        for top in tops
        for left in lefts
    }
    by_size = sorted(cut, key=lambda place: cut[place].shape[2:], reverse=True)
    # Blended in place: its neighbours blend with what a tile became.
    pictures = {place: np.array(decode(cut[place])) for place in by_size}
    rows = []
    for top in tops:
        for left in lefts:
            if top:
                _blend(pictures[top - tiles.stride, left], pictures[top, left], tiles.blend, axis=2)
            if left:
                _blend(pictures[top, left - tiles.stride], pictures[top, left], tiles.blend, axis=3)
        rows.append(np.concatenate([pictures[top, left][:, :, : tiles.keep, : tiles.keep] for left in lefts], axis=3))
    return np.concatenate(rows, axis=2)


def _blend(before: Array, after: Array, extent: int, axis: int) -> None:
    """Blends the last rows (axis 2) or columns (axis 3) of a tile into the first ones of the next, in place."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if extent == 0:
        return
    # Shares are rounded to float32 once, as PyTorch rounds a number that it multiplies a tensor with.
    share = (np.arange(extent) / extent).reshape(-1, 1, 1, 1)
    first = np.moveaxis(after, axis, 0)[:extent]
    last = np.moveaxis(before, axis, 0)[-extent:]
    first[:] = last * (1 - share).astype(after.dtype) + first * share.astype(after.dtype)

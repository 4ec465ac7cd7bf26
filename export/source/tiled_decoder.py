"""Decoders that decode in overlapping tiles, as diffusers' AutoencoderKL does with tiling enabled."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import AutoencoderKL

from fewstep.bundle.tiles import Tiles
from fewstep.errors import SourceError

# What `enable_tiling` and its settings change.
_SETTINGS = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")


def with_tiling(decoder: torch.nn.Module, tile: int) -> torch.nn.Module:
    """Returns a decoder that shares its weights with the given one and decodes in tiles.

    Args:
        decoder: a diffusers AutoencoderKL.
        tile: pixels to a side of a tile.

    Raises:
        SourceError: the decoder tiles in another way or not at all, or tiles of this size cannot be made.
    """
    if not isinstance(decoder, AutoencoderKL):
        raise SourceError(
            f"{type(decoder).__name__} cannot be decoded in tiles, expected AutoencoderKL",
            hint="leave decoder_tile out: other decoders are small, or tile in another way",
        )
    scale = _scale(decoder)
    if tile % scale or tile // scale < 4:
        raise SourceError(
            f"decoder_tile is {tile}, expected a multiple of {scale} from {4 * scale} on: the decoder makes {scale} "
            "pixels of each element of the latent",
            hint=f"for example {max(tile // scale, 4) * scale}",
        )
    tiled: Any = copy.copy(decoder)  # diffusers' settings are no part of a Module's type
    tiled.use_tiling = True
    tiled.tile_sample_min_size, tiled.tile_latent_min_size = tile, tile // scale
    result: torch.nn.Module = tiled
    return result


def copy_tiling(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Makes a module that was loaded again tile as another one of its class does."""
    if isinstance(source, AutoencoderKL):
        for name in _SETTINGS:
            setattr(target, name, getattr(source, name))


def tiles_of(decoder: torch.nn.Module) -> Tiles | None:
    """Returns how a decoder cuts its latent, None if it takes it whole."""
    if not isinstance(decoder, AutoencoderKL) or not decoder.use_tiling:
        return None
    size, pixels, overlap = decoder.tile_latent_min_size, decoder.tile_sample_min_size, decoder.tile_overlap_factor
    blend = int(pixels * overlap)
    return Tiles(size, int(size * (1 - overlap)), _scale(decoder), blend, pixels - blend)


def _scale(decoder: AutoencoderKL) -> int:
    return int(2 ** (len(decoder.config.block_out_channels) - 1))

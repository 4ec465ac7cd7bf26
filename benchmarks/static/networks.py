"""Denoisers of full size by their public configurations, with where each of their inputs comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.scale.networks import CASES, Component
from fewstep.bundle.contract import LATENT, TIMESTEP
from fewstep.export.generator import Part

_TRANSFORMER = Part("transformer", "forward", "transformer")


@dataclass(frozen=True)
class Case:
    """A denoiser, and the origin of each input by its flat name; what is not named is fixed for a picture."""

    network: Component
    origins: Mapping[str, str]


def _transformer(cls: str, config: Mapping[str, object], arguments: Mapping[str, object]) -> Component:
    return Component("diffusers", cls, config, _TRANSFORMER, {**arguments, "return_dict": False})


_DIT = _transformer(
    "DiTTransformer2DModel",
    {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28},
    {
        "hidden_states": (torch.float32, (1, 4, 32, 32)),
        "timestep": (torch.int64, (1,)),
        "class_labels": (torch.int64, (1,)),
    },
)
_PIXART = _transformer(
    "PixArtTransformer2DModel",
    {"sample_size": 64, "caption_channels": 4096, "cross_attention_dim": 1152, "num_layers": 28},
    {
        "hidden_states": (torch.float32, (1, 4, 64, 64)),
        "encoder_hidden_states": (torch.float32, (1, 120, 4096)),
        "timestep": (torch.int64, (1,)),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
)
_SD3 = _transformer(
    "SD3Transformer2DModel",
    {
        "sample_size": 128,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    {
        "hidden_states": (torch.float32, (1, 16, 64, 64)),
        "encoder_hidden_states": (torch.float32, (1, 154, 4096)),
        "pooled_projections": (torch.float32, (1, 2048)),
        "timestep": (torch.float32, (1,)),
    },
)
_OF_UNET = {"sample": LATENT, "timestep": TIMESTEP}
_OF_TRANSFORMER = {"hidden_states": LATENT, "timestep": TIMESTEP}

STATIC: dict[str, Case] = {
    "sd15": Case(CASES["sd15"]["denoiser"], _OF_UNET),
    "sdxl": Case(CASES["sdxl"]["denoiser"], _OF_UNET),
    "dit-xl-2": Case(_DIT, _OF_TRANSFORMER),
    "pixart": Case(_PIXART, _OF_TRANSFORMER),
    "sd3-medium": Case(_SD3, _OF_TRANSFORMER),
}

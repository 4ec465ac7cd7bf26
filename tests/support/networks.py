"""Tiny networks of the families that are compiled from their folders, each with the arguments of one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from fewstep.export.generator import Part
from tests.support import tiny


@dataclass(frozen=True)
class Network:
    """A module, which of its methods is the network, and what a pipeline gives to that method."""

    module: torch.nn.Module
    part: Part
    arguments: Mapping[str, Any]


def network(name: str) -> Network:
    """Returns a network by the name of its family, always with the same values."""
    torch.manual_seed(0)
    made = _MAKERS[name]()
    made.module.eval().requires_grad_(False)
    return made


def _unet() -> Network:
    arguments = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3.0]),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "return_dict": False,
    }
    return Network(tiny.unet(), Part("unet", "forward", "unet"), arguments)


def _autoencoder() -> Network:
    module = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=16,
    )
    return Network(module, Part("vae", "decode", "vae_decoder"), {"z": torch.randn(1, 4, 8, 8), "return_dict": False})


def _clip() -> Network:
    return Network(tiny.text_encoder(), Part("text_encoder", "forward", "text_encoder"), {"input_ids": _tokens(514)})


def _clip_projection() -> Network:
    config = CLIPTextConfig(**{**tiny.text_encoder().config.to_dict(), "projection_dim": 24})
    part = Part("text_encoder_2", "forward", "text_encoder_2")
    return Network(CLIPTextModelWithProjection(config), part, {"input_ids": _tokens(514)})


def _t5() -> Network:
    config = T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    part = Part("text_encoder_3", "forward", "text_encoder_3")
    return Network(T5EncoderModel(config), part, {"input_ids": _tokens(100)})


def _sd3() -> Network:
    module = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=12,
    )
    arguments = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "pooled_projections": torch.randn(1, 24),
        "timestep": torch.tensor([3.0]),
        "return_dict": False,
    }
    return Network(module, Part("transformer", "forward", "transformer"), arguments)


def _flux() -> Network:
    module = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    arguments = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 24),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }
    return Network(module, Part("transformer", "forward", "transformer"), arguments)


def _tokens(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (1, 16))


_MAKERS = {
    "unet": _unet,
    "autoencoder": _autoencoder,
    "clip": _clip,
    "clip-projection": _clip_projection,
    "t5": _t5,
    "sd3": _sd3,
    "flux": _flux,
}
NETWORKS = tuple(_MAKERS)

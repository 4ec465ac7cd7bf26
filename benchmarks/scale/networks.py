"""The networks that are measured: real architectures at their real size, described by their public configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.export.generator import Part

_TEXT = Part("text_encoder", "forward", "text_encoder")
_TEXT_2 = Part("text_encoder_2", "forward", "text_encoder_2")
_UNET = Part("unet", "forward", "unet")
_DECODER = Part("vae", "decode", "vae_decoder")


@dataclass(frozen=True)
class Component:
    """One network: class and configuration as in its ``config.json``, and what its pipeline gives to it.

    A tensor among the arguments is ``(dtype, shape)``.
    """

    library: str
    cls: str
    config: Mapping[str, Any]
    part: Part
    arguments: Mapping[str, Any]


def tensors(arguments: Any) -> Any:
    """Returns arguments with tensors on the meta device in place of their descriptions."""
    if isinstance(arguments, tuple):
        dtype, shape = arguments
        return torch.empty(shape, dtype=dtype, device="meta")
    if isinstance(arguments, Mapping):
        return {name: tensors(value) for name, value in arguments.items()}
    return arguments


def _unet(size: int, cross: int, config: Mapping[str, Any], **more: Any) -> Component:
    arguments = {
        "sample": (torch.float32, (1, 4, size, size)),
        "timestep": (torch.float32, (1,)),
        "encoder_hidden_states": (torch.float32, (1, 77, cross)),
        **more,
        "return_dict": False,
    }
    common = {"sample_size": size, "cross_attention_dim": cross}
    return Component("diffusers", "UNet2DConditionModel", {**common, **config}, _UNET, arguments)


def _clip(cls: str, part: Part, **config: Any) -> Component:
    common = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
    arguments = {"input_ids": (torch.int64, (1, 77)), "output_hidden_states": True}
    return Component("transformers", cls, {"model_type": "clip_text_model", **common, **config}, part, arguments)


def _decoder(size: int) -> Component:
    config = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": size * 8,
    }
    arguments = {"z": (torch.float32, (1, 4, size, size)), "return_dict": False}
    return Component("diffusers", "AutoencoderKL", config, _DECODER, arguments)


_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_SMALL = {"block_out_channels": [32, 64, 128, 128], "attention_head_dim": 8}
_MIDDLE = {"block_out_channels": [120, 240, 480, 480], "attention_head_dim": 8, "norm_num_groups": 24}
_SD15 = {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8}
_SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SDXL_CONDITIONS = {
    "added_cond_kwargs": {
        "text_embeds": (torch.float32, (1, 1280)),
        "time_ids": (torch.float32, (1, 6)),
    }
}

CASES: dict[str, dict[str, Component]] = {
    "small": {"denoiser": _unet(64, 768, _SMALL)},
    "middle": {"denoiser": _unet(64, 768, _MIDDLE)},
    "sd15": {
        "text_encoder": _clip("CLIPTextModel", _TEXT, **_CLIP_L),
        "denoiser": _unet(64, 768, _SD15),
        "decoder": _decoder(64),
    },
    "sdxl": {
        "denoiser": _unet(128, 2048, _SDXL, **_SDXL_CONDITIONS),
        "text_encoder_2": _clip("CLIPTextModelWithProjection", _TEXT_2, **_CLIP_G),
        "text_encoder": _clip("CLIPTextModel", _TEXT, **_CLIP_L),
        "decoder": _decoder(128),
    },
}

# FLUX.1-schnell as its published configurations describe it; 1024x1024 pictures, prompts of 256 tokens.
_T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}
_FLUX = {
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
}
_FLUX_ARGUMENTS = {
    "hidden_states": (torch.float32, (1, 4096, 64)),
    "encoder_hidden_states": (torch.float32, (1, 256, 4096)),
    "pooled_projections": (torch.float32, (1, 768)),
    "timestep": (torch.float32, (1,)),
    "img_ids": (torch.float32, (4096, 3)),
    "txt_ids": (torch.float32, (256, 3)),
    "return_dict": False,
}
_FLUX_DECODER = {**_decoder(128).config, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
FLUX: dict[str, Component] = {
    "text_encoder": _clip("CLIPTextModel", _TEXT, **_CLIP_L),
    "text_encoder_2": Component(
        "transformers", "T5EncoderModel", _T5_XXL, _TEXT_2, {"input_ids": (torch.int64, (1, 256))}
    ),
    "denoiser": Component(
        "diffusers", "FluxTransformer2DModel", _FLUX, Part("transformer", "forward", "transformer"), _FLUX_ARGUMENTS
    ),
    "decoder": Component(
        "diffusers",
        "AutoencoderKL",
        _FLUX_DECODER,
        _DECODER,
        {"z": (torch.float32, (1, 16, 128, 128)), "return_dict": False},
    ),
}

"""Writes a tiny Stable Diffusion folder as a single file with the tensor names of the original repository (LDM)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# For networks of two levels with one layer each.
_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}
_UNET_INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_PARTS = [
    (r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"decoder\.up_blocks\.0\.resnets", "decoder.up.1.block"),
    (r"decoder\.up_blocks\.1\.resnets", "decoder.up.0.block"),
    (r"decoder\.up_blocks\.0\.upsamplers\.0", "decoder.up.1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]


def write_single_file(pipeline: Any, path: Path, *, without: str = "nothing") -> Path:
    """Writes the pipeline's weights as one file, except tensors whose new name starts with ``without``."""
    tensors = {f"model.diffusion_model.{unet_name(k)}": v for k, v in pipeline.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae_weights(pipeline.vae).items()}
    for key, value in pipeline.text_encoder.state_dict().items():
        key = key.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{key}"] = value
    save_file({k: v.contiguous() for k, v in tensors.items() if not k.startswith(without)}, path)
    return path


def unet_name(key: str) -> str:
    """Returns the original name of a UNet's tensor."""
    old = max((prefix for prefix in _UNET if key.startswith(f"{prefix}.")), key=len)
    inner = key.removeprefix(f"{old}.")
    if ".resnets." in f".{old}":
        first, _, rest = inner.partition(".")
        inner = f"{_UNET_INNER[first]}.{rest}"
    return f"{_UNET[old]}.{inner}"


def vae_weights(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns an autoencoder's tensors under their original names."""
    renamed = {}
    for key, value in vae.state_dict().items():
        name = key
        for pattern, new in _VAE_PARTS:
            name = re.sub(pattern, new, name)
        # Attention was a convolution of 1x1.
        is_matrix = "attn_1" in name and name.endswith("weight") and value.ndim == 2
        renamed[name] = value[:, :, None, None] if is_matrix else value
    return renamed

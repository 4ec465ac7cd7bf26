"""Networks and tokenizers that several families share: tiny, random, and alive in every weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.support import tiny

LENGTH = 16  # tokens of a prompt
WIDTH = 32  # of a text encoder

Net = TypeVar("Net", bound=nn.Module)


def alive(network: Net, *, seed: int = 0, gain: float = 1.0) -> Net:
    """Returns the network with every parameter drawn anew, in evaluation mode.

    Outputs that start at zero, gates of adaLN-zero, zero convolutions and layer scales would otherwise hide a part of
    the network from every test. Weights get 1 / fan-in as variance, so signals keep their size.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                value = torch.randn(parameter.shape, generator=generator)
                if isinstance(module, nn.Embedding):
                    pass
                elif parameter.ndim > 1:
                    value = value * (gain / math.sqrt(parameter[0].numel()))
                else:
                    value = 0.1 * value + (1.0 if name == "weight" else 0.0)  # scales of norms, and biases
                parameter.copy_(value)
    return network.eval().requires_grad_(False)


def vae(*, channels: int = 4, **overrides: object) -> AutoencoderKL:
    """Returns an autoencoder of pictures with half as many rows and columns in its latents."""
    settings = {
        "latent_channels": channels,
        "block_out_channels": (16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 16,
    }
    network = alive(AutoencoderKL(**(settings | overrides)), seed=1)
    network.decoder.conv_out.weight.mul_(0.5)  # few pixels outside [-1, 1]
    return network


def clip(*, projection: bool = False, seed: int = 2) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Returns a CLIP text encoder of two layers for ``clip_tokenizer``."""
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return alive((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed=seed)


def clip_tokenizer(folder: Path, *, pad: str | None = None) -> CLIPTokenizer:
    """Returns a byte-level CLIP tokenizer, padding with ``pad`` as the second one of SDXL does."""
    tokenizer = tiny.tokenizer(folder)
    if pad is not None:
        tokenizer.pad_token = pad
    return tokenizer


def t5(width: int = WIDTH) -> T5EncoderModel:
    """Returns a T5 encoder of two layers for ``t5_tokenizer``."""
    config = T5Config(
        vocab_size=128,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return alive(T5EncoderModel(config), seed=3, gain=0.7)


def t5_tokenizer() -> T5TokenizerFast:
    """Returns a T5 tokenizer whose pieces are the printable characters of ASCII."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(c), -3.0) for c in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH)

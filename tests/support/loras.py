"""Random LoRAs for the tiny checkpoints, written in every naming that is in the field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

# A linear layer and convolutions of 1x1 and 3x3, in and out of attentions, with and without an alias in old files.
UNET_MODULES = (
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.resnets.0.time_emb_proj",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.attentions.0.proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "mid_block.resnets.1.conv2",
    "up_blocks.0.resnets.1.conv_shortcut",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v",
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.1.resnets.1.conv1",
    "time_embedding.linear_1",
    "conv_out",
)
TEXT_MODULES = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.1.self_attn.out_proj",
    "encoder.layers.1.mlp.fc1",
)
# The same blocks as LDM counts them (two levels, one layer each), written by hand.
LDM = {
    "conv_in": "input_blocks_0_0",
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks_1_0_emb_layers_1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "down_blocks.1.attentions.0": "input_blocks_3_1",
    "mid_block.attentions.0": "middle_block_1",
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "up_blocks.0.resnets.1.conv_shortcut": "output_blocks_1_0_skip_connection",
    "up_blocks.0.attentions.1": "output_blocks_1_1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
    "up_blocks.1.resnets.1.conv1": "output_blocks_3_0_in_layers_2",
    "time_embedding.linear_1": "time_embed_0",
    "conv_out": "out_2",
}


@dataclass(frozen=True)
class Branch:
    """What a LoRA adds beside one module: ``alpha / rank * up(down(x))``."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]


def text_modules(text_encoder: torch.nn.Module) -> tuple[str, ...]:
    """Returns the names of `TEXT_MODULES` here: before transformers 5, a model inside the model has them."""
    prefix = "text_model." if hasattr(text_encoder, "text_model") else ""
    return tuple(f"{prefix}{name}" for name in TEXT_MODULES)


def branches(root: torch.nn.Module, names: tuple[str, ...], *, rank: int, alpha: float, seed: int) -> dict[str, Branch]:
    """Returns random branches, large enough to change what the network says."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name in names:
        shape = root.get_submodule(name).weight.shape
        down = torch.randn(rank, *shape[1:], generator=random) / shape[1:].numel() ** 0.5
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=random) / rank**0.5
        made[name] = Branch(down, up, alpha)
    return made


def write(path: Path, style: str, unet: Mapping[str, Branch], text: Mapping[str, Branch] | None = None) -> Path:
    """Writes branches in one style: peft (alpha in a file beside), header, bare, diffusers, processor, kohya, ldm."""
    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, object] = {}
    for network, found in (("unet", unet), ("text_encoder", text or {})):
        for name, branch in found.items():
            down, up, alpha = _keys(style, network, name)
            # Files of diffusers have no place for alpha, except in newer headers: it is in the weights.
            folded = branch.scale if style in ("diffusers", "processor", "bare") else 1.0
            tensors[down], tensors[up] = branch.down.contiguous(), (branch.up * folded).contiguous()
            if alpha:
                tensors[alpha] = torch.tensor(branch.alpha)
            configs[f"{network}.r"], configs[f"{network}.lora_alpha"] = branch.down.shape[0], branch.alpha
            configs[f"{network}.target_modules"] = list(found)
            configs[f"{network}.rank_pattern"] = configs[f"{network}.alpha_pattern"] = {}
    metadata = {"lora_adapter_metadata": json.dumps(configs)} if style == "header" else None
    if style == "peft":
        path.with_name("adapter_config.json").write_text(json.dumps({"lora_alpha": next(iter(unet.values())).alpha}))
    save_file(tensors, path, metadata=metadata)
    return path


def _keys(style: str, network: str, name: str) -> tuple[str, str, str]:
    text = network == "text_encoder"
    if style in ("peft", "header", "bare"):
        stem = f"base_model.model.{name}" if style == "peft" else f"{network}.{name}"
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", ""
    name = f"text_model.{name.removeprefix('text_model.')}" if text else name
    if style in ("kohya", "ldm"):
        flat = _ldm(name) if style == "ldm" and not text else name.replace(".", "_")
        stem = ("lora_te_" if text else "lora_unet_") + flat
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"
    if style == "processor":
        name = re.sub(r"(attn[12])\.(to_[qkv])$", r"\1.processor.\2_lora", name)
        name = re.sub(r"(attn[12])\.to_out\.0$", r"\1.processor.to_out_lora", name)
        name = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1_lora", name)
    stem = f"{network}.{name}"
    if not stem.endswith("_lora"):
        stem += ".lora_linear_layer" if text else ".lora"
    return f"{stem}.down.weight", f"{stem}.up.weight", ""


def _ldm(name: str) -> str:
    old = max((prefix for prefix in LDM if name == prefix or name.startswith(f"{prefix}.")), key=len)
    return LDM[old] + name.removeprefix(old).replace(".", "_")


@contextmanager
def beside(root: torch.nn.Module, found: Mapping[str, Branch], scale: float) -> Iterator[None]:
    """Runs the branches beside their modules for the length of a block, as LoRA is defined (Hu et al. 2021, eq. 3)."""
    with ExitStack() as stack:
        for name, branch in found.items():
            handle = root.get_submodule(name).register_forward_hook(_hook(branch, scale))
            stack.callback(handle.remove)
        yield


def _hook(branch: Branch, scale: float) -> Any:
    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if isinstance(module, torch.nn.Conv2d):
            low = F.conv2d(inputs[0], branch.down, stride=module.stride, padding=module.padding)
            return output + scale * branch.scale * F.conv2d(low, branch.up)
        return output + scale * branch.scale * F.linear(F.linear(inputs[0], branch.down), branch.up)

    return add

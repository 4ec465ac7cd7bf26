"""Reads LoRA files: which module of which network each tensor belongs to, and its factors with their alpha.

A LoRA file names modules in one of several ways (PEFT, old diffusers, kohya on diffusers or on LDM names). None of
them is translated here: the names of each network's own modules are written in all these ways, and a key is looked up.
So a key either means one weight or none, and underscores that stood for dots need no guessing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fewstep.errors import SourceError

_NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
}
_FACTOR = re.compile(
    r"^(?P<module>.+?)(?:"
    r"\.lora_(?P<peft>[AB])(?:\.\w+)?"  # PEFT, with or without the adapter's name
    r"|(?:[._]lora|\.lora_linear_layer)\.(?P<diffusers>down|up)"  # diffusers before PEFT
    r"|\.lora_(?P<kohya>down|up)"
    r")\.weight$"
)
_ALPHA = ".alpha"
_PEFT = "base_model.model."
# Adapters that are more or else than a product of two matrices, by what is in their keys.
_OTHERS = {
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.lora_mid\.": "LoCon with a Tucker core",
    r"\.diff(_b)?$": "a difference of whole weights",
    r"\.lora_([AB](\.\w+)?|up|down)\.bias$": "a bias beside a LoRA",
}


@dataclass(frozen=True)
class Factors:
    """What one file adds to one weight: ``scale * up @ down``, up [out, r], down [r, in, ...].

    ``scale`` is alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA.
    """

    module: str
    down: torch.Tensor
    up: torch.Tensor
    scale: float


@dataclass
class _Entry:
    key: str
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    alpha: float | None = None


def read_lora(path: Path, networks: Mapping[str, torch.nn.Module]) -> dict[str, list[Factors]]:
    """Returns the factors of a LoRA file by network, for the networks of one pipeline by attribute name.

    Raises:
        SourceError: a key that fits no weight, half a pair, or an adapter of another kind.
    """
    tables = {name: _aliases(name, module) for name, module in networks.items()}
    entries: dict[tuple[str, str], _Entry] = {}
    strangers = []
    beside = config_beside(path)
    with safe_open(path, framework="pt") as stream:
        metadata = _metadata(path, (stream.metadata() or {}).get("lora_adapter_metadata"))
        if beside is not None:
            metadata = dict.fromkeys(networks, _json(beside, beside.read_text(encoding="utf-8")))
        keys = list(stream.keys())
        for key in keys:
            named, role = _split(path, key)
            found = None if named is None else _find(named, tables)
            if found is None:
                strangers.append(key)
                continue
            entry = entries.setdefault(found, _Entry(key))
            tensor = stream.get_tensor(key)
            if role == "alpha":
                entry.alpha = float(tensor.double())
            else:
                setattr(entry, role, tensor)
    if strangers or not entries:
        raise _no_fit(path, strangers, len(keys), networks)
    found_factors: dict[str, list[Factors]] = {}
    for (network, module), entry in entries.items():
        config = metadata.get(network, {})
        found_factors.setdefault(network, []).append(_factors(path, module, entry, config))
    return found_factors


def config_beside(path: Path) -> Path | None:
    """Returns the file that holds alpha where PEFT itself wrote the LoRA, or None for every other kind of file.

    Raises:
        SourceError: it is not there.
    """
    with safe_open(path, framework="pt") as stream:
        if not any(key.startswith(_PEFT) for key in stream.keys()):
            return None
    config = path.with_name("adapter_config.json")
    if not config.is_file():
        raise SourceError(
            f"{path} was saved by PEFT, which keeps alpha in adapter_config.json; expected it in {path.parent}",
            hint="copy it there from where the LoRA came from",
        )
    return config


def _split(path: Path, key: str) -> tuple[str | None, str]:
    """Returns the module's name as the file has it, and which of ``down``, ``up`` and ``alpha`` a key is."""
    other = next((kind for pattern, kind in _OTHERS.items() if re.search(pattern, key)), None)
    if other is not None:
        raise SourceError(
            f"{path}: {key} belongs to {other}, expected LoRA matrices (down and up, or lora_A and lora_B)",
            hint="merge it with the tool that it was trained with and give the merged checkpoint",
        )
    if key.endswith(_ALPHA):
        # Old diffusers files say "to_q_lora.alpha" or "to_q.lora.alpha" where kohya says "to_q.alpha".
        return re.sub(r"[._]lora(_linear_layer)?$", "", key.removesuffix(_ALPHA)), "alpha"
    match = _FACTOR.match(key)
    if match is None:
        return None, ""
    side = match["peft"] or match["diffusers"] or match["kohya"]
    return match["module"], "down" if side in ("A", "down") else "up"


def _find(named: str, tables: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """Returns the network and the module that a file's name means."""
    named = named.removeprefix(_PEFT)
    for prefix, candidates in _KOHYA.items():
        if named.startswith(prefix):
            return _lookup(named.removeprefix(prefix), candidates, tables, flat=True)
    for network in _NETWORKS:
        if named.startswith(f"{network}."):
            return _lookup(named.removeprefix(f"{network}."), (network,), tables, flat=False)
    return _lookup(named, ("unet", "transformer"), tables, flat=False)  # files of a denoiser alone have no prefix


def _lookup(
    named: str, networks: tuple[str, ...], tables: Mapping[str, Mapping[str, str]], *, flat: bool
) -> tuple[str, str] | None:
    for network in networks:
        module = tables.get(network, {}).get(f"flat:{named}" if flat else named)
        if module is not None:
            return network, module
    return None


def _aliases(network: str, root: torch.nn.Module) -> dict[str, str]:
    """Returns the module by all that files call it; kohya's names, dots as underscores, start with ``flat:``."""
    table: dict[str, str] = {}
    ldm = _ldm_names(root) if network == "unet" else {}
    for name, module in root.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim < 2:
            continue
        names = {name, *_old_names(name)}
        if network.startswith("text_encoder"):
            # transformers 5 took away the prefix that files of its predecessors carry.
            names |= {f"text_model.{n}" for n in names} | {n.removeprefix("text_model.") for n in names}
        for alias in names:
            table.setdefault(alias, name)
        for alias in (*names, *_renamed(name, ldm)):
            table.setdefault(f"flat:{alias.replace('.', '_')}", name)
    return table


def _old_names(name: str) -> Iterator[str]:
    """What diffusers called an attention's projections when LoRA layers were attention processors."""
    parent, _, last = name.removesuffix(".0").rpartition(".")
    if parent.endswith(("attn1", "attn2", "attn")) and last in ("to_q", "to_k", "to_v", "to_out"):
        yield f"{parent}.processor.{last}"
        yield f"{parent}.{last}"
    if parent.endswith("self_attn"):
        short = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(last)
        if short is not None:
            yield f"{parent}.{short}"


def _renamed(name: str, prefixes: Mapping[str, str]) -> Iterator[str]:
    """The name with its leading modules renamed, and what is inside a residual block as well."""
    for old, new in prefixes.items():
        if name == old or name.startswith(f"{old}."):
            inner = name.removeprefix(old)
            yield new + _LDM_RESNET.get(inner, inner)


_LDM_RESNET = {
    ".conv1": ".in_layers.2",
    ".time_emb_proj": ".emb_layers.1",
    ".conv2": ".out_layers.3",
    ".conv_shortcut": ".skip_connection",
}


def _ldm_names(unet: torch.nn.Module) -> dict[str, str]:
    """Returns the LDM name of a UNet's blocks by their diffusers name: how kohya's SDXL files count them."""
    down, up = (getattr(unet, name, ()) for name in ("down_blocks", "up_blocks"))
    names = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    count = 1  # input_blocks.0 is conv_in
    for i, block in enumerate(down):
        for j in range(len(block.resnets)):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{count}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{count}.1"
            count += 1
        if getattr(block, "downsamplers", None):
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for i, block in enumerate(up):
        attentions = getattr(block, "attentions", None)
        for j in range(len(block.resnets)):
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{count}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{count}.1"
            count += 1
        if getattr(block, "upsamplers", None):  # shares the number of the block's last layer
            names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{2 if attentions else 1}.conv"
    return names


def _metadata(path: Path, text: str | None) -> dict[str, dict[str, Any]]:
    """Returns the LoRA configurations by network that diffusers keeps in a file's header, if it has any."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in _json(path, text or "{}").items():
        network, _, name = key.partition(".")
        configs.setdefault(network, {})[name] = value
    return configs


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}: the LoRA's configuration is not JSON: {error}", hint="download it again") from error
    return values


def _factors(path: Path, module: str, entry: _Entry, config: Mapping[str, Any]) -> Factors:
    if entry.down is None or entry.up is None:
        have, lacks = ("up", "down") if entry.down is None else ("down", "up")
        if entry.down is None and entry.up is None:
            have, lacks = "alpha", "down and up"
        raise SourceError(
            f"{path}: {entry.key} has {have} without {lacks}, expected both", hint="the file is damaged: get it again"
        )
    rank = entry.down.shape[0]
    # Without an alpha anywhere, files mean up @ down as it is.
    alpha = entry.alpha if entry.alpha is not None else _configured_alpha(module, config, rank)
    return Factors(module, entry.down, entry.up, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _configured_alpha(module: str, config: Mapping[str, Any], rank: int) -> float:
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT matches them
            return float(alpha)
    return float(config.get("lora_alpha", rank))


def _no_fit(path: Path, strangers: list[str], total: int, networks: Mapping[str, torch.nn.Module]) -> SourceError:
    expected = ", ".join(f"{name} ({type(module).__name__})" for name, module in networks.items())
    if not strangers:
        return SourceError(f"{path} holds no LoRA weights, expected some for {expected}", hint="is it the right file?")
    first = ", ".join(sorted(strangers)[:3])
    return SourceError(
        f"{path}: {len(strangers)} of {total} keys fit no weight of this generator, first {first}; "
        f"expected keys for {expected}",
        hint="the LoRA was made for another network: take the one for this base model",
    )

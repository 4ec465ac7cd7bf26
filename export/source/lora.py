"""Merges LoRA files into a generator's weights."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fewstep.bundle.source import Lora
from fewstep.errors import SourceError
from fewstep.export.generator import Generator
from fewstep.export.source.lora_keys import Factors, config_beside, read_lora
from fewstep.export.source.weight_checks import check_weights_file
from fewstep.hashing import file_sha256, value_sha256


def merge_loras(generator: Generator, loras: Sequence[Lora]) -> Generator:
    """Returns a generator with W + sum_i scale_i (alpha_i / rank_i) up_i down_i in place of each weight W.

    The sum is taken in float64 and rounded once to the weight's dtype, so the order of the files makes no difference
    beyond 1e-16. The given generator keeps its weights; those that no file touches are shared with the new one.

    Raises:
        SourceError: a file is missing or damaged, or a key of it fits no weight of the generator.
    """
    components = component_names(generator)
    networks = {attribute: generator.module(name) for attribute, name in components.items()}
    changes: dict[str, dict[str, list[tuple[Path, float, Factors]]]] = defaultdict(lambda: defaultdict(list))
    for lora in loras:
        path = Path(lora.path)
        check_weights_file(path, "LoRA")
        for network, factors in read_lora(path, networks).items():
            for f in factors:
                changes[network][f.module].append((path, lora.scale, f))
    merged = {components[network]: _merged(network, networks[network], of) for network, of in changes.items()}
    return generator.with_modules(merged)


def component_names(generator: Generator) -> dict[str, str]:
    """Returns the generator's component names by the pipeline's names for them, which are those of files."""
    attributes = {id(module): name for name, module in generator.pipeline.components.items()}
    modules = {name: generator.module(name) for name in generator.parts}
    return {attributes[id(module)]: name for name, module in modules.items() if id(module) in attributes}


def lora_sha256(path: Path) -> str:
    """Returns the hash of all that a LoRA's weights come from: the file, and PEFT's configuration beside it."""
    beside = config_beside(path)
    return file_sha256(path) if beside is None else value_sha256([file_sha256(path), file_sha256(beside)])


def _merged(
    network: str, root: torch.nn.Module, changes: Mapping[str, Sequence[tuple[Path, float, Factors]]]
) -> torch.nn.Module:
    """Returns a copy of a network that shares every tensor with it except the changed weights."""
    shared = {id(tensor): tensor for tensor in (*root.parameters(), *root.buffers())}
    copied = copy.deepcopy(root, shared)
    for name, updates in changes.items():
        module = copied.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        total = weight.detach().double()
        for path, scale, factors in updates:
            total += scale * factors.scale * _product(path, f"{network}.{name}", factors, tuple(weight.shape))
        module.weight = torch.nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)
    return copied


def _product(path: Path, where: str, factors: Factors, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns up @ down in float64 in the shape of a weight [out, in] or [out, in, kh, kw]."""
    down, up = factors.down, factors.up
    fits = (
        down.ndim >= 2
        and up.ndim >= 2
        and up.shape[1] == down.shape[0]
        and up.shape[0] == shape[0]
        and all(n == 1 for n in up.shape[2:])
        # A convolution of 1x1 and a linear layer are the same: files may hold either for either.
        and _without_ones(down.shape[1:]) == _without_ones(shape[1:])
    )
    if not fits:
        raise SourceError(
            f"{path}: the factors for {where} are {list(up.shape)} and {list(down.shape)}, "
            f"expected a product that fits its weight {list(shape)}",
            hint="the LoRA was made for another network: take the one for this base model",
        )
    return (up.double().flatten(1) @ down.double().flatten(1)).reshape(shape)


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1] or [1]

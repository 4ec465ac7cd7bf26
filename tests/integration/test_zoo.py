"""Every generator of the zoo runs, and depends on everything that is handed to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.zoo import FAMILIES, Family, Loop

_DETERMINISTIC = ("fixed-start", "lotus", "s3diff")  # draw no noise


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_family(family: Family, tmp_path: Path) -> None:
    loaded = family.load(tmp_path / "generator")
    with _first_call(_denoiser(loaded)) as call:
        output = family.run(loaded)
    assert output.isfinite().all()
    assert output.std() > 1e-3
    if family.name not in _DETERMINISTIC:
        assert _differs(output, family.run(loaded, seed=1)), "the same for another seed"
    for name in family.inputs:
        assert _differs(output, family.run(loaded, variants={name: 1})), f"the same for another {name}"
    _depends_on_every_input(_denoiser(loaded), *call)
    if len(family.steps) > 1:
        assert _differs(output, family.run(loaded, steps=family.steps[1])), "the same in more steps"


def _differs(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or bool((a - b).abs().mean() > 1e-3 * a.std())


def _denoiser(loaded: Any) -> nn.Module:
    if isinstance(loaded, Loop):
        return loaded.networks["denoiser"]
    return loaded.unet if hasattr(loaded, "unet") else loaded.transformer


@contextmanager
def _first_call(network: nn.Module) -> Iterator[list[Any]]:
    """Yields a list that holds the arguments and keyword arguments of the network's first call, once it was called."""
    call: list[Any] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not call:
            call.extend([args, kwargs])

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield call
    finally:
        handle.remove()


def _depends_on_every_input(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    leaves, tree = torch.utils._pytree.tree_flatten((args, kwargs))

    def call(values: list[Any]) -> Tensor:
        args, kwargs = torch.utils._pytree.tree_unflatten(values, tree)
        with torch.no_grad():
            result = network(*args, **kwargs)
        return result if isinstance(result, Tensor) else result[0]

    reference = call(leaves)
    generator = torch.Generator().manual_seed(5)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.is_floating_point():
            changed = 0.8 * leaf + 0.2 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        elif leaf.numel() == 1 or leaf.max() > 1:
            changed = (leaf - 1).clamp(min=0) + (leaf == 0)
        else:  # a mask of tokens
            changed = torch.ones_like(leaf) if (leaf == 0).any() else torch.zeros_like(leaf)
        moved = (call([*leaves[:i], changed, *leaves[i + 1 :]]) - reference).abs().mean()
        assert moved > 1e-4 * reference.std(), f"input {i} of the network, {tuple(leaf.shape)}, changes nothing"

"""Finds NaN and Inf in the weights of a generator before anything runs: a run meets them by the luck of its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from fewstep.errors import SourceError

if TYPE_CHECKING:
    from fewstep.export.generator import Generator

# Elements looked at in one go: of a mapped file no more than this is in memory.
_CHUNK = 1 << 24


def check_finite(generator: Generator) -> None:
    """Raises SourceError for a parameter with NaN or Inf, or a stored buffer with NaN; it names the tensor.

    Buffers may hold -inf on purpose, as masks of attention do. Weights that are in files are read from there.
    """
    modules = {part.attribute: generator.module(component) for component, part in generator.parts.items()}
    for attribute, module in modules.items():
        for name, where, tensor, infinite in _weights(generator, attribute, module):
            found = _wrong(tensor, infinite)
            if found is not None:
                raise SourceError(
                    f"{where}: {name} has {found[0]} among its weights, first at element {found[1]}, "
                    "expected finite numbers",
                    hint="the checkpoint is damaged, or its training diverged: download it again or take another",
                )


def _weights(
    generator: Generator, attribute: str, module: torch.nn.Module
) -> Iterator[tuple[str, str, torch.Tensor, bool]]:
    """Yields name, place and values of each weight, and whether Inf is wrong in it."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if generator.stored is not None:
        for name, stored in generator.stored.weights(attribute, module).stored.items():
            yield stored.key, str(stored.path), stored.read(), name in parameters
        return
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            yield name, attribute, tensor.detach(), name in parameters


def _wrong(tensor: torch.Tensor, infinite: bool) -> tuple[str, int] | None:
    """Returns what is wrong with a tensor and the index of the first such element, flat; None for nothing."""
    if not tensor.is_floating_point() or tensor.is_meta or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return None
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        piece = piece.float() if piece.dtype.itemsize < 2 else piece
        low, high = torch.aminmax(piece)  # both are NaN if any element is, and nothing is allocated
        if torch.isfinite(low) and torch.isfinite(high):
            continue
        wrong = ~torch.isfinite(piece) if infinite else torch.isnan(piece)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            return "NaN" if torch.isnan(piece[at]) else "Inf", start + at
    return None

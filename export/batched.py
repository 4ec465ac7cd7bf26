"""A linear layer that is one for a batch of rows too: what ``torch.vmap`` makes of it otherwise is four operations.

Whoever looks for weights in the result, to quantize them for instance, finds them.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("fewstep::linear", mutates_args=())
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns ``x weight^T + bias``."""
    return torch.nn.functional.linear(x, weight, bias)


@linear.register_fake
def _shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@linear.register_vmap
def _batched(
    info: Any, in_dims: tuple[Any, ...], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, int]:
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):  # weights that the step decides
        return torch.vmap(torch.nn.functional.linear, in_dims)(x, weight, bias), 0
    return torch.nn.functional.linear(x.movedim(in_dims[0], 0), weight, bias), 0


# What stands in for an operation while rows are batched.
STAND_INS = {torch.ops.aten.linear.default: torch.ops.fewstep.linear.default}

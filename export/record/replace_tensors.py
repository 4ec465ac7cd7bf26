"""Copies of what networks return, with other tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch


def replace_tensors(value: Any, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns a copy of a network's result with other tensors."""
    if isinstance(value, torch.Tensor):
        return make(value)
    if type(value).__name__ == "DiagonalGaussianDistribution":
        return type(value)(make(value.parameters))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: replace_tensors(getattr(value, f.name), make) for f in dataclasses.fields(value)}
        return type(value)(**changed)
    if isinstance(value, Mapping):
        return {key: replace_tensors(item, make) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replace_tensors(item, make) for item in value)
    return value

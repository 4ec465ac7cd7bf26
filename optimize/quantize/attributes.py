"""Parameters and buffers of a graph, by the names that its nodes have for them."""

from __future__ import annotations

from typing import Any

import torch


def attribute(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Returns a parameter or buffer by its dotted name."""
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    assert isinstance(found, torch.Tensor)
    return found.detach()

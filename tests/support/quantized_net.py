"""A small network with a convolution and a linear layer."""

from __future__ import annotations

import torch


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(self.conv(x)).flatten(2).transpose(1, 2)
        result: torch.Tensor = self.linear(hidden)
        return result

"""Convolutions of videos, written as ones of pictures."""

from __future__ import annotations

import pytest
import torch

from fewstep.numerics.metrics import sqnr_db
from fewstep.runtimes.passes.conv3d_as_conv2d import fold_frames
from tests.support.quantized import program_of, random


def folded(layer: torch.nn.Conv3d, x: torch.Tensor) -> torch.fx.GraphModule:
    module = program_of(layer, x).exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    fold_frames(module)
    return module


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
        ((3, 3, 3), (2, 2, 2), (0, 1, 1), (1, 1, 1)),
        ((2, 1, 3), (1, 2, 1), (1, 0, 2), (2, 1, 2)),
        ((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_values_are_the_same(
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    dilation: tuple[int, int, int],
    bias: bool,
) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(4, 6, kernel, stride, padding, dilation, bias=bias)
    x = random(2, 4, 6, 8, 10)
    module = folded(layer, x)
    (result,) = module(x)
    expected = layer(x)
    assert result.shape == expected.shape
    # Sums of up to 108 products in another order, in float32.
    assert sqnr_db(expected.detach().numpy(), result.detach().numpy()) >= 120
    targets = {node.target for node in module.graph.nodes}
    assert torch.ops.aten.conv2d.default in targets
    assert torch.ops.aten.conv3d.default not in targets


class _OneNumber(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(random(6, 4, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.conv3d.default(x, self.weight, None, [2], [1])


def test_one_number_stands_for_all_axes() -> None:
    x = random(1, 4, 6, 8, 10)
    module = program_of(_OneNumber(), x).exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    (expected,) = module(x)
    fold_frames(module)
    (result,) = module(x)
    assert sqnr_db(expected.detach().numpy(), result.detach().numpy()) >= 120


def test_groups_stay() -> None:
    module = folded(torch.nn.Conv3d(4, 4, 3, groups=2), random(1, 4, 4, 5, 5))
    assert torch.ops.aten.conv3d.default in {node.target for node in module.graph.nodes}

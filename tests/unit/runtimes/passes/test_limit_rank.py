"""Permutations of many axes, written with few."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.runtimes.passes.limit_rank import limit_axes
from tests.support.quantized import program_of, random


class _Patches(torch.nn.Module):
    def __init__(self, sizes: list[int], order: list[int], turned: bool = False) -> None:
        super().__init__()
        self.sizes, self.order, self.turned = sizes, order, turned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(self.sizes).permute(self.order)
        x = x.transpose(1, -1) if self.turned else x
        return x.flatten(3).flatten(1, 2) + 1


def axes(graph: torch.fx.Graph) -> int:
    return max(node.meta["val"].ndim for node in graph.nodes if "val" in node.meta and node.op == "call_function")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=5, max_size=8).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.permutations(range(len(sizes))))
    ),
    st.booleans(),
    st.integers(4, 6),
)
def test_values_are_the_same(case: tuple[list[int], list[int]], turned: bool, most: int) -> None:
    sizes, order = case
    x = torch.arange(math.prod(sizes), dtype=torch.float32)
    module = program_of(_Patches(sizes, order, turned), x).exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    expected = module(x)
    limit_axes(module.graph, most)
    module.recompile()
    assert axes(module.graph) <= most
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


def test_the_patches_of_a_video_take_two_permutations() -> None:
    # [1, C * pt * ph * pw, F, H, W] to [1, C, F * pt, H * ph, W * pw], as decoders of video put patches together.
    sizes = [1, 8, 2, 2, 2, 3, 4, 4]
    module = program_of(_Patches(sizes, [0, 1, 5, 2, 6, 3, 7, 4]), torch.rand(math.prod(sizes))).exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    limit_axes(module.graph, 6)
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(torch.ops.aten.permute.default) == 2


class _Interleaved(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = x.reshape(1, 2, 3, 2, 2, 4)
        return torch.stack([halves.select(1, 1), halves[:, 0] * 2], dim=3).reshape(1, 3, 4, 2, 4)


def test_halves_are_woven_into_one_another() -> None:
    x = random(1, 6, 2, 2, 4)
    module = program_of(_Interleaved(), x).exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    expected = module(x)
    limit_axes(module.graph, 5)
    module.recompile()
    assert axes(module.graph) <= 5
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


def test_few_axes_are_left_alone() -> None:
    module = program_of(_Patches([2, 3, 2, 2], [0, 2, 1, 3]), torch.rand(24)).exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    before = str(module.graph)
    limit_axes(module.graph, 5)
    assert str(module.graph) == before


def test_four_axes_are_the_least() -> None:
    with pytest.raises(AssertionError, match="four"):
        limit_axes(torch.fx.Graph(), 3)

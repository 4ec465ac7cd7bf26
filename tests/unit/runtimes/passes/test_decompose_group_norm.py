"""Group normalization written in other operations is the same function, in either layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule

from fewstep.runtimes.passes.decompose_group_norm import spread_group_norms
from tests.support.quantized import random

# Two orders of summing a few thousand float32 values.
TOLERANCE = 2e-5


class Norm(torch.nn.Module):
    def __init__(self, groups: int, channels: int, affine: bool, eps: float) -> None:
        super().__init__()
        self.norm = torch.nn.GroupNorm(groups, channels, eps=eps, affine=affine)
        if affine:
            torch.nn.init.normal_(self.norm.weight, generator=torch.Generator().manual_seed(1))
            torch.nn.init.normal_(self.norm.bias, generator=torch.Generator().manual_seed(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(x)
        return result


def traced(module: torch.nn.Module, x: torch.Tensor) -> GraphModule:
    graph = torch.export.export(module.eval(), (x,)).module()
    assert isinstance(graph, GraphModule)
    return graph


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
@settings(max_examples=6)
@given(
    groups=st.integers(1, 4),
    members=st.integers(1, 4),
    size=st.tuples(st.integers(2, 9), st.integers(1, 9)),
    batch=st.integers(1, 2),
    affine=st.booleans(),
    shift=st.sampled_from([0.0, 30.0]),
)
def test_spread_norm_is_the_norm(
    channels_last: bool, groups: int, members: int, size: tuple[int, int], batch: int, affine: bool, shift: float
) -> None:
    x = random(batch, groups * members, *size) + shift  # with a mean that mean(x^2) - mean(x)^2 would lose
    graph = traced(Norm(groups, groups * members, affine, 1e-3), x)
    assert spread_group_norms(graph, channels_last=channels_last) == 1
    left = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert torch.ops.aten.group_norm.default not in left
    with torch.no_grad():
        expected = torch.nn.functional.group_norm(x.double(), groups, *_affine(graph, affine), eps=1e-3)
        worst = (graph(x).double() - expected).abs().max()
    assert worst <= TOLERANCE * (1 + abs(shift)), f"departs by {worst:.2e}"


def _affine(graph: GraphModule, affine: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not affine:
        return None, None
    return graph.get_parameter("norm.weight").double(), graph.get_parameter("norm.bias").double()


def test_means_are_those_that_xnnpack_delegates() -> None:
    x = random(1, 8, 4, 4)
    graph = traced(Norm(2, 8, True, 1e-5), x)
    spread_group_norms(graph, channels_last=False)
    means = [node.args[1:] for node in graph.graph.nodes if node.target is torch.ops.aten.mean.dim]
    assert means == [([2, 3], True)] * 4


def test_norm_of_tokens_is_left_alone() -> None:
    graph = traced(Norm(2, 8, True, 1e-5), random(1, 8, 5))
    assert spread_group_norms(graph, channels_last=True) == 0

"""What each value of a traced network depends on."""

from __future__ import annotations

import torch

from fewstep.export.specialize.dependencies import dependence, user_inputs


class _TimeConditioned(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = torch.nn.Linear(4, 8)
        self.body = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.body(x) * torch.nn.functional.silu(self.time(t)) + 1


def test_the_time_path_is_what_depends_on_the_time_alone() -> None:
    exported = torch.export.export(_TimeConditioned(), (torch.zeros(1, 8), torch.zeros(1, 4)))
    found = dependence(exported.graph, user_inputs(exported, ("sample", "timestep")))
    by_name = {str(node.target).split(".")[1]: names for node, names in found.items() if node.op == "call_function"}
    assert by_name["silu"] == {"timestep"}
    assert by_name["mul"] == {"sample", "timestep"}
    linears = [names for node, names in found.items() if node.target is torch.ops.aten.linear.default]
    assert linears == [{"sample"}, {"timestep"}]
    assert all(not names for node, names in found.items() if node.op == "placeholder" and node.name.startswith("p_"))

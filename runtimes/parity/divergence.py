"""Where an artifact first departs from PyTorch, and the values of a traced program that tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fewstep.bundle.contract import ComponentSpec
from fewstep.runtimes.base import Array
from fewstep.runtimes.passes.module_paths import module_path


@dataclass(frozen=True)
class Departure:
    """Where an artifact first departs: the value, its module in PyTorch, and the operation that computes it."""

    tensor: str
    module_path: str
    node: str
    op_type: str
    sqnr_db: float
    compared: int


@torch.no_grad()
def traced_values(
    exported: torch.export.ExportedProgram, spec: ComponentSpec, feeds: Mapping[str, Array]
) -> dict[str, Array]:
    """Returns every tensor that a program computes for some inputs, by the name of its fx node."""
    module = exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    recorder = _Recorder(module)
    recorder.run(*(torch.from_numpy(np.ascontiguousarray(feeds[tensor.name])) for tensor in spec.inputs))
    return recorder.values


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Array] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """Runs a node and keeps its result."""
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.values[n.name] = result.detach().numpy().copy()
        elif isinstance(result, (tuple, list)):
            tensors = {f"{n.name}.{i}": r for i, r in enumerate(result) if isinstance(r, torch.Tensor)}
            self.values.update({name: t.detach().numpy().copy() for name, t in tensors.items()})
        return result


def module_paths(exported: torch.export.ExportedProgram) -> dict[str, str]:
    """Returns the path of the module that each fx node comes from, see `fewstep.runtimes.passes.module_paths`."""
    return {node.name: module_path(node) for node in exported.graph.nodes}

"""What a program holds and computes: parameters, tables of steps, multiplications."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from fewstep.bundle.program import Program
from fewstep.export.specialize.hoist import Static

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.convolution.default)
_TABLES = ("step_table", "table_", "constant_")


@dataclass(frozen=True)
class Counts:
    """Numbers of a program: of its parameters, of the tables in their place, and of multiplications in a call."""

    parameters: int
    tables: int
    macs: int


@dataclass(frozen=True)
class Removed:
    """A network of the loop before and after its steps are known: what is left in a step, and what runs once."""

    before: Counts
    step: Counts
    once: Counts

    @property
    def folded(self) -> int:
        """Parameters that tables stand for now."""
        return self.before.parameters - self.step.parameters - self.once.parameters


def removed(program: Program, static: Static) -> Removed:
    """Returns what specializing a program took out of the loop; a parameter that both parts read counts in both."""
    once = Counts(0, 0, 0) if static.conditions is None else count(static.conditions)
    return Removed(count(program), count(static.step), once)


def count(program: Program) -> Counts:
    """Returns the counts of a program."""
    exported = program.exported
    values = exported.state_dict
    shared = {
        name.partition(".")[2] if name.startswith(("fixed.", "mixed.")) else name: v for name, v in values.items()
    }
    tables = sum(v.numel() for name, v in shared.items() if name.startswith(_TABLES))
    return Counts(
        sum(v.numel() for v in shared.values()) - tables,
        tables,
        sum(_macs(node) for node in exported.graph.nodes if node.op == "call_function"),
    )


def _macs(node: Node) -> int:
    """Returns the multiplications of a linear layer, a convolution, a product or attention; 0 of anything else."""
    if node.target is _aten.linear.default:
        return int(node.meta["val"].numel() * node.args[1].meta["val"].shape[1])  # type: ignore[union-attr]
    if node.target is _aten.matmul.default:  # what is left of a linear layer whose rows are batched
        return int(node.meta["val"].numel() * node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
    if node.target in _CONVOLUTIONS:
        return int(node.meta["val"].numel() * math.prod(node.args[1].meta["val"].shape[1:]))  # type: ignore[union-attr]
    if node.target is _aten.scaled_dot_product_attention.default:
        query, key = (argument.meta["val"] for argument in node.args[:2])  # type: ignore[union-attr]
        return int(2 * query.numel() * key.shape[-2])
    return 0

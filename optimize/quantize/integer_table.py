"""What the artifacts of a quantized program must hold, integer by integer: hashes that need no torch to be compared.

Written beside the plan when a bundle is built; `fewstep.runtimes.parity.stored_integers` compares artifacts with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from fewstep.bundle.manifest import PLAN_FOLDER
from fewstep.bundle.program import Program
from fewstep.runtimes.parity.harness import LOWERING, Check
from fewstep.runtimes.parity.stored_integers import STORED, TABLE, digest
from fewstep.runtimes.passes.module_paths import module_path, path_of_parameter
from fewstep.runtimes.passes.quantized_weights import DEQUANTIZE, QUANTIZE, attribute

_aten, _ops = torch.ops.aten, torch.ops.quantized_decomposed
_CONSTANT = (DEQUANTIZE, _ops.dequantize_per_channel.default)
_SUFFIX = "_quantized"


def integer_table(program: Program) -> dict[str, Any]:
    """Returns the stored weights, biases and grids of activations of a quantized program, JSON-ready.

    Weights are hashes of int8 integers in the parameter's shape beside the hash of their float32 scales; biases hashes
    of int32 integers and of what they come to in float32; grids are scale and zero point by the name of the fx node.
    """
    module = program.exported.module()
    assert isinstance(module, GraphModule)
    weights: list[dict[str, Any]] = []
    biases: list[dict[str, Any]] = []
    grids: list[dict[str, Any]] = []
    for node in module.graph.nodes:
        if node.target in _CONSTANT and node.args[0].op == "get_attr":
            entry = _constant(module, node)
            (biases if entry["dtype"] == "int32" else weights).append(entry)
        elif node.target is QUANTIZE:
            _, scale, zero, _, _, dtype = node.args
            kind = str(dtype).removeprefix("torch.")
            path = module_path(node.all_input_nodes[0])
            grids.append({"name": node.name, "path": path, "scale": scale, "zero_point": zero, "dtype": kind})
    tables = [attribute(module, n) for n in module.graph.nodes if n.op == "get_attr" and "zero_point_table" in n.target]
    zeros = sorted({int(zero) for table in tables for zero in table} | {int(grid["zero_point"]) for grid in grids})
    return {"weights": weights, "biases": biases, "grids": grids, "zero_points": zeros}


def write_table(programs: Mapping[str, Program], folder: Path) -> None:
    """Writes the table of every component beside the plan of a bundle in ``folder``."""
    table = {name: integer_table(program) for name, program in programs.items()}
    (folder / PLAN_FOLDER / TABLE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def table_checks(kept: Mapping[str, Any], programs: Mapping[str, Program]) -> list[Check]:
    """Returns the checks that a bundle's table is the one of its quantized programs, made again from the source."""
    checks = []
    for component, program in programs.items():
        now, known = json.loads(json.dumps(integer_table(program))), kept.get(component, {})
        for kind, entries in now.items():
            pairs = zip_longest(known.get(kind, ()), entries)
            wrong = [_path_of(old if new is None else new, kind) for old, new in pairs if old != new]
            where = (LOWERING, STORED, component, None, None, ", ".join(dict.fromkeys(wrong[:3])) or None)
            checks.append(Check(*where, f"{kind} of the table", float(not wrong), 1.0))
    return checks


def _path_of(entry: Any, kind: str) -> str:
    return str(entry["path"]) if isinstance(entry, dict) and "path" in entry else kind


def _constant(module: GraphModule, node: Node) -> dict[str, Any]:
    users = list(node.users)
    last = users[0] if len(users) == 1 and users[0].target is _aten.reshape.default else node
    source = node.args[0]
    assert isinstance(source, Node)
    integers = attribute(module, source)
    scale = attribute(module, node.args[1])
    scale = scale if isinstance(scale, torch.Tensor) else torch.tensor([scale])
    shape = tuple(last.meta["val"].shape) if last is not node else tuple(integers.shape)
    q, s = integers.reshape(shape).numpy(), scale.float().numpy()
    entry = {
        "path": path_of_parameter(str(source.target).removesuffix(_SUFFIX), node),
        "dtype": str(q.dtype),
        "shape": list(shape),
        "integers": digest(q),
        "scales": digest(s),
        "count": int(s.size),
    }
    if q.dtype == np.int32:  # biases are of one axis
        entry["values"] = digest((q.astype(np.float32) * s.astype(np.float32)).astype(np.float32))
    return entry

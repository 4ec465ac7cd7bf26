"""Names the first tensor of an ONNX model that departs from PyTorch, as module path and as node.

torch.onnx names the model's values after the values of the program that it decomposed, so both sides can be compared
value by value on one feed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from fewstep.bundle.program import Program
from fewstep.disk import scratch
from fewstep.errors import ExportError
from fewstep.numerics.metrics import sqnr_db
from fewstep.runtimes.base import Array
from fewstep.runtimes.onnxruntime.compile.lower import translate
from fewstep.runtimes.onnxruntime.compile.names import restore
from fewstep.runtimes.onnxruntime.runtime import session_options
from fewstep.runtimes.parity.divergence import Departure, module_paths, traced_values

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


def bisect(program: Program, path: Path, feeds: Mapping[str, Array], *, limit_db: float) -> Departure | None:
    """Returns the first value, in the order of computation, whose SQNR is below the limit; None if all keep it.

    Raises:
        ExportError: no intermediate value could be compared, so nothing can be said.
    """
    decomposed = translate(program).exported_program
    assert decomposed is not None
    reference = traced_values(decomposed, program.spec, feeds)
    model = ir.load(path)
    restore(model)
    producers = {str(value.name): node for node in model.graph for value in node.outputs}
    shared = [name for name in producers if name in reference]
    if not shared:
        raise ExportError(f"{path}: no value of the model has the name of a traced value, nothing to bisect")
    values = _onnx_values(model, path, shared, feeds)
    compared = 0
    for name in shared:
        if name not in values:
            continue
        ours, theirs = reference[name], values[name]
        if ours.shape != theirs.shape or ours.size == 0 or ours.dtype.kind != "f" or not ours.any():
            continue
        compared += 1
        value = sqnr_db(ours, theirs)
        if not value >= limit_db:
            node = producers[name]
            module = _module_path(node) or module_paths(decomposed).get(name, "")
            return Departure(name, module, str(node.name or ""), node.op_type, value, compared)
    if compared == 0:
        raise ExportError(f"{path}: no floating-point value could be compared, nothing to bisect")
    return None


def _onnx_values(model: ir.Model, path: Path, names: list[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Runs the model once with every named value as an output, unoptimized, so that each is really computed."""
    have = {str(output.name) for output in model.graph.outputs}
    by_name = {str(value.name): value for node in model.graph for value in node.outputs}
    for name in names:
        value = by_name[name]
        if name not in have and (value.dtype is None or value.dtype in _FLOATS):
            model.graph.outputs.append(value)
    with scratch() as folder:
        target = Path(folder) / path.name
        ir.save(model, target, external_data=f"{path.name}.data")
        options = session_options(None, path=path)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, dict(feeds)), strict=True))


def _module_path(node: ir.Node) -> str:
    """Returns the dotted module path that torch.onnx wrote beside a node, '' if it wrote none."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    modules = [scope for scope in scopes[:-1] if scope]  # the last is the name of the fx node
    return modules[-1].removeprefix("module.") if modules else ""

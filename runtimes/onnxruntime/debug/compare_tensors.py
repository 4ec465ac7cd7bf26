"""Compares a quantized ONNX model with PyTorch operation by operation, in whole numbers.

End to end, roundings that fall the other way grow until two correct executions differ as much as quantization itself
does. So every quantized tensor of the model is replaced by the reference's own, and its operation's result compared: no
difference can reach the next operation, and one run of the model checks them all with the kernels that it ships with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from fewstep.bundle.program import Program
from fewstep.disk import scratch
from fewstep.errors import ExportError
from fewstep.runtimes.base import Array, PointResult, RunModel
from fewstep.runtimes.onnxruntime.compile.names import restore
from fewstep.runtimes.onnxruntime.runtime import session_options
from fewstep.runtimes.parity.quantized_reference import integer_reference, judged

_GIVEN = ".given"


def run_here(
    path: Path, feeds: Mapping[str, Array], outputs: Sequence[str], *, settings: Mapping[str, str] | None = None
) -> dict[str, Array]:
    """Returns a model's outputs by name, on this machine.

    ``settings`` as in `fewstep.runtimes.onnxruntime.runtime.open_session`.
    """
    options = session_options(None, path=path)
    for name, value in (settings or {}).items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(zip(outputs, session.run(list(outputs), dict(feeds)), strict=True))


def compare_integers(
    program: Program, path: Path, feeds: Mapping[str, Array], run: RunModel = run_here
) -> list[PointResult]:
    """Returns the comparison of every quantized tensor of a component in the order of computation, then of its outputs.

    Args:
        program: the quantized program.
        path: the model that was compiled from it.
        feeds: of one call.
        run: runs a model, here or elsewhere.

    Raises:
        ExportError: the model and the program share no quantized tensor.
    """
    expected = integer_reference(program, feeds)
    reference = expected.values
    model = ir.load(path)
    restore(model)
    points = [str(n.outputs[0].name) for n in model.graph if n.op_type == "QuantizeLinear"]
    shared = [name for name in points if name in reference]
    if len(shared) != len(points) or not shared:
        lost = sorted(set(points) - reference.keys())
        raise ExportError(
            f"{path}: {len(lost)} of its {len(points)} quantized tensors are not the program's"
            + (f", first {lost[0]}" if lost else ""),
            hint="was the model compiled from this program?",
        )
    given = _cut(model, {name: reference[name] for name in shared})
    with scratch() as folder:
        target = Path(folder) / path.name
        ir.save(model, target, external_data=f"{path.name}.data")
        inputs = {**feeds, **{name + _GIVEN: reference[name] for name in given}}
        results = run(target, inputs, [*shared, *expected.outputs])
    return judged(expected, {name: results[name] for name in shared}, results)


def _cut(model: ir.Model, reference: Mapping[str, Array]) -> list[str]:
    """Makes every value of a reference an output, and lets its readers take an input instead; returns what has any."""
    by_name = {str(value.name): value for node in model.graph for value in node.outputs}
    read = []
    for name, array in reference.items():
        value = by_name[name]
        if value.type is None:  # a graph on another's weights says no types
            value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
        if value.uses():
            given = ir.Value(name=name + _GIVEN, type=value.type, shape=value.shape)
            value.replace_all_uses_with(given)
            model.graph.inputs.append(given)
            read.append(name)
        if value not in model.graph.outputs:
            model.graph.outputs.append(value)
    return read

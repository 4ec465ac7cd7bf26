"""Lowers a traced component to an ONNX model for a strongly typed TensorRT network.

Precision is what the graph says: QuantizeLinear and DequantizeLinear around what multiplies whole numbers, Cast where
halves begin and end. TensorRT 10 and 11 have no other way to ask for it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.errors import ExportError
from fewstep.runtimes.base import Array
from fewstep.runtimes.onnxruntime.compile import lower as ort_lower
from fewstep.runtimes.onnxruntime.compile.shrink import constant, strip
from fewstep.runtimes.tensorrt import build_engine as tensorrt_builder
from fewstep.runtimes.tensorrt.compile.half_precision import to_halves
from fewstep.runtimes.tensorrt.compile.lint import lint

SCRIPT = "build_engine.py"
COMMANDS = "build_engine.sh"
# Where INT4 and blocks came to ONNX. Of what the exporter emits, opset 21 changed nothing else but added types.
_INT4_OPSET = 21
_INT4 = (-8, 7)
# Findings told in an error.
_TOLD = 3


def lower(program: Program, folder: Path, weights: str) -> Artifact:
    """Returns the artifact of a component: ``<folder>/<component folder>/model.onnx`` and scripts that build engines.

    A program with whole numbers computes the rest in single precision. One without computes in halves if ``weights``
    is fp16 or bf16; normalizations and softmax in single precision then.

    Args:
        program: the traced component.
        folder: the bundle's ``tensorrt`` folder.
        weights: ``fp32``, ``fp16`` or ``bf16``.

    Raises:
        ExportError: an op cannot be lowered, or the model breaks a rule of TensorRT's.
    """
    model = ort_lower.translate(program, halves=weights == "fp16").model
    settle(model)
    compute = "fp32"
    if weights != "fp32" and not _on_grids(model):
        to_halves(model, ir.DataType.FLOAT16 if weights == "fp16" else ir.DataType.BFLOAT16)
        compute = weights
    elif weights == "fp16":
        ort_lower.store_halves(model)
    strip(model)
    findings = lint(model)
    if findings:
        more = f" and {len(findings) - _TOLD} more" if len(findings) > _TOLD else ""
        raise ExportError(
            f"{program.component} breaks rules of TensorRT: {'; '.join(map(str, findings[:_TOLD]))}{more}",
            hint="quantize with the profile tensorrt; keep what it names out of the network, or in float",
        )
    artifact = ort_lower.write(program, model, folder, weights, runtime="tensorrt", compute=compute)
    write_scripts((folder / artifact.path).parent)
    return artifact


def write_scripts(folder: Path) -> None:
    """Writes what builds an engine from ``model.onnx`` in a folder: a Python file and a ``trtexec`` line."""
    shutil.copyfile(tensorrt_builder.__file__, folder / SCRIPT)
    (folder / COMMANDS).write_text(
        "#!/bin/sh\n"
        "# Builds model.engine for this machine's GPU. Precision is what the network says: no flags for it.\n"
        'cd "$(dirname "$0")" || exit 1\n'
        "exec trtexec --onnx=model.onnx --stronglyTyped --saveEngine=model.engine --timingCacheFile=timing.cache "
        "--profilingVerbosity=detailed --skipInference\n"
    )


def settle(model: ir.Model) -> None:
    """Rewrites an exported model so that its grids stand as TensorRT wants them, in place.

    1. A bias is a float: TensorRT dequantizes 8 bits and fewer, and adds in 32 bits by itself.
    2. A quantized weight is one constant and one DequantizeLinear, right before what multiplies it.
    3. Four bits are stored in four, groups as blocks, where a product of matrices reads them.
    4. Scales and zero points are constants themselves.
    """
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            if (node.inputs[0].const_value is None) or not _settle_constant(model, node):
                _settle_grid(model, node)
        elif node.op_type == "QuantizeLinear":
            _settle_grid(model, node)
    RemoveUnusedNodesPass()(model)
    _infer(model)


def _on_grids(model: ir.Model) -> bool:
    return any(node.op_type == "DequantizeLinear" for node in model.graph)


def _settle_grid(model: ir.Model, node: ir.Node) -> None:
    """Makes scale and zero point of an activation's grid constants."""
    for i, name in ((1, "scale"), (2, "zero_point")):
        value = node.inputs[i] if i < len(node.inputs) else None
        if value is not None and value.const_value is None:
            array = constant(value)
            if name == "zero_point":
                array = array.astype(np.int8)
            node.replace_input_with(i, _initializer(model, f"{node.outputs[0].name}.{name}", array))


def _settle_constant(model: ir.Model, node: ir.Node) -> bool:
    """Rewrites the DequantizeLinear of a constant; returns whether it is gone."""
    q, scale = constant(node.inputs[0]), constant(node.inputs[1]).astype(np.float32)
    axis = node.attributes.get_int("axis", 1)
    if q.dtype == np.int32:
        value = _initializer(model, f"{node.outputs[0].name}.float", q.astype(np.float32) * scale)
        node.outputs[0].replace_all_uses_with(value)
        return True
    if len(node.inputs) > 2 and constant(node.inputs[2]).any():
        raise ExportError(f"{node.outputs[0].name} has a zero point, expected a symmetric grid for weights")
    _place(model, node, node.outputs[0], _Weight(q, scale, axis))
    return True


@dataclass(frozen=True)
class _Weight:
    """Whole numbers and their scales: one, one for each index along ``axis``, or one for each ``block`` along it."""

    q: Array
    scale: Array
    axis: int
    block: int = 0

    def behind(self, node: ir.Node) -> _Weight | Array | None:
        """Returns the weight behind a Transpose or the Reshape of its groups, None behind anything else.

        It is in float where TensorRT has no such grid.
        """
        if node.op_type == "Transpose":
            order = node.attributes.get_ints("perm", tuple(reversed(range(self.q.ndim))))
            scale = self.scale.transpose(order) if self.block else self.scale
            return _Weight(self.q.transpose(order), scale, list(order).index(self.axis), self.block)
        shape = node.outputs[0].shape.numpy() if node.outputs[0].shape is not None else ()
        grouped = node.op_type == "Reshape" and self.scale.ndim == 1 and self.axis == 0 and len(shape) > 0
        if not grouped or self.scale.size <= shape[0] or self.scale.size % shape[0]:
            return None
        if len(shape) != 2:
            # TensorRT has blocks in matrices alone: a convolution's groups are dequantized here.
            dequantized: Array = (self.q.astype(np.float32) * self.scale[:, None]).reshape(shape)
            return dequantized
        return _Weight(self.q.reshape(shape), self.scale.reshape(shape[0], -1), 1, self.q.shape[1])

    def floats(self) -> Array:
        """Returns the blocks' values."""
        values: Array = self.q.astype(np.float32) * np.repeat(self.scale, self.block, axis=self.axis)
        return values


def _place(model: ir.Model, node: ir.Node, value: ir.Value, weight: _Weight) -> None:
    """Puts a weight right before everything that multiplies it."""
    direct = value.is_graph_output()
    for user, _ in list(value.uses()):
        behind = weight.behind(user)
        if isinstance(behind, _Weight):
            _place(model, node, user.outputs[0], behind)
        elif behind is not None:
            name = f"{user.outputs[0].name}.float"
            user.outputs[0].replace_all_uses_with(_initializer(model, name, behind))
        else:
            direct = True
    if direct:
        _dequantize(model, node, value, weight)


def _dequantize(model: ir.Model, node: ir.Node, value: ir.Value, weight: _Weight) -> None:
    """Puts one DequantizeLinear of a constant in the place of a value."""
    q, scale, axis, block = weight.q, weight.scale, weight.axis, weight.block
    readers = {user.op_type for user, _ in value.uses() if weight.behind(user) is None}
    four = q.ndim == 2 and readers <= {"MatMul", "Gemm"} and q.min() >= _INT4[0] and q.max() <= _INT4[1]
    if block and not four:
        # Blocks are of four bits: what has more is dequantized here.
        value.replace_all_uses_with(_initializer(model, f"{value.name}.float", weight.floats()))
        return
    stored = np.ascontiguousarray(q).astype(ml_dtypes.int4) if four else np.ascontiguousarray(q)
    inputs = [
        _initializer(model, f"{value.name}.quantized", stored),
        _initializer(model, f"{value.name}.scale", np.ascontiguousarray(scale).reshape(scale.shape)),
        _initializer(model, f"{value.name}.zero_point", np.zeros(scale.shape, stored.dtype)),
    ]
    attributes = {"axis": axis, "block_size": block} if block else {"axis": axis} if scale.ndim else {}
    made = ir.node("DequantizeLinear", inputs, attributes=attributes, name=f"{value.name}.dequantize")
    made.outputs[0].name = f"{value.name}.weight"
    made.outputs[0].type, made.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(q.shape)
    model.graph.insert_before(node, made)
    value.replace_all_uses_with(made.outputs[0])
    if four:
        model.opset_imports[""] = max(_INT4_OPSET, model.opset_imports[""])


def _initializer(model: ir.Model, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _infer(model: ir.Model) -> None:
    """Gives every value its type and shape, as far as they follow from operators and inputs."""
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass(data_prop=True)(model)

"""Lowers a traced component to an ONNX file for ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import DeduplicateInitializersPass
from onnxscript import rewriter
from onnxscript.rewriter.rules.common import _no_op

from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.errors import ExportError, FewstepError
from fewstep.runtimes.onnxruntime.compile.conv_integer import unfold_convolutions
from fewstep.runtimes.onnxruntime.compile.lazy_initializers import StoredInitializer, attach
from fewstep.runtimes.onnxruntime.compile.matmul_integer import fuse_linear_layers
from fewstep.runtimes.onnxruntime.compile.matmul_nbits import multiply_packed
from fewstep.runtimes.onnxruntime.compile.names import shorten
from fewstep.runtimes.onnxruntime.compile.per_step_qdq import TRANSLATIONS
from fewstep.runtimes.onnxruntime.compile.shared_weights import SharedWeights
from fewstep.runtimes.onnxruntime.compile.shrink import drop_defaults, own_zero_points, pack_int4, strip, widen_weights
from fewstep.runtimes.onnxruntime.compile.writer import save_model

MODEL = "model.onnx"
# Weights in the model's own file are in memory twice once it is open, as parsed and as packed; those beside it are
# mapped. Below this, one file is easier to handle than two.
_ONE_FILE_BYTES = 1 << 20
# A tensor this small does not pay for the Cast that widens it again.
_SMALLEST_HALF_TENSOR = 256


def lower(program: Program, folder: Path, weights: str) -> Artifact:
    """Returns the artifact of a component, written as ``<folder>/<component folder>/model.onnx``.

    Weights of more than 1 MiB are in ``model.onnx.data`` beside it.

    Args:
        program: the traced component.
        folder: the bundle's ``onnxruntime`` folder.
        weights: ``fp32``, or ``fp16`` to store as halves every weight whose values are halves already (a lossless
            step: rounding them is an optimization's decision, taken in the torch graph). Arithmetic stays in fp32:
            ONNX Runtime's CPU provider has no fp16 kernels. Weights that are read from ``program.weights`` are rounded
            here, each as it is written.

    Raises:
        ExportError: the component has an op that cannot be lowered, or a weight does not fit in fp16.
    """
    return save(program, translate(program, halves=weights == "fp16").model, folder, weights)


def lower_variants(programs: Iterable[Program], folder: Path, weights: str) -> list[Artifact]:
    """Returns the artifacts of several graphs of one component, all of them on the weights of the first.

    The first is ``model.onnx`` with its weights in ``model.onnx.data``; the others are ``model-<variant>.onnx``, which
    hold what the first has not, and none of what only helps to read a graph.

    Args:
        programs: looked at one after the other.
        folder: see `lower`.
        weights: see `lower`.
    """
    artifacts: list[Artifact] = []
    shared: SharedWeights | None = None
    for program in programs:
        result = translate(program, halves=weights == "fp16")
        model = result.model
        if shared is None:
            artifacts.append(save(program, model, folder, weights, external=True))
            shared = SharedWeights(folder / program.folder / MODEL)
            continue
        _shrink(model, weights)
        strip(model, notes=True)
        drop_defaults(model)
        shared.attach(model)
        assert result.exported_program is not None
        shorten(model, {node.name for node in result.exported_program.graph.nodes})
        name = f"{program.folder}/{MODEL.replace('.', f'-{program.variant}.')}"
        save_model(model, folder / name, external=False)
        size = (folder / name).stat().st_size
        artifacts.append(
            Artifact("onnxruntime", program.component, name, weights, "fp32", size, variant=program.variant)
        )
    return artifacts


def save(program: Program, model: ir.Model, folder: Path, weights: str, *, external: bool = False) -> Artifact:
    """Returns the artifact of a translated component: see `lower`, whose second half it is.

    ``external`` puts the weights in a file of their own, whatever their size.
    """
    _shrink(model, weights)
    return write(program, model, folder, weights, external=external)


def write(
    program: Program,
    model: ir.Model,
    folder: Path,
    weights: str,
    *,
    external: bool = False,
    runtime: str = "onnxruntime",
    compute: str = "fp32",
) -> Artifact:
    """Returns the artifact of a model, written as it is below a runtime's folder."""
    path = folder / program.folder / MODEL
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    save_model(model, path, external=external or size > _ONE_FILE_BYTES)
    total = sum(p.stat().st_size for p in path.parent.glob(f"{MODEL}*"))
    relative = f"{program.folder}/{MODEL}"
    return Artifact(runtime, program.component, relative, weights, compute, total, variant=program.variant)


def _shrink(model: ir.Model, weights: str) -> None:
    """Stores what is exact in fewer bits in those, and drops the exporter's notes, in place."""
    if weights == "fp16":
        store_halves(model)
    unfold_convolutions(model)
    fuse_linear_layers(model)
    multiply_packed(model)
    widen_weights(model)
    pack_int4(model)
    strip(model)
    DeduplicateInitializersPass(size_limit=_SMALLEST_HALF_TENSOR)(model)
    own_zero_points(model)


def translate(program: Program, *, halves: bool = False) -> torch.onnx.ONNXProgram:
    """Returns the ONNX model beside the decomposed program whose values it is named after.

    Args:
        program: the traced component.
        halves: rounds the values of ``program.weights`` to fp16.
    """
    names_in = [spec.name for spec in program.spec.inputs]
    names_out = [spec.name for spec in program.spec.outputs]
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # the exporter warns about its own internals
            stack.enter_context(redirect_stdout(StringIO()))  # and prints; stdout is for results
            stack.enter_context(_exact_rewrites())
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            result = torch.onnx.export(
                program.exported,
                dynamo=True,
                input_names=names_in,
                output_names=names_out,
                verbose=False,
                optimize=program.weights is None,
                custom_translation_table=dict(TRANSLATIONS),
            )
            assert result is not None
            if program.weights is not None:
                attach(result.model, program.weights, halves=halves)
                _optimize(result)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"{program.component} cannot be lowered to ONNX: {_first_line(error)}",
            hint="the op that stops it is named above; rewrite it in the module, or report it",
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return result


def _first_line(error: BaseException) -> str:
    """Returns what the innermost cause says; the outer ones say which step of the exporter failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n", 1)[0]


@contextmanager
def _exact_rewrites() -> Iterator[None]:
    """Keeps the exporter from removing arithmetic that is nearly nothing, for the length of a block.

    Its rules take a constant within 1e-8 of 0 for 0: the epsilon of 1e-15 that keeps linear attention from dividing by
    zero is gone, and the result is NaN. ONNX Runtime removes what really is nothing.
    """
    inexact = {id(rule) for rule in _no_op.rules}
    kept = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if id(rule) not in inexact)
    with mock.patch.object(rewriter, "_DEFAULT_REWRITE_RULES", kept):
        yield


def _optimize(result: torch.onnx.ONNXProgram) -> None:
    """Runs the exporter's optimizer, whose passes wrap the errors of reading weights in their own."""
    try:
        result.optimize()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, FewstepError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def store_halves(model: ir.Model) -> None:
    """Replaces fp32 initializers whose values are exact in fp16 by halves and a Cast back, in place."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        name = f"{value.name}.fp16"
        halves = _halves(value.const_value, name)
        if halves is None:
            continue
        stored = ir.Value(name=name, type=ir.TensorType(halves.dtype), shape=value.shape, const_value=halves)
        widen = ir.node("Cast", [stored], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{value.name}.widen")
        graph.initializers.pop(str(value.name))
        widen.outputs[0].name = value.name
        widen.outputs[0].type, widen.outputs[0].shape = value.type, value.shape
        value.replace_all_uses_with(widen.outputs[0])
        graph.initializers[name] = stored
        graph.insert_before(graph[0], widen)


def _halves(tensor: ir.TensorProtocol | None, name: str) -> ir.TensorProtocol | None:
    """Returns a tensor in fp16, or None where that is not exact or does not pay."""
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < _SMALLEST_HALF_TENSOR:
        return None
    if isinstance(tensor, StoredInitializer):
        return tensor.in_halves(name)
    array = tensor.numpy()
    with np.errstate(over="ignore"):
        halves = array.astype(np.float16)
    return ir.tensor(halves, name=name) if np.array_equal(halves.astype(np.float32), array) else None

"""Lowers a traced component to a ``.pte`` program for ExecuTorch, delegated to XNNPACK."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.fx import GraphModule

from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.errors import ExportError
from fewstep.runtimes.executorch.runtime import NAME
from fewstep.runtimes.passes.constants import own_constants, zero_unset
from fewstep.runtimes.passes.conv3d_as_conv2d import fold_frames
from fewstep.runtimes.passes.decompose_group_norm import spread_group_norms
from fewstep.runtimes.passes.limit_rank import limit_axes
from fewstep.runtimes.passes.materialize import materialized
from fewstep.runtimes.passes.quantized_weights import DEQUANTIZE, dequantized_weights, sign_grids, unfold_weights

MODEL = "model.pte"
_aten = torch.ops.aten
# XNNPACK's tensors have so many axes at most: a program with more is lowered and cannot be loaded.
_AXES = 6
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.flatten.using_ints, _aten.unflatten.int)
_COPIES = (_aten.clone.default, _aten.dropout.default, _aten.contiguous.default)


def lower(program: Program, folder: Path, weights: str) -> Artifact:
    """Returns the artifact of a component, written as ``<folder>/<component folder>/model.pte``.

    Args:
        program: the traced component, float or quantized (PT2E).
        folder: the bundle's ``executorch`` folder.
        weights: ``fp32`` or ``fp16``; a program stores what is not quantized in fp32 either way: XNNPACK's delegate
            takes no halves for products in fp32.

    Raises:
        ExportError: the component has an op that cannot be lowered, or stored integers that XNNPACK does not multiply.
    """
    with materialized(program):
        content = convert(program.component, prepared(program), _zeros(program))[0]
    path = folder / program.folder / MODEL
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    relative = f"{program.folder}/{MODEL}"
    return Artifact(NAME, program.component, relative, "fp32", "fp32", len(content), variant=program.variant)


def prepared(program: Program) -> GraphModule:
    """Returns the program's graph as XNNPACK's partitioner takes it whole.

    Biases are in float, which it puts on the grid of the products itself, by the same rule as the plan.

    Raises:
        ExportError: a weight is stored as integers and multiplied in float.
    """
    module = program.exported.module()
    assert isinstance(module, GraphModule)
    sign_grids(module)
    unfold_weights(module, biases_only=True)
    for name, computes in dequantized_weights(module):
        if not computes:
            raise ExportError(
                f"{program.component}: {name} is stored as integers and multiplied in float, which XNNPACK does not",
                hint="make the plan with the profile 'executorch'",
            )
    spread_group_norms(module, channels_last=False)
    _write_out_gelus(module)
    fold_frames(module)
    _name_core_operations(module)
    _write_out_pixel_shuffles(module)
    own_constants(module)
    zero_unset(module)
    _leave_out_copies(module)
    limit_axes(module.graph, _AXES)
    _separate_readers(module)
    return module


def convert(component: str, module: GraphModule, inputs: tuple[torch.Tensor, ...]) -> tuple[bytes, Counter[str]]:
    """Returns the program of a graph, and the operations that are not delegated with how often each is there.

    Raises:
        ExportError: the component has an op that cannot be lowered.
    """
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            exported = torch.export.export(module, inputs)
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            nodes = [n for n in edge.exported_program().graph.nodes if n.op == "call_function"]
            left = Counter(str(getattr(n.target, "_op", n.target)) for n in nodes)
            content: bytes = edge.to_executorch().buffer
        except Exception as error:  # the compiler raises whatever its translation of an op happens to raise
            raise ExportError(
                f"{component} cannot be lowered to ExecuTorch: {type(error).__name__}: {_innermost(error)}",
                hint="rewrite what stops it in the module, or report it",
            ) from error
    return content, Counter({name: count for name, count in left.items() if name.startswith("aten.")})


def _write_out_gelus(module: GraphModule) -> None:
    """Puts the approximation of GELU by tanh in elementary operations, in place.

    XNNPACK's partitioner does not see which GELU is asked for, and computes the one by erf.
    """
    graph = module.graph
    for node in [n for n in graph.nodes if n.target is _aten.gelu.default and n.kwargs.get("approximate") == "tanh"]:
        x = node.args[0]
        with graph.inserting_before(node):
            cube = graph.call_function(_aten.mul.Tensor, (graph.call_function(_aten.mul.Tensor, (x, x)), x))
            inner = graph.call_function(_aten.add.Tensor, (x, graph.call_function(_aten.mul.Tensor, (cube, 0.044715))))
            scaled = graph.call_function(_aten.mul.Tensor, (inner, math.sqrt(2 / math.pi)))
            weight = graph.call_function(_aten.add.Tensor, (graph.call_function(_aten.tanh.default, (scaled,)), 1.0))
            half = graph.call_function(_aten.mul.Tensor, (x, 0.5))
            result = graph.call_function(_aten.mul.Tensor, (half, weight))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    module.recompile()


def _name_core_operations(module: GraphModule) -> None:
    """Calls operations by names that ExecuTorch has kernels for, or that take tensors of any strides, in place."""
    for node in module.graph.nodes:
        if node.target in _VIEWS:
            node.target, node.args = _aten.reshape.default, (node.args[0], list(node.meta["val"].shape))
        if node.target is _aten.upsample_nearest2d.default:
            x, size, *factors = node.args
            given = [factor for factor in factors if factor is not None]
            node.target, node.args = _aten.upsample_nearest2d.vec, (x, None, given) if given else (x, size, None)
    module.recompile()


def _write_out_pixel_shuffles(module: GraphModule) -> None:
    """Puts pixel shuffles [N, C * r * r, H, W] in reshapes and a permutation, in place.

    PyTorch's decomposition copies the result to channels last where there is one channel, and ExecuTorch's copy fails.
    """
    graph = module.graph
    for node in [n for n in graph.nodes if n.target is _aten.pixel_shuffle.default]:
        x, factor = node.args
        batch, channels, height, width = x.meta["val"].shape
        apart = [batch, channels // factor**2, factor, factor, height, width]
        with graph.inserting_before(node):
            parts = graph.call_function(_aten.reshape.default, (x, apart))
            turned = graph.call_function(_aten.permute.default, (parts, [0, 1, 4, 2, 5, 3]))
            result = graph.call_function(_aten.reshape.default, (turned, list(node.meta["val"].shape)))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    module.recompile()


def _leave_out_copies(module: GraphModule) -> None:
    """Takes copies out, in place: the delegate refuses a tensor that comes out of it as it goes in.

    Dropout of a traced network is one, and keeps an order of axes in memory that ExecuTorch's copy has none for.
    """
    for node in [n for n in module.graph.nodes if n.target in _COPIES]:
        drops = node.target is _aten.dropout.default and node.args[2]
        if node.args[0].op != "placeholder" and not drops:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()


def _separate_readers(module: GraphModule) -> None:
    """Gives every reader of a quantized tensor a dequantize operation of its own, in place.

    XNNPACK's `ChannelsLastTaggedReshapePass` changes the layout of a dequantized tensor for all of its readers when one
    of them, such as a mean, needs channels last: an output of the delegate then has its channels last too, and the
    program ends with error 0x10 when it runs.
    """
    for node in [n for n in module.graph.nodes if n.target is DEQUANTIZE]:
        for reader in list(node.users)[1:]:
            with module.graph.inserting_before(reader):
                reader.replace_input_with(node, module.graph.node_copy(node))
    module.recompile()


def _zeros(program: Program) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in program.spec.inputs)


def _innermost(error: BaseException) -> str:
    """Returns what the first cause says; the outer ones say which pass failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the compiler from warning of its own internals, for the length of a block."""
    root = logging.getLogger()
    level = root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root.setLevel(logging.CRITICAL)
            yield
    finally:
        root.setLevel(level)

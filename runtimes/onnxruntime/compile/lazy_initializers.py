"""Initializers of an ONNX model that are read from a program's weights while it is written, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype, to_torch_dtype

from fewstep.errors import ExportError


class StoredInitializer(ir.LazyTensor):
    """An initializer whose values are read when they are wanted, and not kept.

    Args:
        name: its name in the model.
        read: returns the values in any precision from which ``dtype`` follows without a further decision.
        dtype: the precision that the model gives to it.
        shape: its shape.
    """

    def __init__(self, name: str, read: Callable[[], torch.Tensor], dtype: torch.dtype, shape: Sequence[int]) -> None:
        super().__init__(
            lambda: TorchTensor(read().to(dtype).contiguous(), name),
            dtype=from_torch_dtype(dtype),
            shape=ir.Shape(shape),
            name=name,
        )
        self.read = read
        self._sizes = tuple(shape)

    def transposed(self, name: str, axes: Sequence[int]) -> StoredInitializer:
        """Returns the initializer with its axes in another order."""
        shape = [self._sizes[axis] for axis in axes]
        return StoredInitializer(name, lambda: self.read().permute(*axes), to_torch_dtype(self.dtype), shape)

    def in_halves(self, name: str) -> StoredInitializer:
        """Returns the initializer in fp16."""
        return StoredInitializer(name, self.read, torch.float16, self._sizes)


def attach(model: ir.Model, weights: Mapping[str, torch.Tensor], *, halves: bool) -> None:
    """Gives the initializers of a model their values, in place.

    Args:
        model: as the exporter leaves it without its optimizer, which looks at small values and turns large ones.
        weights: values by the names of parameters and buffers, in the precision of their files.
        halves: rounds floating-point values to the nearest fp16 value.
    """
    names = set(weights)  # a mapping may read a value to say whether it has it
    for name, value in model.graph.initializers.items():
        fake = value.const_value
        if name in names and fake is not None:
            read = _rounded(weights, name) if halves and fake.dtype.is_floating_point() else _as_stored(weights, name)
            dtype = to_torch_dtype(fake.dtype)
            value.const_value = StoredInitializer(name, read, dtype, fake.shape.numpy())
    _fold_transposes(model.graph)


def _as_stored(weights: Mapping[str, torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    return lambda: weights[name]


def _rounded(weights: Mapping[str, torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        values = weights[name]
        rounded = values.to(torch.float16)
        if values.dtype != torch.float16 and not rounded.isfinite().all() and values.isfinite().all():
            raise ExportError(
                f"{name} has values up to {values.abs().max():.4g}, beyond fp16's 65504",
                hint="use weights = 'fp32' for this generator",
            )
        return rounded

    return read


def _fold_transposes(graph: ir.Graph) -> None:
    """Replaces the transpose of an initializer that nothing else uses by an initializer that is read transposed.

    The optimizer would do the same with the values in memory, all of them until the model is written.
    """
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not isinstance(source.const_value, StoredInitializer) or len(source.uses()) != 1:
            continue
        result = node.outputs[0]
        axes = node.attributes["perm"].as_ints()
        stored = source.const_value.transposed(str(result.name), axes)
        folded = ir.Value(name=result.name, type=source.type, shape=stored.shape, const_value=stored)
        graph.initializers.pop(str(source.name))
        ir.convenience.replace_nodes_and_values(graph, node, [node], [], [result], [folded])
        graph.initializers[str(folded.name)] = folded

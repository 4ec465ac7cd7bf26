"""Lets the graphs of a component that differ in shape alone use one file of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

# A reference to a place in a file is about as large as this.
_SMALLEST_BYTES = 256


class SharedWeights:
    """The external data of a saved model, found by content.

    Args:
        path: a model with its weights in external data beside it.
    """

    def __init__(self, path: Path) -> None:
        self._folder = path.parent
        self._places: dict[str, ir.ExternalTensor] = {}
        for value in ir.load(path).graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                self._places.setdefault(_digest(tensor), tensor)
                tensor.release()

    def attach(self, model: ir.Model) -> None:
        """Makes every initializer of a model whose bytes are in the file a reference to them, in place."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _SMALLEST_BYTES:
                continue
            place = self._places.get(_digest(tensor))
            if place is not None:
                value.const_value = ir.ExternalTensor(
                    place.location,
                    place.offset,
                    place.length,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=str(value.name),
                    base_dir=self._folder,
                )


def _digest(tensor: ir.TensorProtocol) -> str:
    """Returns a hash of the bytes that a file holds; type and shape are the graph's business."""
    return hashlib.sha256(tensor.tobytes()).hexdigest()

"""Compares a quantized ``.tflite`` file with PyTorch operation by operation, in whole numbers.

Every quantized tensor of the file is replaced by the reference's own where it is read, and put out where it is
computed: no difference reaches the next operation, and one run checks them all with the kernels that it ships with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from fewstep.errors import ExportError
from fewstep.program import Program
from fewstep.runtimes.base import Array, PointResult
from fewstep.runtimes.integer_reference import judged, signed_reference
from fewstep.runtimes.litert_model import LiteRTModel
from fewstep.runtimes.narrow import narrow

# Images are stored with their channels last.
_LAST = (0, 2, 3, 1)


def compare_integers(program: Program, path: Path, feeds: Mapping[str, Array]) -> list[PointResult]:
    """Returns the comparison of every quantized tensor of a component in the order of computation, then of its outputs.

    Raises:
        ExportError: a quantized tensor of the program is not in the file, or of another shape there.
    """
    expected = signed_reference(program, feeds)
    model = LiteRTModel(path.read_bytes())
    places = {model.name(t): t for t in range(len(model.graph.tensors)) if model.grid(t) is not None}
    lost = [name for name in expected.values if name not in places]
    if lost or not expected.values:
        raise ExportError(
            f"{path}: {len(lost)} of {len(expected.values)} quantized tensors are not in it"
            + (f", first {lost[0]}" if lost else ""),
            hint="was the model compiled from this program?",
        )
    layouts = {name: _layout(model, places[name], values) for name, values in expected.values.items()}
    cut = Cut(model)
    for name, values in expected.values.items():
        cut.at(places[name], values.transpose(layouts[name]))
    cut.run(narrow(feeds, "LiteRT"))
    integers = {
        name: cut.value(places[name])
        .reshape([values.shape[axis] for axis in layouts[name]])
        .transpose(np.argsort(layouts[name]))
        for name, values in expected.values.items()
    }
    return judged(expected, integers, cut.outputs)


def _layout(model: LiteRTModel, tensor: int, values: Array) -> tuple[int, ...]:
    """Returns the order of the reference's axes in a tensor of the file, which may have merged some of them."""
    shape, same = model.shape(tensor), tuple(range(values.ndim))
    orders = [same] if values.ndim != 4 else [_LAST, same] if model.is_image(tensor) else [same, _LAST]
    for order in orders:
        if _merges([values.shape[axis] for axis in order], shape):
            return order
    raise ExportError(
        f"{model.name(tensor)} is {list(shape)} in the file, expected {list(values.shape)} in some layout",
        hint="was the model compiled from this program?",
    )


def _merges(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Returns whether a shape comes from sizes by merging neighbours, or adding and leaving out axes of 1."""
    left = [size for size in sizes if size > 1]
    for size in shape:
        total = 1
        while total < size and left:
            total *= left.pop(0)
        if total != size:
            return False
    return not left


class Cut:
    """A model whose tensors can be given where they are read, and looked at where they are computed."""

    def __init__(self, model: LiteRTModel) -> None:
        self._model = model
        self._inputs, self._outputs = model.signature()
        self._given: dict[int, Array] = {}
        self._wanted = list(self._outputs.values())
        self._results: dict[int, Array] = {}

    def at(self, tensor: int, values: Array) -> None:
        """Gives a tensor's readers these values, and puts out what is computed for it."""
        model = self._model
        read = model.readers().get(tensor)
        if read:
            copy = model.add_like(f"{model.name(tensor)}.given", tensor)
            model.redirect(read, tensor, copy)
            self._given[copy] = values.reshape(model.shape(tensor))
        if tensor not in self._wanted:
            self._wanted.append(tensor)

    def run(self, feeds: Mapping[str, Array]) -> None:
        """Runs the model once, with inputs by the signature's names."""
        model = self._model
        given = {**{self._inputs[name]: values for name, values in feeds.items()}, **self._given}
        content, (inputs, outputs) = model.with_interface(list(given), self._wanted)
        interpreter = Interpreter(model_content=content, num_threads=1)
        interpreter.allocate_tensors()
        for place, values in zip(inputs, given.values(), strict=True):
            interpreter.set_tensor(place, np.ascontiguousarray(values))
        interpreter.invoke()
        self._results = {t: interpreter.get_tensor(p) for t, p in zip(self._wanted, outputs, strict=True)}

    def value(self, tensor: int) -> Array:
        """Returns what was computed for a tensor."""
        return self._results[tensor]

    @property
    def outputs(self) -> dict[str, Array]:
        """The model's outputs by name."""
        return {name: self._results[tensor] for name, tensor in self._outputs.items()}

"""Compares a quantized ``.tflite`` file with PyTorch operation by operation, in whole numbers.

Every quantized tensor of the file is replaced by the reference's own where it is read, and put out where it is
computed: no difference reaches the next operation, and one run checks them all with the kernels that it ships with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from fewstep.bundle.program import Program
from fewstep.disk import scratch
from fewstep.errors import ExportError
from fewstep.runtimes.base import Array, PointResult, RunModel
from fewstep.runtimes.litert.compile.flatbuffer import LiteRTModel
from fewstep.runtimes.litert.compile.int_weights import ROWS
from fewstep.runtimes.litert.compile.qdq import MOVES
from fewstep.runtimes.litert.runtime import SIGNATURE
from fewstep.runtimes.parity.quantized_reference import Product, judged, signed_reference
from fewstep.runtimes.sampling.int32_feeds import narrow

# Images are stored with their channels last.
_LAST = (0, 2, 3, 1)
_PADS = (schema.BuiltinOperator.PAD, schema.BuiltinOperator.PADV2)


def run_here(path: Path, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
    """Returns outputs of a model's one signature by name, on this machine."""
    results = Interpreter(model_path=str(path), num_threads=1).get_signature_runner(SIGNATURE)(**feeds)
    return {name: results[name] for name in outputs}


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
        ExportError: a quantized tensor of the program is not in the file, or of another shape there.
    """
    expected = signed_reference(program, feeds)
    model = LiteRTModel(path.read_bytes())
    places = {model.name(t): t for t in range(len(model.graph.tensors)) if model.grid(t) is not None}
    lost = [name for name in expected.values if name not in places]
    if lost or not (expected.values or expected.products):
        raise ExportError(
            f"{path}: {len(lost)} of {len(expected.values)} quantized tensors are not in it"
            + (f", first {lost[0]}" if lost else ""),
            hint="was the model compiled from this program?",
        )
    layouts = {name: _layout(model, places[name], values.shape) for name, values in expected.values.items()}
    products = _find_products(model, expected.products, path)
    cut = Cut(model)
    for name, values in expected.values.items():
        cut.at(places[name], layouts[name].of_file(values))
    for name, product in expected.products.items():
        cut.at(products[name].data, _layout_of(product, product.data).of_file(product.data))
        cut.at(products[name].result, _layout_of(product, product.result).of_file(product.result))
    cut.run(narrow(feeds, "LiteRT"), run)
    integers = {name: layouts[name].of_reference(cut.value(places[name])) for name in expected.values}
    results = {
        name: _layout_of(product, product.result).of_reference(cut.value(products[name].result))
        for name, product in expected.products.items()
    }
    return judged(expected, integers, cut.outputs, results)


@dataclass(frozen=True)
class _ProductTensors:
    """What a product takes, before it is padded, and what it gives."""

    data: int
    result: int


def _find_products(model: LiteRTModel, expected: Mapping[str, Product], path: Path) -> dict[str, _ProductTensors]:
    """Returns the tensors of each product of the reference, which goes by its weight.

    Raises:
        ExportError: the file multiplies a weight more or less often.
    """
    producers, found = model.producers(), {}
    places: dict[str, list[Any]] = {}
    for operator in model.graph.operators:
        if model.kind(operator) in ROWS:
            places.setdefault(model.name(int(operator.inputs[1])), []).append(operator)
    wanted = Counter(product.weight for product in expected.values())
    for weight, count in wanted.items():
        if len(places.get(weight, ())) != count:
            raise ExportError(
                f"{path}: {weight} is multiplied by {len(places.get(weight, ()))} operations, expected {count}",
                hint="was the model compiled from this program?",
            )
    for name, product in expected.items():
        operator = places[product.weight].pop(0)
        data = int(operator.inputs[0])
        while data in producers and model.kind(producers[data]) in _PADS:
            data = int(producers[data].inputs[0])
        found[name] = _ProductTensors(data, int(operator.outputs[0]))
    return found


@dataclass(frozen=True)
class _Layout:
    """Where the values of a tensor of the reference are in one of the file.

    Attributes:
        order: of the reference's axes in the file, which may have merged some of them.
        shape: of the reference's tensor.
        moves: that the file makes before its tensor has this order: shape before and order of axes of each, None for a
            change of shape alone.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]
    moves: tuple[tuple[tuple[int, ...], tuple[int, ...] | None], ...] = ()

    def of_file(self, values: Array) -> Array:
        """Returns the values of the reference's tensor as the file has them, but for merged axes."""
        values = values.transpose(self.order)
        for before, axes in reversed(self.moves):
            values = values.reshape(before if axes is None else [before[axis] for axis in axes])
            values = values if axes is None else values.transpose(np.argsort(axes))
        return values

    def of_reference(self, values: Array) -> Array:
        """Returns the values of the file's tensor as the reference has them."""
        for before, axes in self.moves:
            values = values.reshape(before)
            values = values if axes is None else values.transpose(axes)
        return values.reshape([self.shape[axis] for axis in self.order]).transpose(np.argsort(self.order))


def _layout_of(product: Product, values: Array) -> _Layout:
    """Returns how the file has what a product takes or gives."""
    return _Layout(_LAST if product.image else tuple(range(values.ndim)), values.shape)


def _layout(model: LiteRTModel, tensor: int, shape: tuple[int, ...]) -> _Layout:
    """Returns how a tensor of the file holds the reference's of a shape.

    Converters take functions of single values through layouts: a tensor may be on its grid before the file moves it to
    where the reference has it.
    """
    moves: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = []
    at: int | None = tensor
    while at is not None:
        order = _order(model, at, shape)
        if order is not None:
            return _Layout(order, shape, tuple(moves))
        move = next((o for o in model.readers().get(at, []) if model.kind(o) in MOVES), None)
        if move is not None:
            turns = model.kind(move) == schema.BuiltinOperator.TRANSPOSE
            axes = tuple(int(axis) for axis in model.constants[int(move.inputs[1])]) if turns else None
            moves.append((model.shape(at), axes))
        at = None if move is None else int(move.outputs[0])
    raise ExportError(
        f"{model.name(tensor)} is {list(model.shape(tensor))} in the file, expected {list(shape)} in some layout",
        hint="was the model compiled from this program?",
    )


def _order(model: LiteRTModel, tensor: int, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the order in which a tensor of the file has the axes of a shape, which it may have merged."""
    same = tuple(range(len(shape)))
    orders = [same] if len(shape) != 4 else [_LAST, same] if model.is_image(tensor) else [same, _LAST]
    return next((order for order in orders if _merges([shape[axis] for axis in order], model.shape(tensor))), None)


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

    def run(self, feeds: Mapping[str, Array], run: RunModel) -> None:
        """Runs the model once, with inputs by the signature's names."""
        given = {f"given_{tensor}": tensor for tensor in self._given}
        wanted = {f"wanted_{tensor}": tensor for tensor in self._wanted}
        values = {**feeds, **{name: self._given[tensor] for name, tensor in given.items()}}
        content = self._model.with_interface(self._inputs | given, wanted)
        with scratch() as folder:
            path = Path(folder) / "cut.tflite"
            path.write_bytes(content)
            results = run(path, values, list(wanted))
        self._results = {tensor: results[name] for name, tensor in wanted.items()}

    def value(self, tensor: int) -> Array:
        """Returns what was computed for a tensor."""
        return self._results[tensor]

    @property
    def outputs(self) -> dict[str, Array]:
        """The model's outputs by name."""
        return {name: self._results[tensor] for name, tensor in self._outputs.items()}

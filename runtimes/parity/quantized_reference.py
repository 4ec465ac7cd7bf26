"""What a quantized program computes in PyTorch, and how what a runtime computes differs.

The whole numbers of every quantized activation, and the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch.fx import Node

from fewstep.bundle.program import Program
from fewstep.numerics.metrics import sqnr_db
from fewstep.runtimes.base import Array, PointResult
from fewstep.runtimes.passes.module_paths import module_path
from fewstep.runtimes.passes.quantized_weights import float_source, weight_name
from fewstep.runtimes.pytorch.float64 import Double

_ops = torch.ops.quantized_decomposed
_QUANTIZE = (_ops.quantize_per_tensor.default, _ops.quantize_per_tensor.tensor)
_RELU = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)


@dataclass(frozen=True)
class Product:
    """A product whose data each call puts onto grids, which kernels do inside of themselves.

    Attributes:
        weight: the name that its weight is stored by, see `fewstep.runtimes.passes.quantized_weights`.
        image: whether data and result have their channels on the second of four axes.
        data: in float, before the grids.
        result: of the product, after a ReLU that alone reads it.
        noise_db: SQNR that the grids leave of the result.
    """

    weight: str
    image: bool
    data: Array
    result: Array
    noise_db: float


@dataclass(frozen=True)
class IntegerReference:
    """What a quantized program computes of one call.

    Attributes:
        values: the whole numbers of each quantized tensor by fx node, in the order of computation.
        paths: their module paths, and those of products.
        outputs: those in float, by name, without those that a product puts out.
        least: the least integer that float rounding explains at each place of ``values``; in ``most`` the largest.
        most: see ``least``. They differ where the value before rounding lies next to the middle of two integers.
        products: by fx node, in the order of computation.
    """

    values: Mapping[str, Array]
    paths: Mapping[str, str]
    outputs: Mapping[str, Array]
    least: Mapping[str, Array] = field(default_factory=dict)
    most: Mapping[str, Array] = field(default_factory=dict)
    products: Mapping[str, Product] = field(default_factory=dict)


@torch.no_grad()
def integer_reference(program: Program, feeds: Mapping[str, Array]) -> IntegerReference:
    """Returns what a program computes of one call's inputs."""
    module = program.exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    recorder = _Recorder(module)
    inputs = [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in program.spec.inputs]
    results = recorder.run(*inputs)
    nodes = {node.name: node for node in module.graph.nodes}
    (given,) = (node.args[0] for node in nodes.values() if node.op == "output")
    outputs = {
        spec.name: result.numpy()
        for spec, node, result in zip(program.spec.outputs, given, results, strict=True)
        if result.is_floating_point() and node not in recorder.results
    }
    explained = _Explained(module, recorder.values, recorder.sources)
    recorder.sources.clear()
    explained.run(*inputs)
    paths = {name: _path(nodes[name]) for name in (*recorder.values, *recorder.products)}
    return IntegerReference(recorder.values, paths, outputs, explained.least, explained.most, recorder.products)


def signed_reference(program: Program, feeds: Mapping[str, Array]) -> IntegerReference:
    """Returns what a quantized program computes of one call's inputs, whole numbers as int8 whatever the plan has."""
    found = integer_reference(program, feeds)
    signed = ({name: _signed(values) for name, values in of.items()} for of in (found.values, found.least, found.most))
    values, least, most = signed
    return replace(found, values=values, least=least, most=most)


def _signed(values: Array) -> Array:
    if values.dtype == np.int8:
        return values
    shifted: Array = (values.astype(np.int16) - 128).astype(np.int8)
    return shifted


class _Recorder(torch.fx.Interpreter):
    """Keeps the whole numbers of every quantized activation and products with grids of each call; frees the rest."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Array] = {}
        self.sources: dict[str, Array] = {}
        self.products: dict[str, Product] = {}
        self.results: set[Node] = set()
        sources = {node: float_source(node) for node in module.graph.nodes if node.op == "call_function"}
        self._sources = {node: source for node, source in sources.items() if source is not None}
        self._kept = set(self._sources.values())
        self._data: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> object:
        """Runs a node."""
        result = super().run_node(n)
        if n.target in _QUANTIZE:
            assert isinstance(result, torch.Tensor)
            self.values[n.name] = np.array(result.numpy(), order="C")  # runtimes take no other order
            (source, *_), _ = self.fetch_args_kwargs_from_env(n)
            self.sources[n.name] = source.numpy()
        if n in self._kept:
            assert isinstance(result, torch.Tensor)
            self._data[n] = result
        if n in self._sources:
            assert isinstance(result, torch.Tensor)
            self.products[n.name] = self._product(n, result, self._data[self._sources[n]])
        return result

    def _product(self, n: Node, result: torch.Tensor, data: torch.Tensor) -> Product:
        (_, *others), _ = self.fetch_args_kwargs_from_env(n)
        assert callable(n.target)
        without = n.target(data, *others)
        (*_, last) = (n, *(user for user in n.users if len(n.users) == 1 and user.target in _RELU))
        self.results.add(last)
        if last is not n:
            result, without = result.relu(), without.relu()
        noise_db = sqnr_db(without.numpy(), result.numpy())
        image = n.target is torch.ops.aten.conv2d.default
        return Product(weight_name(n), image, data.numpy(), np.array(result.numpy()), noise_db)


# How much further from the exact value than the reference's worst another kernel may be: it adds the same products in
# another order, and the errors of both are of one distribution.
_MARGIN = 8.0
# What the division by the scale rounds, and the scale itself: two roundings of float32, twice over.
_REQUANTIZED = 4 * float(np.finfo(np.float32).eps)


class _Explained(Double):
    """Finds which integers float rounding explains, from the values before rounding in float64.

    Every quantized tensor is the reference's, so that a value is the exact result of the integers before it. The
    reference's own distance from it, the largest in the tensor, is the float error of its sums: their length and the
    magnitude of what they add are in it.
    """

    def __init__(self, module: torch.fx.GraphModule, values: Mapping[str, Array], sources: Mapping[str, Array]) -> None:
        super().__init__(module)
        self._values, self._sources = values, dict(sources)
        self.least: dict[str, Array] = {}
        self.most: dict[str, Array] = {}

    def run_node(self, n: Node) -> object:
        """Runs a node; what goes onto a grid is the reference's."""
        if n.name not in self._values:
            return super().run_node(n)
        (source, scale, zero, low, high, *_), _ = self.fetch_args_kwargs_from_env(n)
        exact = source.double().numpy()
        error = _MARGIN * float(np.abs(exact - self._sources.pop(n.name)).max(initial=0.0)) / float(scale)
        place = exact / float(scale)
        unsure = error + _REQUANTIZED * np.abs(place)
        dtype = self._values[n.name].dtype
        for side, sign in ((self.least, -1), (self.most, 1)):
            side[n.name] = np.clip(np.rint(place + sign * unsure) + int(zero), low, high).astype(dtype)
        return torch.from_numpy(self._values[n.name])


def _path(node: Node) -> str:
    """Returns the module path in whose result a quantized tensor has its origin, or that of a product."""
    return module_path(node.all_input_nodes[0] if node.target in _QUANTIZE else node)


def judged(
    expected: IntegerReference,
    integers: Mapping[str, Array],
    outputs: Mapping[str, Array],
    products: Mapping[str, Array] | None = None,
) -> list[PointResult]:
    """Returns how a runtime's integers, outputs and results of products differ from the reference's."""
    found = []
    for name, values in integers.items():
        difference = np.abs(values.astype(np.int32) - expected.values[name].astype(np.int32))
        differing, largest = int(np.count_nonzero(difference)), int(difference.max(initial=0))
        strange = (values < expected.least[name]) | (values > expected.most[name])
        unexplained = int(np.count_nonzero(strange))
        found.append(PointResult(name, expected.paths[name], difference.size, differing, largest, unexplained))
    for name, product in expected.products.items():
        quality_db = sqnr_db(product.result, (products or {})[name])
        size = product.result.size
        found.append(PointResult(name, expected.paths[name], size, 0, 0, 0, quality_db, product.noise_db))
    for name, value in expected.outputs.items():
        found.append(PointResult(name, "output", value.size, 0, 0, 0, sqnr_db(value, outputs[name])))
    return found

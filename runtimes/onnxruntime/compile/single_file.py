"""Puts a bundle's networks and its sampler into one ONNX file: tokens and noise in, picture out.

Every component is a function of the model whose parameters are its weights, so a network that runs in every step is
written once, and its weights are stored once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.manifest import Manifest
from fewstep.bundle.schedule import Schedule
from fewstep.runtimes.onnxruntime.compile.writer import save_model
from fewstep.runtimes.sampling.unrolled_graph import Unrolled, check_unrolls, input_name

_DOMAIN = "fewstep"
_ONE_FILE_BYTES = 512 << 20


def write_loop(bundle: Bundle, path: Path, *, runtime: str = "onnxruntime", steps: int | None = None) -> Path:
    """Returns the path of a model that samples with one of a bundle's schedules, unrolled.

    Its inputs are named by origin with ``_`` for ``:``: ``tokens_tokenizer``, ``noise_0`` (the first latent's),
    ``noise_1`` and on (each step's that draws some, as float32 of the latent's shape), ``guidance_embedding``, and what
    the user gives beside a prompt. Its output ``picture`` is the last component's, scaled and clipped as the contract
    says, channels first.

    Args:
        bundle: the bundle.
        path: of the model.
        runtime: whose artifacts to take: ONNX files.
        steps: the schedule; None takes the bundle's default.

    Raises:
        ContractError: see `check_unrolls`.
    """
    manifest = bundle.manifest
    check_unrolls(manifest)
    schedule = manifest.schedule(manifest.default_steps if steps is None else steps)
    models = {name: ir.load(bundle.file(manifest.artifact(runtime, name).path)) for name in manifest.components}
    model = _Loop(manifest, schedule, models).model()
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, path, external=size > _ONE_FILE_BYTES, references=False)
    return path


class _Loop(Unrolled[ir.Value]):
    """Builds the graph, value by value."""

    def __init__(self, manifest: Manifest, schedule: Schedule, models: Mapping[str, ir.Model]) -> None:
        super().__init__(manifest, schedule)
        self._nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, float, tuple[int, ...]], ir.Value] = {}
        self._initializers: dict[str, ir.Value] = {}
        self._functions: list[ir.Function] = []
        self._weights: dict[str, list[ir.Value]] = {}
        self._opsets: dict[str, int] = {_DOMAIN: 1}
        for component, model in models.items():
            self._opsets |= model.opset_imports
            self._define(component, model)

    def model(self) -> ir.Model:
        """Returns the model."""
        result, shape = self.picture()
        picture = self._op("Identity", [result])
        picture.name, picture.type = "picture", ir.TensorType(ir.DataType.FLOAT)
        picture.shape = ir.Shape(shape)
        graph = ir.Graph(
            list(self.inputs.values()),
            [picture],
            nodes=self._nodes,
            initializers=[*self._initializers.values(), *self._constants.values()],
            opset_imports=self._opsets,
            name=f"{self.manifest.name}-{self.schedule.steps}",
        )
        return ir.Model(graph, ir_version=10, producer_name="fewstep", functions=self._functions)

    def _define(self, component: str, model: ir.Model) -> None:
        """Makes a component a function that takes its weights after its inputs."""
        graph = model.graph
        weights = list(graph.initializers.values())
        stored = []
        for weight in weights:
            name = f"{component}/{weight.name}"
            stored.append(
                ir.Value(
                    name=name, type=weight.type, shape=weight.shape, const_value=_renamed(weight.const_value, name)
                )
            )
        graph.initializers.clear()
        for weight in weights:
            weight.const_value = None
            graph.inputs.append(weight)
        self._functions.append(ir.Function(_DOMAIN, component, graph=graph, attributes=[]))
        self._weights[component] = stored
        self._initializers |= {str(value.name): value for value in stored}

    def call(self, component: str, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Returns the outputs of a component."""
        outputs = len(self.manifest.components[component].outputs)
        node = ir.Node(_DOMAIN, component, [*inputs, *self._weights[component]], num_outputs=outputs)
        self._nodes.append(node)
        return node.outputs

    def input(self, origin: str, dtype: str, shape: tuple[int, ...]) -> ir.Value:
        """Returns a new input of the graph."""
        kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
        return ir.Value(name=input_name(origin), type=kind, shape=ir.Shape(shape))

    def constant(self, number: float, dtype: str, shape: tuple[int, ...]) -> ir.Value:
        """Returns a tensor of one number."""
        key = dtype, number, shape
        if key not in self._constants:
            name = f"number_{len(self._constants)}"
            tensor = ir.tensor(np.full(shape, number, dtype), name=name)
            self._constants[key] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor
            )
        return self._constants[key]

    def scale(self, value: ir.Value, factor: float) -> ir.Value:
        """Returns a value times a number."""
        return self._op("Mul", [value, self.constant(factor, "float32", ())])

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Returns the sum of two values."""
        return self._op("Add", [a, b])

    def shift(self, value: ir.Value, number: float) -> ir.Value:
        """Returns a value plus a number."""
        return self._op("Add", [value, self.constant(number, "float32", ())])

    def clip(self, value: ir.Value, low: float, high: float) -> ir.Value:
        """Returns a value between two numbers."""
        return self._op("Clip", [value, self.constant(low, "float32", ()), self.constant(high, "float32", ())])

    def _op(self, kind: str, inputs: Sequence[ir.Value]) -> ir.Value:
        self._nodes.append(ir.node(kind, list(inputs)))
        return self._nodes[-1].outputs[0]


def _renamed(tensor: ir.TensorProtocol | None, name: str) -> ir.TensorProtocol:
    assert tensor is not None
    tensor.name = name
    return tensor

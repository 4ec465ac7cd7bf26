"""Puts a bundle's networks and its sampler into one ONNX file: tokens and noise in, picture out.

Every component is a function of the model whose parameters are its weights, so a network that runs in every step is
written once, and its weights are stored once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fewstep import noise
from fewstep.bundle import Bundle
from fewstep.errors import ContractError
from fewstep.guidance import guidance_embedding
from fewstep.manifest import (
    AFTER,
    BEFORE,
    DENOISER,
    GUIDANCE,
    INPUT,
    LATENT,
    LOOP,
    MASK,
    NOISE,
    SAMPLE,
    STEP,
    TOKENS,
    ComponentSpec,
    Manifest,
    step_numbers,
)
from fewstep.runtimes.base import Array
from fewstep.runtimes.ort_files import save_model
from fewstep.runtimes.tokenizer import Tokenizer
from fewstep.schedule import Schedule

Feeds = Mapping[str, Array]

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
        ContractError: the bundle guides with two passes, which needs tokens of the prompt and of the empty one at once,
            or has a graph for each step.
    """
    manifest = bundle.manifest
    if manifest.contract.guidance.kind == "two_pass":
        raise ContractError(
            f"{manifest.name} is guided with two passes, expected a generator with one call in each step",
            hint="a loop of two passes is not written yet: sample with the components",
        )
    if manifest.contract.form == "specialized":
        raise ContractError(
            f"{manifest.name} has a graph for each step, expected one that all steps call",
            hint="build it with --form table: grids of activations by step are rows of its table too",
        )
    schedule = manifest.schedule(manifest.default_steps if steps is None else steps)
    models = {name: ir.load(bundle.file(manifest.artifact(runtime, name).path)) for name in manifest.components}
    model = _Loop(manifest, schedule, models).model()
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, path, external=size > _ONE_FILE_BYTES)
    return path


class _Loop:
    """Builds the graph, value by value, in the order in which the sampler computes them."""

    def __init__(self, manifest: Manifest, schedule: Schedule, models: Mapping[str, ir.Model]) -> None:
        self._manifest, self._schedule = manifest, schedule
        self._nodes: list[ir.Node] = []
        self._inputs: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, float, tuple[int, ...]], ir.Value] = {}
        self._initializers: dict[str, ir.Value] = {}
        self._functions: list[ir.Function] = []
        self._weights: dict[str, list[ir.Value]] = {}
        self._values: dict[str, ir.Value] = {}
        self._opsets: dict[str, int] = {_DOMAIN: 1}
        for component, model in models.items():
            self._opsets |= model.opset_imports
            self._define(component, model)

    def model(self) -> ir.Model:
        """Returns the model."""
        contract, schedule = self._manifest.contract, self._schedule
        shape: tuple[int, ...] = (1, *contract.latent_shape)
        self._run(BEFORE)
        anchor = self._value(contract.anchor, shape) if contract.anchor and schedule.uses_anchor else None
        x = self._sum([(schedule.init_scale, self._value(contract.initial, shape)), (schedule.init_anchor, anchor)])
        history: list[ir.Value] = []
        for k in range(schedule.steps):
            self._values[LATENT] = self._sum([(schedule.s[k], x)])
            numbers: dict[str, float] = {**step_numbers(schedule, k)}
            if contract.form != "step":
                numbers[STEP] = contract.row(schedule, k)
            self._run(LOOP, numbers)
            F = self._values[f"{DENOISER}.{self._manifest.components[DENOISER].outputs[0].name}"]
            x0 = self._sum([(schedule.p[k], x), (schedule.q[k], F)])
            if schedule.clip is not None:
                x0 = self._clip(x0, -schedule.clip, schedule.clip)
            noise = self._value(f"{NOISE}{k + 1}", shape) if schedule.uses_noise(k) else None
            past = [(h, history[-j]) for j, h in enumerate(schedule.h[k], start=1)]
            x = self._sum(
                [(schedule.a[k], x), (schedule.b[k], x0), (schedule.c[k], noise), *past, (schedule.g[k], anchor)]
            )
            history.append(x0)
        self._values[SAMPLE] = result = self._scaled(x, 1 / contract.latent_scale, contract.latent_shift)
        for component in self._run(AFTER):
            output = self._manifest.components[component].outputs[0]
            result, shape = self._values[f"{component}.{output.name}"], output.shape
        result = self._scaled(result, contract.output.scale, contract.output.shift)
        if contract.output.clip is not None:
            result = self._clip(result, *contract.output.clip)
        picture = self._op("Identity", [result])
        picture.name, picture.type = "picture", ir.TensorType(ir.DataType.FLOAT)
        picture.shape = ir.Shape(shape)
        graph = ir.Graph(
            list(self._inputs.values()),
            [picture],
            nodes=self._nodes,
            initializers=[*self._initializers.values(), *self._constants.values()],
            opset_imports=self._opsets,
            name=f"{self._manifest.name}-{schedule.steps}",
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

    def _run(self, phase: str, numbers: Mapping[str, float] | None = None) -> list[str]:
        """Calls the components of a phase, in order, and returns their names."""
        found = [name for name, spec in self._manifest.components.items() if spec.phase == phase]
        for component in found:
            self._call(component, self._manifest.components[component], numbers or {})
        return found

    def _call(self, component: str, spec: ComponentSpec, numbers: Mapping[str, float]) -> None:
        inputs = []
        for tensor in spec.inputs:
            origin = spec.bindings[tensor.name]
            if origin in numbers:
                inputs.append(self._constant(numbers[origin], tensor.dtype, tensor.shape))
            else:
                inputs.append(self._value(origin, tensor.shape, tensor.dtype))
        node = ir.Node(_DOMAIN, component, [*inputs, *self._weights[component]], num_outputs=len(spec.outputs))
        self._nodes.append(node)
        for value, tensor in zip(node.outputs, spec.outputs, strict=True):
            self._values[f"{component}.{tensor.name}"] = value

    def _value(self, origin: str, shape: Sequence[int], dtype: str = "float32") -> ir.Value:
        """Returns the value of an origin: computed already, or an input of the model."""
        if origin in self._values:
            return self._values[origin]
        if origin not in self._inputs:
            kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
            self._inputs[origin] = ir.Value(name=origin.replace(":", "_"), type=kind, shape=ir.Shape(shape))
        return self._inputs[origin]

    def _constant(self, number: float, dtype: str, shape: tuple[int, ...]) -> ir.Value:
        key = dtype, number, shape
        if key not in self._constants:
            name = f"number_{len(self._constants)}"
            tensor = ir.tensor(np.full(shape, number, dtype), name=name)
            self._constants[key] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor
            )
        return self._constants[key]

    def _op(self, kind: str, inputs: Sequence[ir.Value]) -> ir.Value:
        self._nodes.append(ir.node(kind, list(inputs)))
        return self._nodes[-1].outputs[0]

    def _scaled(self, value: ir.Value, scale: float, shift: float) -> ir.Value:
        value = self._sum([(scale, value)])
        return value if shift == 0 else self._op("Add", [value, self._constant(shift, "float32", ())])

    def _clip(self, value: ir.Value, low: float, high: float) -> ir.Value:
        return self._op("Clip", [value, self._constant(low, "float32", ()), self._constant(high, "float32", ())])

    def _sum(self, terms: Sequence[tuple[float, ir.Value | None]]) -> ir.Value:
        """Returns the sum of values times numbers, in float32; a term with the number 0 or no value is left out."""
        total: ir.Value | None = None
        for number, value in terms:
            if value is None or number == 0:
                continue
            term = value if number == 1 else self._op("Mul", [value, self._constant(number, "float32", ())])
            total = term if total is None else self._op("Add", [total, term])
        assert total is not None, "every latent is made of something"
        return total


def _renamed(tensor: ir.TensorProtocol | None, name: str) -> ir.TensorProtocol:
    assert tensor is not None
    tensor.name = name
    return tensor


def loop_feeds(
    manifest: Manifest,
    inputs: Mapping[str, Sequence[int]],
    tokenizers: Mapping[str, Tokenizer],
    prompt: str,
    seed: int,
    given: Feeds,
) -> Feeds:
    """Returns what a model of `write_loop` takes for a prompt and a seed, by its inputs' names.

    Args:
        manifest: of its bundle.
        inputs: their shapes by name.
        tokenizers: the bundle's.
        prompt: the text.
        seed: of the noise.
        given: the user's other inputs, by name.
    """
    contract = manifest.contract
    feeds: dict[str, Array] = {f"{INPUT}{name}".replace(":", "_"): array for name, array in given.items()}
    for name, tokenizer in tokenizers.items():
        feeds[f"{TOKENS}{name}".replace(":", "_")], feeds[f"{MASK}{name}".replace(":", "_")] = tokenizer(prompt)
    if contract.guidance.kind == "embedded":
        feeds[GUIDANCE] = guidance_embedding(contract.guidance, contract.guidance.scale)
    prefix = NOISE.replace(":", "_")
    for name, shape in inputs.items():
        if name.startswith(prefix):
            feeds[name] = noise.normal(seed, int(name.removeprefix(prefix)), tuple(shape))
    return {name: feeds[name] for name in inputs}

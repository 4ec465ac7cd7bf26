"""The sampler as a graph: what `fewstep.runtimes.sampling.sampler` computes, value by value, for any kind of graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from fewstep.bundle.contract import (
    AFTER,
    BEFORE,
    LATENT,
    LOOP,
    NOISE,
    SAMPLE,
    STEP,
    ComponentSpec,
    called_in_step,
    step_numbers,
)
from fewstep.bundle.manifest import Manifest
from fewstep.bundle.schedule import Schedule
from fewstep.errors import ContractError

V = TypeVar("V")


def check_unrolls(manifest: Manifest) -> None:
    """Raises ContractError unless one file can sample with a bundle's networks.

    A bundle that guides with two passes needs tokens of the prompt and of the empty one at once; one of the specialized
    form has no graph that all steps could call; tiles are cut and blended outside of networks.
    """
    guidance = manifest.contract.guidance
    if guidance.two_passes(guidance.scale):
        raise ContractError(
            f"{manifest.name} is guided with two passes, expected a generator with one call in each step",
            hint="a loop of two passes is not written yet: sample with the components",
        )
    if manifest.contract.form == "specialized":
        raise ContractError(
            f"{manifest.name} has a graph for each step, expected one that all steps call",
            hint="build it with --form table: grids of activations by step are rows of its table too",
        )
    for name, spec in manifest.components.items():
        size = spec.inputs[0].shape[2:]
        if spec.tiles is not None and spec.tiles.shapes(*size) != [size]:
            raise ContractError(
                f"{manifest.name} runs its {name} in tiles, expected one call of a component",
                hint="build it without --decoder-tile, or with tiles as large as the picture",
            )


class Unrolled(ABC, Generic[V]):
    """Computes a sample with the values V of a graph, in the order in which the sampler does."""

    def __init__(self, manifest: Manifest, schedule: Schedule) -> None:
        self.manifest, self.schedule = manifest, schedule
        self.inputs: dict[str, V] = {}
        """Of the graph, by origin."""
        self._values: dict[str, V] = {}

    @abstractmethod
    def call(self, component: str, inputs: Sequence[V]) -> Sequence[V]:
        """Returns the outputs of a component."""

    @abstractmethod
    def input(self, origin: str, dtype: str, shape: tuple[int, ...]) -> V:
        """Returns a new input of the graph."""

    @abstractmethod
    def constant(self, number: float, dtype: str, shape: tuple[int, ...]) -> V:
        """Returns a tensor of one number."""

    @abstractmethod
    def scale(self, value: V, factor: float) -> V:
        """Returns a value times a number, in float32."""

    @abstractmethod
    def add(self, a: V, b: V) -> V:
        """Returns the sum of two values."""

    @abstractmethod
    def shift(self, value: V, number: float) -> V:
        """Returns a value plus a number."""

    @abstractmethod
    def clip(self, value: V, low: float, high: float) -> V:
        """Returns a value between two numbers."""

    def picture(self) -> tuple[V, tuple[int, ...]]:
        """Returns the last component's output, scaled and clipped as the contract says, and its shape."""
        contract, schedule = self.manifest.contract, self.schedule
        shape: tuple[int, ...] = (1, *contract.latent_shape)
        self._run(BEFORE)
        anchor = self._value(contract.anchor, shape) if contract.anchor and schedule.uses_anchor else None
        x = self._sum([(schedule.init_scale, self._value(contract.initial, shape)), (schedule.init_anchor, anchor)])
        history: list[V] = []
        for k in range(schedule.steps):
            self._values[LATENT] = self._sum([(schedule.s[k], x)])
            numbers: dict[str, float] = {**step_numbers(schedule, k)}
            if contract.form != "step":
                numbers[STEP] = contract.row(schedule, k)
            self._run(LOOP, numbers, k)
            network = schedule.network(k)
            F = self._values[f"{network}.{self.manifest.components[network].outputs[0].name}"]
            x0 = self._sum([(schedule.p[k], x), (schedule.q[k], F)])
            if schedule.clip is not None:
                x0 = self.clip(x0, -schedule.clip, schedule.clip)
            noise = self._value(f"{NOISE}{k + 1}", shape) if schedule.uses_noise(k) else None
            past = [(h, history[-j]) for j, h in enumerate(schedule.h[k], start=1)]
            x = self._sum(
                [(schedule.a[k], x), (schedule.b[k], x0), (schedule.c[k], noise), *past, (schedule.g[k], anchor)]
            )
            history.append(x0)
        self._values[SAMPLE] = result = self._scaled(x, 1 / contract.latent_scale, contract.latent_shift)
        for component in self._run(AFTER):
            output = self.manifest.components[component].outputs[0]
            result, shape = self._values[f"{component}.{output.name}"], output.shape
        result = self._scaled(result, contract.output.scale, contract.output.shift)
        if contract.output.clip is not None:
            result = self.clip(result, *contract.output.clip)
        return result, shape

    def _run(self, phase: str, numbers: Mapping[str, float] | None = None, k: int | None = None) -> list[str]:
        """Calls the components of a phase, in the loop those of step k, in order, and returns their names."""
        found = [name for name, spec in self.manifest.components.items() if spec.phase == phase]
        found = found if k is None else [name for name in found if called_in_step(name, self.schedule, k)]
        for component in found:
            self._call(component, self.manifest.components[component], numbers or {})
        return found

    def _call(self, component: str, spec: ComponentSpec, numbers: Mapping[str, float]) -> None:
        inputs = []
        for tensor in spec.inputs:
            origin = spec.bindings[tensor.name]
            if origin in numbers:
                inputs.append(self.constant(numbers[origin], tensor.dtype, tensor.shape))
            else:
                inputs.append(self._value(origin, tensor.shape, tensor.dtype))
        for value, tensor in zip(self.call(component, inputs), spec.outputs, strict=True):
            self._values[f"{component}.{tensor.name}"] = value

    def _value(self, origin: str, shape: tuple[int, ...], dtype: str = "float32") -> V:
        """Returns the value of an origin: computed already, or an input of the graph."""
        if origin in self._values:
            return self._values[origin]
        if origin not in self.inputs:
            self.inputs[origin] = self.input(origin, dtype, shape)
        return self.inputs[origin]

    def _scaled(self, value: V, scale: float, shift: float) -> V:
        value = self._sum([(scale, value)])
        return value if shift == 0 else self.shift(value, shift)

    def _sum(self, terms: Sequence[tuple[float, V | None]]) -> V:
        """Returns the sum of values times numbers, in float32; a term with the number 0 or no value is left out."""
        total: V | None = None
        for number, value in terms:
            if value is None or number == 0:
                continue
            term = value if number == 1 else self.scale(value, number)
            total = term if total is None else self.add(total, term)
        assert total is not None, "every sum of a sampler has a term"
        return total


def input_name(origin: str) -> str:
    """Returns what an input of a graph is called: its origin, with ``_`` for ``:``."""
    return origin.replace(":", "_")

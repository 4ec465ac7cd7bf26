"""The programs of a bundle: how the networks of a generator are compiled for the steps that it samples with.

Forms:

- ``step``: as the generator's authors wrote them. The networks of the loop take the numbers of the step, and the
  bundle can sample with any schedule.
- ``table``: the steps of the bundle's schedules are the rows of a table, and the networks of the loop take a row's
  number: see `fewstep.export.specialize.hoist`.
- ``specialized``: the same programs, of which backends compile one graph for each row: see
  `fewstep.export.specialize.at_step`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fewstep.bundle.contract import LOOP, STEP, ComponentSpec, Contract, called_in_step, step_numbers
from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.bundle.samples import Sample, StepFeed
from fewstep.bundle.schedule import Schedule
from fewstep.export.describe import Description
from fewstep.export.generator import Generator
from fewstep.export.specialize.constant_fold import fold, parameter_reader
from fewstep.export.specialize.counts import Removed, removed
from fewstep.export.specialize.dependencies import user_inputs
from fewstep.export.specialize.hoist import Static, specialize
from fewstep.export.trace.component_module import digest, trace
from fewstep.recipe.recipe import Recipe

# With more steps than this, tables are not small, and a user may well want another number of steps.
_FEW = 8


@dataclass(frozen=True)
class Programs:
    """What a bundle is compiled of: its contract, its components in order, and how to make the program of each."""

    generator: Generator
    described: Description
    contract: Contract
    components: Mapping[str, ComponentSpec]
    static: Mapping[str, Static] = field(default_factory=dict)
    """By the name of the network of the loop; of the others there is nothing to specialize."""
    halves: bool = False
    removed: Mapping[str, Removed] = field(default_factory=dict)
    """What left each network of the loop, by its name."""

    def key(self, component: str) -> dict[str, Any]:
        """Returns all that determines a component's program beside the generator's weights, JSON-ready."""
        network = self._network(component)
        return {
            "component": component,
            "spec": asdict(self.components[component]),
            "wiring": digest(self.described.wirings[network]),
            "rows": [dict(row) for row in self.contract.rows] if network in self.static else None,
        }

    def make(self, component: str, spec: ComponentSpec | None = None) -> Program:
        """Returns the program of a component; ``spec`` traces one outside the loop for other shapes than its own."""
        network = self._network(component)
        if network not in self.static:
            return trace(self.generator, self.described.wirings[network], spec or self.components[network])
        found = self.static[network]
        program = found.step if component == network else found.conditions
        assert program is not None
        return program

    def rows(self, component: str) -> list[int]:
        """Returns the rows of the table of steps that a network of the loop is called with."""
        network, schedules = self._network(component), self.described.schedules.values()
        steps = ((schedule, k) for schedule in schedules for k in range(schedule.steps))
        return sorted({self.contract.row(s, k) for s, k in steps if called_in_step(network, s, k)})

    def label(self, artifact: Artifact) -> Artifact:
        """Returns an artifact as its runtime labelled it: the programs are in float."""
        return artifact

    def restate(self, samples: Sequence[Sample]) -> list[Sample]:
        """Returns recorded samples with their network calls as the bundle's components take them.

        What the reference never computed on its own is computed in PyTorch by the component's program.
        """
        return (
            [replace(sample, feeds=tuple(self._feeds(sample))) for sample in samples] if self.static else list(samples)
        )

    def _network(self, component: str) -> str:
        """Returns the network that a component is part of."""
        for network, found in self.static.items():
            if found.conditions is not None and found.conditions.component == component:
                return network
        return component

    def _feeds(self, sample: Sample) -> Iterator[StepFeed]:
        """Yields a sample's network calls: what runs once for each picture just before the loop."""
        schedule = self.described.schedules[sample.steps]
        fixed: dict[tuple[str, str], StepFeed] = {}
        for feed in sample.feeds:
            program = self.static[feed.component].conditions if feed.component in self.static else None
            if program is not None and (feed.component, feed.branch) not in fixed:
                fixed[feed.component, feed.branch] = _run_once(program, feed, halves=self.halves)
        started = False
        for feed in sample.feeds:
            if not started and self.described.components[feed.component].phase == LOOP:
                yield from fixed.values()
                started = True
            yield self._feed(feed, fixed.get((feed.component, feed.branch)), schedule)

    def _feed(self, feed: StepFeed, fixed: StepFeed | None, schedule: Schedule) -> StepFeed:
        """Returns a call of a network as the bundle's component of that name takes it."""
        if feed.component not in self.static:
            return feed
        assert feed.step is not None
        given = dict(feed.inputs) | (dict(fixed.outputs) if fixed is not None else {})
        given[STEP] = np.array([self.contract.row(schedule, feed.step)])
        return replace(feed, inputs={spec.name: given[spec.name] for spec in self.components[feed.component].inputs})


def programs_of(generator: Generator, described: Description, recipe: Recipe) -> Programs:
    """Returns the programs that a recipe asks for.

    Raises:
        ExportError: a network of the loop cannot be traced or taken apart.
    """
    schedules = described.schedules
    form = recipe.form or ("table" if max(schedule.steps for schedule in schedules.values()) <= _FEW else "step")
    if form == "step":
        return Programs(generator, described, described.contract, described.components)
    rows = _rows(schedules.values())
    loop = [name for name, spec in described.components.items() if spec.phase == LOOP]
    halves = recipe.weights == "fp16"
    static, components, left = {}, {}, {}
    for name, spec in described.components.items():
        if name not in loop:
            components[name] = spec
            continue
        program = trace(generator, described.wirings[name], spec)
        static[name] = specialize(program, rows, varying=loop, halves=halves)
        left[name] = removed(program, static[name])
        if (conditions := static[name].conditions) is not None:
            components[conditions.component] = conditions.spec
        components[name] = static[name].step.spec
    contract = replace(described.contract, form=form, rows=tuple(rows))
    return Programs(generator, described, contract, components, static, halves, left)


def _rows(schedules: Iterable[Schedule]) -> list[dict[str, float]]:
    """Returns the numbers of every step of the schedules, each once, from the first step on."""
    found: list[dict[str, float]] = []
    for schedule in sorted(schedules, key=lambda schedule: -schedule.steps):
        for k in range(schedule.steps):
            numbers = step_numbers(schedule, k)
            if numbers not in found:
                found.append(numbers)
    return found


def _run_once(program: Program, feed: StepFeed, *, halves: bool) -> StepFeed:
    """Returns the call of a program that runs once for each picture, on the inputs of the network that it is of."""
    graph, spec = program.exported.graph, program.spec
    inputs = {tensor.name: feed.inputs[tensor.name] for tensor in spec.inputs}
    names = user_inputs(program.exported, tuple(inputs))
    given = {
        node: torch.from_numpy(inputs[names[node.name]])
        for node in graph.nodes
        if node.op == "placeholder" and node.name in names
    }
    targets = next(node for node in graph.nodes if node.op == "output").args[0]
    values = fold(targets, [given], parameter_reader(program, halves=halves))
    outputs = {tensor.name: value[0].numpy().copy() for tensor, value in zip(spec.outputs, values, strict=True)}
    return StepFeed(program.component, None, None, feed.branch, inputs, outputs)

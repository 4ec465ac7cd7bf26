"""The programs of a bundle: how the networks of a generator are compiled for the steps that it samples with.

Forms:

- ``step``: as the generator's authors wrote them. The networks of the loop take the numbers of the step, and the
  bundle can sample with any schedule.
- ``table``: the steps of the bundle's schedules are the rows of a table, and the networks of the loop take a row's
  number: see `fewstep.export.static`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fewstep.export.dependence import user_inputs
from fewstep.export.describe import Description
from fewstep.export.fold import fold, parameter_reader
from fewstep.export.generator import Generator
from fewstep.export.static import Static, specialize
from fewstep.export.wiring import digest, trace
from fewstep.feeds import Sample, StepFeed
from fewstep.manifest import LOOP, STEP, ComponentSpec, Contract, step_numbers
from fewstep.program import Program
from fewstep.recipe import Recipe
from fewstep.schedule import Schedule

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

    @classmethod
    def as_written(cls, generator: Generator, described: Description) -> Programs:
        """Returns the programs in step form."""
        return cls(generator, described, described.contract, described.components)

    def key(self, component: str) -> dict[str, Any]:
        """Returns all that determines a component's program beside the generator's weights, JSON-ready."""
        network = self.network(component)
        return {
            "component": component,
            "spec": asdict(self.components[component]),
            "wiring": digest(self.described.wirings[network]),
            "rows": [dict(row) for row in self.contract.rows] if network in self.static else None,
        }

    def make(self, component: str) -> Program:
        """Returns the program of a component."""
        network = self.network(component)
        if network not in self.static:
            return trace(self.generator, self.described.wirings[network], self.described.components[network])
        found = self.static[network]
        program = found.step if component == network else found.conditions
        assert program is not None
        return program

    def restate(self, sample: Sample) -> Sample:
        """Returns a recorded sample with its network calls as the bundle's components take them.

        What the reference never computed on its own is computed in PyTorch by the component's program.
        """
        if not self.static:
            return sample
        loop = [feed for feed in sample.feeds if feed.component in self.static]
        first = {(feed.component, feed.branch): feed for feed in reversed(loop)}
        once = {key: self._run_once(feed) for key, feed in reversed(first.items())}
        feeds: list[StepFeed] = []
        for feed in sample.feeds:
            if loop and feed is loop[0]:
                feeds += [fixed for fixed in once.values() if fixed is not None]
            fixed = once.get((feed.component, feed.branch))
            feeds.append(self._restated(feed, fixed, sample.steps) if feed.component in self.static else feed)
        return replace(sample, feeds=tuple(feeds))

    def feeds(self, component: str, recorded: Iterable[StepFeed], steps: int) -> Iterator[StepFeed]:
        """Yields recorded calls of the network that a component is part of, as the component takes them.

        Args:
            component: one of ``components``.
            recorded: calls of its network, see `network`, in the order in which they were made.
            steps: step count of their trajectories.
        """
        network = self.network(component)
        if network not in self.static:
            yield from recorded
            return
        once: dict[str, tuple[StepFeed, StepFeed | None]] = {}
        for feed in recorded:
            known = once.get(feed.branch)
            if known is None or not self._same_picture(network, known[0], feed):
                known = once[feed.branch] = feed, self._run_once(feed)
                if component != network and known[1] is not None:
                    yield known[1]
            if component == network:
                yield self._restated(feed, known[1], steps)

    def network(self, component: str) -> str:
        """Returns the network that a component is part of, by the name that it has in recorded calls."""
        for network, found in self.static.items():
            if found.conditions is not None and found.conditions.component == component:
                return network
        return component

    def _same_picture(self, network: str, one: StepFeed, other: StepFeed) -> bool:
        conditions = self.static[network].conditions
        names = [] if conditions is None else [spec.name for spec in conditions.spec.inputs]
        return all(np.array_equal(one.inputs[name], other.inputs[name]) for name in names)

    def _restated(self, feed: StepFeed, fixed: StepFeed | None, steps: int) -> StepFeed:
        """Returns a call of a network of the loop as the bundle's component of that name takes it."""
        assert feed.step is not None
        given = dict(feed.inputs) | (dict(fixed.outputs) if fixed is not None else {})
        given[STEP] = np.array([self.contract.row(self.described.schedules[steps], feed.step)])
        return replace(feed, inputs={spec.name: given[spec.name] for spec in self.components[feed.component].inputs})

    def _run_once(self, feed: StepFeed) -> StepFeed | None:
        """Returns what runs once for the picture of a network's call, None where there is nothing such."""
        program = self.static[feed.component].conditions
        if program is None:
            return None
        graph, spec = program.exported.graph, program.spec
        inputs = {tensor.name: feed.inputs[tensor.name] for tensor in spec.inputs}
        names = user_inputs(program.exported, tuple(inputs))
        placeholders = [node for node in graph.nodes if node.op == "placeholder" and node.name in names]
        given = {node: torch.from_numpy(inputs[names[node.name]]) for node in placeholders}
        targets = next(node for node in graph.nodes if node.op == "output").args[0]
        values = fold(targets, [given], parameter_reader(program, halves=self.halves))
        outputs = {tensor.name: value[0].numpy().copy() for tensor, value in zip(spec.outputs, values, strict=True)}
        return StepFeed(program.component, None, None, feed.branch, inputs, outputs)


def programs_of(generator: Generator, described: Description, recipe: Recipe) -> Programs:
    """Returns the programs that a recipe asks for.

    Raises:
        ExportError: a network of the loop cannot be traced or taken apart.
    """
    schedules = described.schedules
    form = recipe.form or ("table" if max(schedule.steps for schedule in schedules.values()) <= _FEW else "step")
    if form == "step":
        return Programs.as_written(generator, described)
    rows = _rows(schedules.values())
    loop = [name for name, spec in described.components.items() if spec.phase == LOOP]
    halves = recipe.weights == "fp16"
    static, components = {}, {}
    for name, spec in described.components.items():
        if name not in loop:
            components[name] = spec
            continue
        program = trace(generator, described.wirings[name], spec)
        static[name] = specialize(program, rows, varying=loop, halves=halves)
        if (conditions := static[name].conditions) is not None:
            components[conditions.component] = conditions.spec
        components[name] = static[name].step.spec
    contract = replace(described.contract, form=form, rows=tuple(rows))
    return Programs(generator, described, contract, components, static, halves)


def _rows(schedules: Iterable[Schedule]) -> list[dict[str, float]]:
    """Returns the numbers of every step of the schedules, each once, from the first step on."""
    found: list[dict[str, float]] = []
    for schedule in sorted(schedules, key=lambda schedule: -schedule.steps):
        for k in range(schedule.steps):
            numbers = step_numbers(schedule, k)
            if numbers not in found:
                found.append(numbers)
    return found

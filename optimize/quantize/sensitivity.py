"""How much a component's output suffers when one of its weights, and no other, is stored in fewer bits.

Every option of every weight is tried on recorded calls of each step; what does not depend on the weight is computed
once for each call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter, Node

from fewstep.calibration.observe import Calls
from fewstep.errors import QuantizationError

# Values to try in a weight's place, made when they are wanted: (parameter's name, number of the option) -> values.
Substitute = Callable[[str, int], torch.Tensor]


@dataclass(frozen=True)
class Noise:
    """Power of the error of a component's outputs over the power of the outputs, at each step; outputs averaged."""

    by_step: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the steps."""
        return float(np.mean(self.by_step))

    @property
    def sqnr_db(self) -> list[float | None]:
        """Signal-to-noise ratio of each step in dB; None where there is no noise."""
        return [None if n == 0 else round(float(-10 * np.log10(n)), 2) for n in self.by_step]


def measure_noise(
    module: GraphModule, options: Mapping[str, int], substitute: Substitute, calls: Calls
) -> dict[str, list[Noise]]:
    """Returns the noise of every option of every weight.

    All values of one call are in memory at a time.

    Args:
        module: the component's graph in float.
        options: how many there are of each parameter.
        substitute: makes the values of an option.
        calls: (step, inputs) of the calls to try them on.

    Raises:
        QuantizationError: there are no calls, or outputs of a step are all zero or not finite.
    """
    replay = _Replay(module)
    weights = {
        name: [n for n in module.graph.nodes if n.op == "get_attr" and str(n.target) == name] for name in options
    }
    after = {name: _after(module, nodes) for name, nodes in weights.items()}
    noise: dict[tuple[str, int], dict[int, list[np.ndarray[Any, Any]]]] = defaultdict(lambda: defaultdict(list))
    signal: dict[int, list[np.ndarray[Any, Any]]] = defaultdict(list)
    with torch.no_grad():
        for step, inputs in calls():
            outputs = replay.record(inputs)
            signal[step].append(np.array([_power(y) for y in outputs]))
            for name, count in options.items():
                for i in range(count):
                    changed = replay.again(weights[name], substitute(name, i), after[name])
                    errors = [_power(a - b) for a, b in zip(changed, outputs, strict=True)]
                    noise[name, i][step].append(np.array(errors))
    totals = {step: np.sum(found, axis=0) for step, found in sorted(signal.items())}
    if not totals or not all((total > 0).any() and np.isfinite(total).all() for total in totals.values()):
        raise QuantizationError(
            "there is nothing to measure a weight's damage in, expected outputs that are finite and not all zero",
            hint="calibrate with more samples",
        )
    return {
        name: [Noise(tuple(_relative(noise[name, i][s], totals[s]) for s in totals)) for i in range(count)]
        for name, count in options.items()
    }


def _relative(errors: Iterable[np.ndarray[Any, Any]], total: np.ndarray[Any, Any]) -> float:
    error = np.sum(list(errors), axis=0)
    heard = total > 0
    return float(np.mean(error[heard] / total[heard]))


def _power(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def _after(module: GraphModule, weight: Collection[Node]) -> list[Node]:
    """Returns the nodes to compute again when a weight changes, in order."""
    nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    if any(_writes(node) for node in nodes):
        return [node for node in nodes if node not in weight]  # what was recorded may have been overwritten since
    changed = set(weight)
    for node in nodes:
        if any(source in changed for source in node.all_input_nodes):
            changed.add(node)
    return [node for node in nodes if node in changed and node not in weight]


def _writes(node: Node) -> bool:
    """Returns whether an operation changes one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


class _Replay(Interpreter):
    """Runs a graph once, and parts of it again."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False  # our errors say where on their own
        self._result = next(node for node in module.graph.nodes if node.op == "output")
        self._recorded: dict[Node, Any] = {}

    def record(self, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Returns the outputs of floats, and keeps all values."""
        self.run(*inputs)
        self._recorded = self.env
        return self._outputs()

    def again(self, weight: Iterable[Node], values: torch.Tensor, after: Iterable[Node]) -> list[torch.Tensor]:
        """Returns the outputs with other values of a weight."""
        self.env = {**self._recorded, **dict.fromkeys(weight, values)}
        for node in after:
            self.env[node] = self.run_node(node)
        return self._outputs()

    def _outputs(self) -> list[torch.Tensor]:
        outputs = self.map_nodes_to_values(self._result.args[0], self._result)
        assert isinstance(outputs, (list, tuple))
        return [value for value in outputs if value.is_floating_point()]

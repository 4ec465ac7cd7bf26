"""How much a component's output suffers when one of its weights, or the activations of one operation, lose bits.

Everything is tried alone, on recorded calls of each step; what does not depend on it is computed once for each call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter, Node

from fewstep.calibration.observe import Calls
from fewstep.errors import QuantizationError
from fewstep.optimize.quantize.plan import Grid
from fewstep.optimize.quantize.quantizable_ops import Site

# Values to try in a weight's place, made when they are wanted: (parameter's name, number of the option) -> values.
Substitute = Callable[[str, int], torch.Tensor]

_Key = TypeVar("_Key")
_Outputs = list[torch.Tensor]
_Trial = Callable[["_Replay"], _Outputs]
"""Returns the outputs with something changed."""


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
    trials: dict[tuple[str, int], _Trial] = {}
    for name, count in options.items():
        readers = [n for n in module.graph.nodes if n.op == "get_attr" and str(n.target) == name]
        after = _after(module, readers)

        def trial(replay: _Replay, i: int, name: str = name, readers: Any = readers, after: Any = after) -> _Outputs:
            return replay.again(dict.fromkeys(readers, substitute(name, i)), after)

        trials |= {(name, i): partial(trial, i=i) for i in range(count)}
    noise = _measure(module, trials, calls)
    return {name: [noise[name, i] for i in range(count)] for name, count in options.items()}


def measure_activation_noise(
    module: GraphModule, sites: Iterable[Site], grids: Mapping[str, Grid], calls: Calls
) -> dict[str, Noise]:
    """Returns the noise of every site's activations on their grids, by site name; arguments as for `measure_noise`.

    ``grids`` are of activations, by the name of their node.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    trials: dict[str, _Trial] = {}
    for site in sites:
        operation, result = nodes[site.node], nodes[site.result]
        after = [operation, *_after(module, [operation])]
        data = (nodes[site.data], grids[site.data])
        rounded = (result, grids.get(site.result))
        trials[site.name] = partial(_Replay.on_grids, operation=operation, data=data, result=rounded, after=after)
    return _measure(module, trials, calls)


def _measure(module: GraphModule, trials: Mapping[_Key, _Trial], calls: Calls) -> dict[_Key, Noise]:
    """Returns the noise of the outputs of every trial."""
    replay = _Replay(module)
    noise: dict[_Key, dict[int, list[np.ndarray[Any, Any]]]] = defaultdict(lambda: defaultdict(list))
    signal: dict[int, list[np.ndarray[Any, Any]]] = defaultdict(list)
    with torch.no_grad():
        for step, inputs in calls():
            outputs = replay.record(inputs)
            signal[step].append(np.array([_power(y) for y in outputs]))
            for key, trial in trials.items():
                errors = [_power(a - b) for a, b in zip(trial(replay), outputs, strict=True)]
                noise[key][step].append(np.array(errors))
    totals = {step: np.sum(found, axis=0) for step, found in sorted(signal.items())}
    if not totals or not all((total > 0).any() and np.isfinite(total).all() for total in totals.values()):
        raise QuantizationError(
            "there is nothing to measure damage in, expected outputs that are finite and not all zero",
            hint="calibrate with more samples",
        )
    return {key: Noise(tuple(_relative(noise[key][s], totals[s]) for s in totals)) for key in trials}


def _relative(errors: Iterable[np.ndarray[Any, Any]], total: np.ndarray[Any, Any]) -> float:
    error = np.sum(list(errors), axis=0)
    heard = total > 0
    return float(np.mean(error[heard] / total[heard]))


def _on_grid(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    scale, zero = float(grid.scale[0]), int(grid.zero_point[0])
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, grid.low, grid.high)


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

    def record(self, inputs: tuple[torch.Tensor, ...]) -> _Outputs:
        """Returns the outputs of floats, and keeps all values."""
        self.run(*inputs)
        self._recorded = self.env
        return self._outputs()

    def again(self, values: Mapping[Node, torch.Tensor], after: Iterable[Node]) -> _Outputs:
        """Returns the outputs with other values of some nodes."""
        self.env = {**self._recorded, **values}
        for node in after:
            self.env[node] = self.run_node(node)
        return self._outputs()

    def on_grids(
        self, operation: Node, data: tuple[Node, Grid], result: tuple[Node, Grid | None], after: Iterable[Node]
    ) -> _Outputs:
        """Returns the outputs where one operation, and no other reader, takes its data on a grid.

        ``result`` is the node whose values go onto a grid, None if they do not.
        """
        self.env = dict(self._recorded)
        source, grid = data
        for node in after:
            if node is operation:
                exact = self.env[source]
                self.env[source] = _on_grid(exact, grid)
                self.env[node] = self.run_node(node)
                self.env[source] = exact
            else:
                self.env[node] = self.run_node(node)
            if node is result[0] and result[1] is not None:
                self.env[node] = _on_grid(self.env[node], result[1])
        return self._outputs()

    def _outputs(self) -> _Outputs:
        outputs = self.map_nodes_to_values(self._result.args[0], self._result)
        assert isinstance(outputs, (list, tuple))
        return [value for value in outputs if value.is_floating_point()]

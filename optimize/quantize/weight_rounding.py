"""Rounds the weights of a plan by what their layers see."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule, Node

from fewstep.calibration.observe import Calls
from fewstep.optimize.quantize.attributes import attribute
from fewstep.optimize.quantize.plan import ComponentPlan, Grid
from fewstep.optimize.quantize.qparams import flat, rows_grid
from fewstep.optimize.quantize.quantizable_ops import Site
from fewstep.optimize.rounding.gptq_adaround import adaround, gptq_each
from fewstep.optimize.rounding.hessians import Layer, hessians

# Second moments that are held at once.
_HESSIAN_BYTES = 1 << 30
# A layer's second moments of more inputs than this take longer to gather than all else together.
_MOST_INPUTS = 1 << 13
_LAYERS = ("linear", "matmul", "conv1d", "conv2d")


def round_weights(
    plan: ComponentPlan, module: GraphModule, sites: Iterable[Site], methods: Mapping[str, str], calls: Calls
) -> ComponentPlan:
    """Returns the plan with its weights rounded as asked for.

    Args:
        plan: the component's plan.
        module: its graph in float.
        sites: its sites.
        methods: gptq or adaround, by site name; sites left out stay with the nearest.
        calls: (step, inputs) of the calls that the layers are looked at in.
    """
    grids = {site.weight: [plan.weights[site.weight]] for site in sites if site.weight in plan.weights}
    rounded = {name: found[0] for name, found in round_each(grids, module, sites, methods, calls).items()}
    return replace(plan, rounded={**plan.rounded, **rounded})


def round_each(
    grids: Mapping[str, Sequence[Grid]],
    module: GraphModule,
    sites: Iterable[Site],
    methods: Mapping[str, str],
    calls: Calls,
) -> dict[str, list[npt.NDArray[np.int8]]]:
    """Returns weights as whole numbers, one array for each grid that is given, by parameter name.

    Args:
        grids: of each parameter.
        module: the component's graph in float.
        sites: its sites.
        methods: gptq or adaround, by site name; sites left out, and operations of which neither knows, are not rounded.
        calls: (step, inputs) of the calls that the layers are looked at in.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    chosen = [
        site
        for site in sites
        if site.name in methods
        and site.weight in grids
        and site.op in _LAYERS
        and site.parameters // site.weight_shape[0] <= _MOST_INPUTS
    ]
    rounded = {}
    for batch in _batches(chosen):
        found = hessians(module, {s.name: (layer_of(s, nodes[s.node]), s.data) for s in batch}, calls)
        for site in batch:
            weight = attribute(module, site.weight)
            rows = flat(weight, site.channel_axis)
            wanted = [rows_grid(grid, rows.shape[1]) for grid in grids[site.weight]]
            if methods[site.name] == "gptq":
                made = gptq_each(rows, found[site.name], wanted)
            else:
                made = [adaround(rows, found[site.name], grid) for grid in wanted]
            rounded[site.weight] = [_unflat(q, weight, site.channel_axis) for q in made]
    return rounded


def layer_of(site: Site, node: Node) -> Layer:
    """Returns how a site applies its weight."""
    if site.op in ("linear", "matmul"):
        return Layer()
    kernel = site.weight_shape[2:]

    def each(position: int, default: int) -> tuple[int, ...]:
        value = node.args[position] if len(node.args) > position else default
        return tuple(value) if isinstance(value, (list, tuple)) else (int(value),) * len(kernel)  # type: ignore[arg-type]

    stride, padding, dilation = each(3, 1), each(4, 0), each(5, 1)
    full = len(kernel)
    stride, padding, dilation = (v * full if len(v) == 1 else v for v in (stride, padding, dilation))
    return Layer(kernel, stride, padding, dilation, site.groups)


def _batches(sites: Iterable[Site]) -> Iterator[list[Site]]:
    """Yields sites whose second moments fit in memory together."""
    batch: list[Site] = []
    size = 0
    for site in sites:
        inputs = site.parameters // site.weight_shape[0]
        need = 4 * inputs * inputs * site.groups
        if batch and size + need > _HESSIAN_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(site)
        size += need
    if batch:
        yield batch


def _unflat(integers: torch.Tensor, weight: torch.Tensor, axis: int) -> npt.NDArray[np.int8]:
    shape = weight.movedim(axis, 0).shape
    array: npt.NDArray[np.int8] = integers.reshape(shape).movedim(0, axis).contiguous().numpy()
    return array


def some(calls: Calls, count: int) -> Calls:
    """Returns the first calls."""
    return lambda: itertools.islice(calls(), count)

"""A torchao PT2E quantizer that does what a plan says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.granularity import PerTensor
from torchao.quantization.pt2e.observer import AffineQuantizedObserverBase
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.quant_primitives import MappingType

from fewstep.errors import QuantizationError
from fewstep.optimize.quantize.attributes import attribute
from fewstep.optimize.quantize.plan import ComponentPlan, Grid
from fewstep.optimize.quantize.quantizable_ops import Site

_DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "int32": torch.int32}
_ops = torch.ops.quantized_decomposed


class PlanQuantizer(Quantizer):  # type: ignore[misc]  # torchao has no type information
    """Annotates a graph with the grids of a plan.

    Args:
        plan: the component's plan.
        sites: its sites, from `fewstep.optimize.quantize.find_sites` on the same graph.
        step: name of the graph's node that is the row of the table of steps, for grids that each row has its own of.
    """

    def __init__(self, plan: ComponentPlan, sites: tuple[Site, ...], step: str | None = None) -> None:
        super().__init__()
        self._plan = plan
        self._step = step
        self._sites = {site.node: site for site in sites}

    def annotate(self, model: GraphModule) -> GraphModule:
        """Writes an annotation to every site that the plan quantizes."""
        # One specification for each tensor, however many sites read it: torchao shares what is identical.
        activations = {name: _specification(grid, step=self._step) for name, grid in self._plan.activations.items()}
        nodes = {node.name: node for node in model.graph.nodes}
        for name, site in self._sites.items():
            grid = self._plan.weights.get(site.weight)
            if grid is None:
                continue
            node, reader = nodes[name], nodes[site.reader]
            weight = next(a for a in reader.all_input_nodes if a.op == "get_attr" and a.target == site.weight)
            inputs: dict[Node, QuantizationSpec] = {weight: _constant(grid, self._weight(model, site))}
            output = None
            if site.name in self._plan.computes and site.name not in self._plan.dynamic:
                data = nodes[site.data]
                inputs[data] = activations[site.data]
                bias = next((a for a in node.all_input_nodes if a.op == "get_attr" and a.target == site.bias), None)
                # One for each step would have to be as many biases: it is added in float.
                in_float = self._plan.float_bias or self._plan.activations[site.data].by_row
                if bias is not None and not in_float:
                    inputs[_own(bias, node)] = self._bias(model, site, grid)
                if site.name in self._plan.outputs and site.result == node.name:
                    output = activations[node.name]
                elif site.name in self._plan.outputs:
                    nodes[site.result].meta["quantization_annotation"] = QuantizationAnnotation(
                        output_qspec=activations[site.result], _annotated=True
                    )
            reader.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map=inputs, output_qspec=output, _annotated=True
            )
        return model

    def validate(self, model: GraphModule) -> None:
        """Raises QuantizationError unless every site that the plan quantizes is annotated."""
        nodes = {node.name: node for node in model.graph.nodes}
        for site in self._sites.values():
            if site.weight in self._plan.weights and "quantization_annotation" not in nodes[site.reader].meta:
                raise QuantizationError(f"{site.name} is in the plan and was not annotated")

    def _weight(self, model: GraphModule, site: Site) -> Callable[[], torch.Tensor]:
        """Returns what makes a weight's whole numbers: the plan's own, or the nearest.

        A plain function: torchao copies specifications deeply, and with anything else the model in it.
        """

        def values() -> torch.Tensor:
            rounded = self._plan.rounded.get(site.weight)
            if rounded is not None:
                return torch.from_numpy(rounded)
            return to_integers(attribute(model, site.weight), self._plan.weights[site.weight])

        return values

    def _bias(self, model: GraphModule, site: Site, weight: Grid) -> QuantizationSpec:
        """Returns the specification of a bias: 32 bits, on the grid of the products that it is added to."""
        assert site.bias is not None
        data = self._plan.activations[site.data]
        # In float32, as every backend multiplies the two scales.
        scale = torch.from_numpy(weight.scale) * torch.from_numpy(data.scale)
        values = attribute(model, site.bias)
        scale = scale.expand(values.shape).contiguous() if weight.axis is None else scale
        grid = Grid("int32", -(2**31), 2**31 - 1, scale.numpy(), torch.zeros_like(scale, dtype=torch.int32).numpy(), 0)
        return _constant(grid, lambda: to_integers(values, grid))


def _own(constant: Node, reader: Node) -> Node:
    """Returns the node of a constant that ``reader`` alone reads, in place.

    A layer that is called twice has one bias and two grids for it, and torchao would put both on the first.
    """
    if len(constant.users) == 1:
        return constant
    with reader.graph.inserting_before(reader):
        own = reader.graph.get_attr(str(constant.target))
    own.meta = dict(constant.meta)
    reader.replace_input_with(constant, own)
    return own


def to_integers(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns the nearest whole numbers of a tensor on a grid (ties to even), in the grid's dtype."""
    scale, zero = (spread(torch.from_numpy(a), grid, values.shape) for a in (grid.scale, grid.zero_point))
    q = torch.round(values.double() / scale.double()) + zero
    return q.clamp(grid.low, grid.high).to(_DTYPES[grid.dtype])


def spread(parameters: torch.Tensor, grid: Grid, shape: torch.Size) -> torch.Tensor:
    """Returns scales or zero points as a tensor that broadcasts against one of ``shape``."""
    if grid.axis is None:
        return parameters
    if grid.group_size is None:
        return parameters.reshape([-1 if i == grid.axis else 1 for i in range(len(shape))])
    return parameters.repeat_interleave(grid.group_size, dim=1).reshape(shape)


class _Planned(AffineQuantizedObserverBase):  # type: ignore[misc]
    """Observes nothing: it stands where a tensor goes onto a grid, and puts the operations there when converted."""

    def __init__(self, grid: Grid, constant: Callable[[], torch.Tensor] | None, step: str | None, **_: object) -> None:
        # What torchao adds to the arguments says again what the grid says.
        super().__init__(MappingType.ASYMMETRIC, _DTYPES[grid.dtype], PerTensor(), grid.low, grid.high)
        self._grid = grid
        self._constant = constant
        self._step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns its input."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale and zero point."""
        return torch.from_numpy(self._grid.scale), torch.from_numpy(self._grid.zero_point)

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        """Replaces the observer by quantize and dequantize, or for a constant by its whole numbers and dequantize."""
        graph, source = model.graph, observer_node.args[0]
        assert isinstance(source, Node)
        with graph.inserting_before(_after_inputs(observer_node)):
            if self._constant is None and self._grid.by_row:
                parameters = self._row(model, source.name)
                q = graph.call_function(_ops.quantize_per_tensor.tensor, (source, *parameters))
                q.meta = dict(source.meta)
                result = graph.call_function(_ops.dequantize_per_tensor.tensor, (q, *parameters))
            elif self._constant is None:
                q = graph.call_function(_ops.quantize_per_tensor.default, (source, *self._whole()))
                q.meta = dict(source.meta)
                result = graph.call_function(_ops.dequantize_per_tensor.default, (q, *self._whole()))
            else:
                result = self._dequantized(model, self._constant(), source.name)
            result.meta = dict(source.meta)
        observer_node.replace_all_uses_with(result)
        graph.erase_node(observer_node)

    def _whole(self) -> tuple[float, int, int, int, torch.dtype]:
        """Returns the arguments of the operations on a grid for the whole tensor."""
        g = self._grid
        return float(g.scale[0]), int(g.zero_point[0]), g.low, g.high, _DTYPES[g.dtype]

    def _row(self, model: GraphModule, name: str) -> tuple[Node, Node, int, int, torch.dtype]:
        """Returns the arguments of the operations on the grid of the row that the step names."""
        g, graph = self._grid, model.graph
        step = next((node for node in graph.nodes if node.op == "placeholder" and node.name == self._step), None)
        if step is None:
            raise QuantizationError(f"{name} has a grid for each step, and the graph does not take the step")
        tables = (("scale_table", torch.from_numpy(g.scale)), ("zero_point_table", torch.from_numpy(g.zero_point)))
        scale, zero = (
            graph.call_function(torch.ops.aten.index_select.default, (_get_attr(model, f"{name}_{k}", table), 0, step))
            for k, table in tables
        )
        return scale, zero, g.low, g.high, _DTYPES[g.dtype]

    def _dequantized(self, model: GraphModule, values: torch.Tensor, name: str) -> Node:
        """Returns the node that makes a constant from its whole numbers."""
        g, graph = self._grid, model.graph
        if g.axis is None:
            q = _get_attr(model, f"{name}_quantized", values)
            return graph.call_function(_ops.dequantize_per_tensor.default, (q, *self._whole()))
        # Groups are rows of their own: every backend knows scales along one axis.
        rows = values if g.group_size is None else values.reshape(g.scale.size, -1)
        parts = (
            ("quantized", rows),
            ("scale", torch.from_numpy(g.scale)),
            ("zero_point", torch.from_numpy(g.zero_point)),
        )
        q, scale, zero = (
            _get_attr(model, f"{name}_{part}", tensor if tensor is rows else tensor.flatten()) for part, tensor in parts
        )
        arguments = (q, scale, zero, g.axis, g.low, g.high, _DTYPES[g.dtype])
        result = graph.call_function(_ops.dequantize_per_channel.default, arguments)
        if g.group_size is not None:
            result = graph.call_function(torch.ops.aten.reshape.default, (result, list(values.shape)))
        return result


def _after_inputs(node: Node) -> Node:
    """Returns the node itself, or for one that stands between the inputs of its graph the first that reads it."""
    nodes: list[Node] = list(node.graph.nodes)
    last = max((i for i, other in enumerate(nodes) if other.op == "placeholder"), default=-1)
    if nodes.index(node) > last:
        return node
    return next(other for other in nodes[last + 1 :] if other in node.users)


def _constant(grid: Grid, values: Callable[[], torch.Tensor]) -> QuantizationSpec:
    return _specification(grid, constant=values)


def _specification(
    grid: Grid, *, constant: Callable[[], torch.Tensor] | None = None, step: str | None = None
) -> QuantizationSpec:
    planned = _Planned.with_args(grid=grid, constant=constant, step=step)
    return QuantizationSpec(_DTYPES[grid.dtype], planned, grid.low, grid.high)


def _get_attr(model: GraphModule, name: str, values: torch.Tensor) -> Node:
    model.register_buffer(name, values.contiguous())
    return model.graph.get_attr(name)

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
from fewstep.optimize.quantize.sites import Site

_DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "int32": torch.int32}
_ops = torch.ops.quantized_decomposed


class PlanQuantizer(Quantizer):  # type: ignore[misc]  # torchao has no type information
    """Annotates a graph with the grids of a plan.

    Args:
        plan: the component's plan.
        sites: its sites, from `fewstep.optimize.quantize.find_sites` on the same graph.
    """

    def __init__(self, plan: ComponentPlan, sites: tuple[Site, ...]) -> None:
        super().__init__()
        self._plan = plan
        self._sites = {site.node: site for site in sites}

    def annotate(self, model: GraphModule) -> GraphModule:
        """Writes an annotation to every site that the plan quantizes."""
        # One specification for each tensor, however many sites read it: torchao shares what is identical.
        activations = {name: _activation(grid) for name, grid in self._plan.activations.items()}
        nodes = {node.name: node for node in model.graph.nodes}
        for name, site in self._sites.items():
            grid = self._plan.weights.get(site.weight)
            if grid is None:
                continue
            node, reader = nodes[name], nodes[site.reader]
            weight = next(a for a in reader.all_input_nodes if a.op == "get_attr" and a.target == site.weight)
            inputs: dict[Node, QuantizationSpec] = {weight: _constant(grid, self._weight(model, site))}
            output = None
            if site.name in self._plan.computes:
                data = nodes[site.data]
                inputs[data] = activations[site.data]
                bias = next((a for a in node.all_input_nodes if a.op == "get_attr" and a.target == site.bias), None)
                if bias is not None and not self._plan.float_bias:
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

    def __init__(self, grid: Grid, constant: Callable[[], torch.Tensor] | None, **_: object) -> None:
        # What torchao adds to the arguments says again what the grid says.
        super().__init__(MappingType.ASYMMETRIC, _DTYPES[grid.dtype], PerTensor(), grid.low, grid.high)
        self._grid = grid
        self._constant = constant

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
        with graph.inserting_before(observer_node):
            if self._constant is None:
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


def _activation(grid: Grid) -> QuantizationSpec:
    return _specification(grid, None)


def _constant(grid: Grid, values: Callable[[], torch.Tensor]) -> QuantizationSpec:
    return _specification(grid, values)


def _specification(grid: Grid, constant: Callable[[], torch.Tensor] | None) -> QuantizationSpec:
    return QuantizationSpec(_DTYPES[grid.dtype], _Planned.with_args(grid=grid, constant=constant), grid.low, grid.high)


def _get_attr(model: GraphModule, name: str, values: torch.Tensor) -> Node:
    model.register_buffer(name, values.contiguous())
    return model.graph.get_attr(name)

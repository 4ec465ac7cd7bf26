"""Constants of a graph as converters take them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

_aten = torch.ops.aten
_UNSET = (_aten.empty_like.default, _aten.empty.memory_format, _aten.empty_permuted.default, _aten.new_empty.default)


def own_constants(module: GraphModule) -> None:
    """Gives constants that are views with strides of their own, and those with infinite values, other memory, in place.

    litert-torch copies a transposed view and tells copies apart by their address, which the next copy has again when
    the first is gone: two weights of one shape become the same. What is infinite it makes finite, in the network's own
    memory. ExecuTorch does not find transposed views again.
    """
    for target in {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}:
        *path, name = target.split(".")
        owner: torch.nn.Module = module.get_submodule(".".join(path))
        value = getattr(owner, name)
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_contiguous() and not (value.is_floating_point() and value.isinf().any()):
            continue
        own = value.detach().clone(memory_format=torch.contiguous_format)
        setattr(owner, name, torch.nn.Parameter(own, False) if isinstance(value, torch.nn.Parameter) else own)


def zero_unset(module: GraphModule) -> None:
    """Puts zeros in the place of tensors whose values are still to be written, in place: few runtimes have such."""
    for node in [n for n in module.graph.nodes if n.target in _UNSET]:
        value = node.meta["val"]
        with module.graph.inserting_before(node):
            zeros = module.graph.call_function(_aten.full.default, (list(value.shape), 0), {"dtype": value.dtype})
        zeros.meta = dict(node.meta)
        node.replace_all_uses_with(zeros)
        module.graph.erase_node(node)
    module.recompile()

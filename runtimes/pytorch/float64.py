"""A quantized program computed in float64 between its roundings: a second, equally correct execution of the same graph.

Every operation rounds another way than in float32, and no operation a quantization does not ask for. How far the two
executions are apart is the noise floor: what no comparison with another runtime can get under.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch.fx import GraphModule, Node

from fewstep.bundle.program import Program
from fewstep.runtimes.base import Array, CheckedSession

_ops = torch.ops.quantized_decomposed
_QUANTIZE = (
    _ops.quantize_per_tensor.default,
    _ops.quantize_per_tensor.tensor,
    _ops.quantize_per_channel.default,
    _ops.quantize_per_token.default,
    _ops.choose_qparams_per_token_asymmetric.default,
)
_DEQUANTIZE = (
    _ops.dequantize_per_tensor.default,
    _ops.dequantize_per_tensor.tensor,
    _ops.dequantize_per_channel.default,
    _ops.dequantize_per_token.default,
)


class Double(torch.fx.Interpreter):
    """Interprets a graph with every float32 as a float64, except on the way onto a grid."""

    def run_node(self, n: Node) -> Any:
        """Runs a node."""
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            return result.double()
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Calls an operation: one that asks for float32 gives float64, and quantization gets float32."""
        if target in _QUANTIZE:
            args = (args[0].float(), *args[1:])
        elif target not in _DEQUANTIZE:
            args, kwargs = torch.utils._pytree.tree_map(_widened, (args, kwargs))
        else:
            args = tuple(a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.float64 else a for a in args)
        return super().call_function(target, args, kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class _DoubleSession:
    def __init__(self, program: Program) -> None:
        module = program.exported.module()
        assert isinstance(module, GraphModule)
        self._interpreter: Double | None = Double(module)
        self._inputs = [spec.name for spec in program.spec.inputs]
        self._outputs = program.spec.outputs

    @torch.no_grad()
    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name, rounded to their own types."""
        assert self._interpreter is not None, "the session is closed"
        results = self._interpreter.run(*(torch.from_numpy(feeds[name]) for name in self._inputs))
        return {
            spec.name: result.numpy().astype(np.dtype(spec.dtype))
            for spec, result in zip(self._outputs, results, strict=True)
        }

    def close(self) -> None:
        """Drops the module."""
        self._interpreter = None


def open_double(program: Program) -> CheckedSession:
    """Returns a session that runs a traced program in PyTorch, in float64 between quantizations."""
    return CheckedSession(program.component, program.spec, _DoubleSession(program))

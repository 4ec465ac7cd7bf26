"""PyTorch as a runtime: sessions on a generator's traced programs, behind the same interface as every backend."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewstep.bundle.program import Program
from fewstep.runtimes.base import Array, CheckedSession


class _TorchSession:
    def __init__(self, program: Program) -> None:
        self._module: torch.nn.Module | None = program.exported.module()
        self._inputs = [spec.name for spec in program.spec.inputs]
        self._outputs = [spec.name for spec in program.spec.outputs]

    @torch.no_grad()
    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        assert self._module is not None, "the session is closed"
        # Copies: recorded feeds may be read-only, and a network may write to its inputs.
        results = self._module(*(torch.tensor(feeds[name]) for name in self._inputs))
        return {name: result.numpy() for name, result in zip(self._outputs, results, strict=True)}

    def close(self) -> None:
        """Drops the module."""
        self._module = None


def open_program(program: Program) -> CheckedSession:
    """Returns a session that runs a traced program in PyTorch."""
    return CheckedSession(program.component, program.spec, _TorchSession(program))

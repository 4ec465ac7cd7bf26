"""Runs ``.pte`` programs with ExecuTorch's Python bindings, which take torch tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.bundle.contract import ComponentSpec, TensorSpec
from fewstep.errors import ContractError
from fewstep.runtimes.base import Array, CheckedSession

# The method that a module is exported as.
METHOD = "forward"
# ScalarType of c10, as the bindings give it.
_DTYPES = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool"}


def open_program(path: Path, spec: ComponentSpec, threads: int | None) -> CheckedSession:
    """Returns a session on a ``.pte`` file: see `fewstep.runtimes.executorch.runtime.open_session`."""
    try:
        loaded = load(path.read_bytes(), threads)
    except (RuntimeError, ValueError) as error:
        raise ContractError(f"{path}: ExecuTorch cannot load it: {error}", hint="build the bundle again") from error
    return CheckedSession(path.parent.name, spec, _Session(path, loaded, spec))


@dataclass(frozen=True, eq=False)
class Loaded:
    """A method with the program whose memory it reads and does not keep."""

    program: Any
    method: Any


def load(content: bytes, threads: int | None = None) -> Loaded:
    """Returns the method of a program's bytes; ``threads`` as in `fewstep.runtimes.executorch.runtime.open_session`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bindings call themselves experimental
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        if threads is not None:
            portable_lib._unsafe_reset_threadpool(threads)
        program = Runtime.get().load_program(content)
        return Loaded(program, program.load_method(METHOD))


class _Session:
    def __init__(self, path: Path, loaded: Loaded, spec: ComponentSpec) -> None:
        if loaded.method is None:
            raise ContractError(f"{path}: program has no method {METHOD!r}", hint="build the bundle again")
        self._path = path
        self._loaded: Loaded | None = loaded
        self._inputs, self._outputs = spec.inputs, spec.outputs
        meta = loaded.method.metadata
        _check(path, [meta.input_tensor_meta(i) for i in range(meta.num_inputs())], spec.inputs, "inputs")
        _check(path, [meta.output_tensor_meta(i) for i in range(meta.num_outputs())], spec.outputs, "outputs")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        if self._loaded is None:
            raise ContractError("the session is closed")
        given = [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in self._inputs]
        try:
            results = self._loaded.method.execute(given)
        except RuntimeError as error:
            raise ContractError(
                f"{self._path}: ExecuTorch cannot run it: {error}", hint="what it wrote to stderr names the operation"
            ) from error
        # The method's own memory, which its next call overwrites.
        return {spec.name: result.numpy().copy() for spec, result in zip(self._outputs, results, strict=True)}

    def close(self) -> None:
        """Drops the method and with it the program's memory."""
        self._loaded = None


def _check(path: Path, given: Sequence[Any], expected: Sequence[TensorSpec], what: str) -> None:
    if len(given) != len(expected):
        raise ContractError(
            f"{path}: program has {len(given)} {what}, the manifest has {len(expected)}", hint="build the bundle again"
        )
    for found, spec in zip(given, expected, strict=True):
        dtype = _DTYPES.get(int(found.dtype()), f"type {int(found.dtype())}")
        spec.check(tuple(found.sizes()), np.dtype(dtype).name if dtype in _DTYPES.values() else dtype, str(path))

"""LiteRT: opens the bundle's ``.tflite`` models on the CPU, with XNNPACK's kernels where it has some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.bundle.contract import ComponentSpec, TensorSpec
from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.errors import ContractError, RuntimeMissingError
from fewstep.runtimes.base import Array, Availability, CheckedSession, PointResult, RunModel, Runtime
from fewstep.runtimes.sampling.int32_feeds import narrow

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter

NAME = "litert"
SIGNATURE = "serving_default"
_COMPILER_PACKAGES = ("torch", "litert_torch")
_INSTALL = "pip install 'fewstep[litert]' in an environment of its own: its converter wants older typing_extensions"


def availability() -> Availability:
    """Returns whether LiteRT models can be made and run here."""
    missing = [name for name in _COMPILER_PACKAGES if util.find_spec(name) is None]
    installed = util.find_spec("ai_edge_litert") is not None
    remedies = ([] if installed else ["pip install ai-edge-litert"]) + ([_INSTALL] if missing else [])
    detail = "CPU, XNNPACK" if installed else "ai-edge-litert is not installed"
    if missing:
        detail += f"; cannot compile without {', '.join(missing)}"
    version = metadata.version("ai-edge-litert") if installed else None
    remedy = _INSTALL if missing else " and ".join(remedies) or None
    return Availability(NAME, installed and not missing, installed, version, detail, remedy)


def open_session(path: Path, spec: ComponentSpec, threads: int | None = None) -> CheckedSession:
    """Returns a session on a ``.tflite`` file, whose inputs and outputs must be those of the manifest.

    Args:
        path: the ``model.tflite``.
        spec: what the manifest says of the component.
        threads: threads inside an op; None leaves the choice to LiteRT.

    Raises:
        RuntimeMissingError: ai-edge-litert is not installed.
        ContractError: the model cannot be loaded, or its inputs or outputs are not those of the manifest.
    """
    if util.find_spec("ai_edge_litert") is None:
        raise RuntimeMissingError("ai-edge-litert is not installed", hint="pip install ai-edge-litert")
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ContractError(f"{path}: LiteRT cannot load it: {error}", hint="build the bundle again") from error
    session = _LiteRTSession(path, interpreter, spec)
    return CheckedSession(path.parent.name, spec, session)


class _LiteRTSession:
    def __init__(self, path: Path, interpreter: Interpreter, spec: ComponentSpec) -> None:
        if SIGNATURE not in interpreter.get_signature_list():
            raise ContractError(f"{path}: model has no signature {SIGNATURE!r}", hint="build the bundle again")
        self._interpreter: Interpreter | None = interpreter
        self._run = interpreter.get_signature_runner(SIGNATURE)
        self._outputs = {output.name: np.dtype(output.dtype) for output in spec.outputs}
        _check_contract(path, self._run.get_input_details(), spec.inputs)
        _check_contract(path, self._run.get_output_details(), spec.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        if self._interpreter is None:
            raise ContractError("the session is closed")
        results = self._run(**narrow(feeds, "LiteRT"))
        return {name: results[name].astype(dtype, copy=False) for name, dtype in self._outputs.items()}

    def close(self) -> None:
        """Drops the interpreter and with it the model's memory."""
        self._interpreter = self._run = None


def _check_contract(path: Path, given: Mapping[str, Any], expected: Sequence[TensorSpec]) -> None:
    wanted = sorted(spec.name for spec in expected)
    if sorted(given) != wanted:
        raise ContractError(f"{path}: model has {sorted(given)}, the manifest has {wanted}", hint="build it again")
    for spec in expected:
        found = given[spec.name]
        dtype = np.dtype("int32" if spec.dtype == "int64" else spec.dtype).name
        TensorSpec(spec.name, dtype, spec.shape).check(
            tuple(int(size) for size in found["shape"]), np.dtype(found["dtype"]).name, str(path)
        )


def _compile(program: Program, folder: Path, weights: str) -> Artifact:
    from fewstep.runtimes.litert.compile import lower as litert_lower  # needs torch, which running a bundle does not

    return litert_lower.lower(program, folder, weights)


def _compare_integers(program: Program, path: Path, feeds: Mapping[str, Array]) -> list[PointResult]:
    from fewstep.runtimes.litert.debug import compare_tensors as litert_points  # as above

    return litert_points.compare_integers(program, path, feeds)


def _compare_integers_at(program: Program, path: Path, feeds: Mapping[str, Array], run: RunModel) -> list[PointResult]:
    from fewstep.runtimes.litert.debug import compare_tensors as litert_points  # as above

    return litert_points.compare_integers(program, path, feeds, run)


RUNTIME = Runtime(NAME, availability, _compile, open_session, _compare_integers, _compare_integers_at)

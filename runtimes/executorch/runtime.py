"""ExecuTorch: opens the bundle's ``.pte`` programs, whose operations XNNPACK computes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path

from fewstep.bundle.contract import ComponentSpec
from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.errors import RuntimeMissingError
from fewstep.runtimes.base import Array, Availability, CheckedSession, PointResult, Runtime

NAME = "executorch"
# Its Python bindings take and give torch tensors, so running takes torch too; on a phone it does not.
_PACKAGES = ("torch", "executorch")
_INSTALL = "pip install 'fewstep[executorch]'"


def availability() -> Availability:
    """Returns whether ExecuTorch programs can be made and run here."""
    missing = [name for name in _PACKAGES if util.find_spec(name) is None]
    ready = not missing
    version = metadata.version("executorch") if util.find_spec("executorch") is not None else None
    detail = "CPU, XNNPACK" if ready else f"{' and '.join(missing)} not installed"
    return Availability(NAME, ready, ready, version, detail, None if ready else _INSTALL)


def open_session(path: Path, spec: ComponentSpec, threads: int | None = None) -> CheckedSession:
    """Returns a session on a ``.pte`` file, whose inputs and outputs must be those of the manifest.

    Args:
        path: the ``model.pte``.
        spec: what the manifest says of the component.
        threads: for the whole process, whose programs share one pool; None leaves the choice to ExecuTorch.

    Raises:
        RuntimeMissingError: executorch or torch is not installed.
        ContractError: the program cannot be loaded, or its inputs or outputs are not those of the manifest.
    """
    state = availability()
    if not state.runs:
        raise RuntimeMissingError(f"ExecuTorch cannot run here: {state.detail}", hint=state.remedy)
    from fewstep.runtimes.executorch import session as xnnpack_session

    return xnnpack_session.open_program(path, spec, threads)


def _compile(program: Program, folder: Path, weights: str) -> Artifact:
    from fewstep.runtimes.executorch.compile import lower as xnnpack_lower

    return xnnpack_lower.lower(program, folder, weights)


def _compare_integers(program: Program, path: Path, feeds: Mapping[str, Array]) -> list[PointResult]:
    from fewstep.runtimes.executorch.debug import compare_tensors as xnnpack_points

    return xnnpack_points.compare_integers(program, path, feeds)


RUNTIME = Runtime(NAME, availability, _compile, open_session, _compare_integers)

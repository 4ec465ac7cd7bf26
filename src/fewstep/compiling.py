"""Compiles components from their folders, each in a process of its own that never holds the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import ExportError
from fewstep.isolated import Measured, run_isolated
from fewstep.manifest import Artifact

if TYPE_CHECKING:
    from fewstep.export.generator import Part

_TENSOR = "tensor"


@dataclass(frozen=True)
class StoredComponent:
    """A component of a diffusers folder, and what its pipeline gives to it: of tensors only dtype and shape count."""

    name: str
    folder: Path
    part: Part
    arguments: Mapping[str, Any]


def compile_stored(component: StoredComponent, runtime: str, out: Path, weights: str) -> tuple[Artifact, Measured]:
    """Returns the artifact of a component and what making it took.

    Args:
        component: where it is and how it is called.
        runtime: the name of the runtime to compile for.
        out: the bundle's folder for that runtime.
        weights: ``fp32`` or ``fp16``; fp16 rounds.

    Raises:
        SourceError: its folder is incomplete or damaged.
        ExportError: it cannot be traced or lowered, a weight does not fit, or the process was killed.
    """
    job = {
        "name": component.name,
        "folder": str(component.folder),
        "part": asdict(component.part),
        "arguments": _described(component.arguments, component.name),
        "runtime": runtime,
        "out": str(out),
        "weights": weights,
    }
    measured = run_isolated(_compile, job)
    return Artifact(**measured.result), measured


def _compile(
    name: str, folder: str, part: dict[str, str], arguments: dict[str, Any], runtime: str, out: str, weights: str
) -> dict[str, Any]:
    from fewstep.export.fake_trace import stored_program
    from fewstep.export.generator import Part
    from fewstep.runtimes import get_runtime

    program = stored_program(Path(folder), name, Part(**part), _on_meta(arguments))
    return asdict(get_runtime(runtime).compile(program, Path(out), weights))


def _described(value: Any, where: str) -> Any:
    """Returns arguments as JSON; a tensor is ``{"tensor": [dtype, shape]}``."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {name: _described(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(item, f"{where}.{i}") for i, item in enumerate(value)]
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    raise ExportError(
        f"{where} is a {type(value).__name__}, expected a tensor, a number, a text or a container of them",
        hint="compile this component from the loaded generator",
    )


def _on_meta(value: Any) -> Any:
    import torch

    if isinstance(value, list):
        return [_on_meta(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        dtype, shape = value[_TENSOR]
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    return {name: _on_meta(item) for name, item in value.items()}

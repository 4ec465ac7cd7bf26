"""Small MIL programs, written by coremltools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fewstep.runtimes.coreml.compile.lower import quiet_coremltools

with quiet_coremltools() as ct:
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program

__all__ = ["ct", "mb", "save_program"]


def save_program(
    path: Path, inputs: Mapping[str, tuple[int, ...]], build: Callable[..., Any], *, fp16: bool = False
) -> Path:
    """Returns ``path``, at which a package is written that computes what ``build`` builds from fp32 inputs."""
    program = Program()
    with quiet_coremltools():
        placeholders = {name: mb.placeholder(shape) for name, shape in inputs.items()}
        with Function(placeholders, ct.target.iOS18) as function:
            function.set_outputs([build(**function.inputs)])
        program.add_function("main", function)
        model = ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            compute_precision=ct.precision.FLOAT16 if fp16 else ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        model.save(str(path))
    return path

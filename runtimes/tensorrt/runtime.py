"""TensorRT: engines for NVIDIA GPUs, of strongly typed networks.

Bundles carry ONNX and what builds an engine of it: an engine fits one kind of GPU and one version of TensorRT, so it is
built where it runs and kept in the user's cache folder. Where TensorRT is not, the model is linted by its rules and its
numbers are checked in ONNX Runtime, which takes every Q/DQ literally; that no engine was built is said wherever results
are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module, metadata, util
from pathlib import Path

from fewstep.bundle.contract import ComponentSpec
from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.disk import scratch
from fewstep.errors import RuntimeMissingError
from fewstep.runtimes.base import Array, Availability, CheckedSession, PointResult, Runtime
from fewstep.runtimes.onnxruntime import onnx_file
from fewstep.runtimes.onnxruntime import runtime as ort
from fewstep.runtimes.tensorrt.cudart import Cuda

NAME = "tensorrt"
STAND_IN = "ONNX Runtime"
# Of the network: ONNX Runtime would compute neighbouring grids as one operation, which rounds differently.
_LITERAL = {"session.disable_quant_qdq": "1"}


@cache
def missing() -> str | None:
    """Returns why no engine can be built and run here, None if one can."""
    if util.find_spec("tensorrt") is None:
        return "tensorrt is not installed"
    try:
        import_module("tensorrt")
    except (ImportError, OSError, RuntimeError) as error:
        return f"tensorrt cannot be loaded ({str(error).splitlines()[0]})"
    try:
        Cuda()
    except RuntimeMissingError as error:
        return error.message
    return None


def availability() -> Availability:
    """Returns whether engines can be built and run here; without, whether models can be compiled and checked."""
    compiler = ort.availability()
    why = missing()
    version = metadata.version("tensorrt") if util.find_spec("tensorrt") is not None else None
    if why is None:
        return Availability(NAME, compiler.compiles, True, version, executor(), compiler.remedy)
    detail = f"no engine is built here: {why}; compiles ONNX and the script that builds engines"
    remedies = [compiler.remedy] if compiler.remedy else []
    remedies.append("pip install 'fewstep[tensorrt]' on a machine with an NVIDIA GPU")
    return Availability(
        NAME,
        compiler.compiles,
        False,
        version,
        detail,
        " and ".join(remedies),
        stand_in=STAND_IN if compiler.runs else None,
    )


def executor() -> str:
    """Returns what computes artifacts here, for reports."""
    why = missing()
    if why is not None:
        return f"{STAND_IN}, Q/DQ taken literally (no TensorRT engine was built: {why})"
    from fewstep.runtimes.tensorrt.engine import gpu_name

    return f"TensorRT {metadata.version('tensorrt')} on {gpu_name()}"


def open_session(path: Path, spec: ComponentSpec, threads: int | None = None) -> CheckedSession:
    """Returns a session on an engine, or on ONNX Runtime where there is no TensorRT.

    Args:
        path: the ``model.onnx``.
        spec: what the manifest says of the component.
        threads: of ONNX Runtime.

    Raises:
        ContractError: the model or engine cannot be loaded, or is not what the manifest says.
        ExportError: TensorRT refuses the model.
    """
    if missing() is not None:
        return ort.open_session(path, spec, threads, settings=_LITERAL)
    from fewstep.runtimes.tensorrt.engine import EngineSession, engine_of

    return CheckedSession(path.parent.name, spec, EngineSession(engine_of(path), spec))


def open_exact(path: Path, spec: ComponentSpec, threads: int | None = None) -> CheckedSession:
    """Returns a session that computes a network of halves in single precision, and others as `open_session` does."""
    from fewstep.runtimes.tensorrt.compile.half_precision import in_halves, write_single

    if not in_halves(path):
        return open_session(path, spec, threads)
    with scratch() as folder:
        single = Path(folder) / path.parent.name / path.name
        single.parent.mkdir()
        write_single(path, single)
        return ort.open_session(single, spec, threads, settings=_LITERAL)


def _compile(program: Program, folder: Path, weights: str) -> Artifact:
    from fewstep.runtimes.tensorrt.compile import (
        lower as tensorrt_lower,  # needs torch, which running a bundle does not
    )

    return tensorrt_lower.lower(program, folder, weights)


def _compare_integers(program: Program, path: Path, feeds: Mapping[str, Array]) -> list[PointResult]:
    """Compares what the network says, in ONNX Runtime: an engine shows nothing of what is inside its kernels."""
    from fewstep.runtimes.onnxruntime.debug import compare_tensors as ort_points

    def run(model: Path, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        return ort_points.run_here(model, inputs, outputs, settings=_LITERAL)

    return ort_points.compare_integers(program, path, feeds, run)


RUNTIME = Runtime(
    NAME,
    availability,
    _compile,
    open_session,
    _compare_integers,
    open_exact=open_exact,
    executor=executor,
    stored=onnx_file.stored,
)

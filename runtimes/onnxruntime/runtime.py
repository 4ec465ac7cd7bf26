"""ONNX Runtime: opens the bundle's ONNX models on the CPU provider."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.bundle.contract import ComponentSpec, TensorSpec
from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.disk import scratch
from fewstep.errors import ContractError, RuntimeMissingError
from fewstep.runtimes.base import (
    Array,
    Availability,
    CheckedSession,
    OpenLoop,
    PointResult,
    RunModel,
    Runtime,
    SingleFile,
)
from fewstep.runtimes.onnxruntime import onnx_file

if TYPE_CHECKING:
    import onnxruntime

    from fewstep.bundle.bundle import Bundle

NAME = "onnxruntime"
# Processors with AVX2 and without VNNI add two products of unsigned by signed bytes in 16 bits, where they saturate:
# one integer in thirty was off, by up to 17. With this setting ONNX Runtime takes other kernels there.
EXACT_PRODUCTS = ("session.x64quantprecision", "1")
_COMPILER_PACKAGES = ("torch", "onnx", "onnxscript")
_NUMPY_NAMES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}


def availability() -> Availability:
    """Returns whether ONNX Runtime models can be made and run here."""
    missing = [name for name in _COMPILER_PACKAGES if util.find_spec(name) is None]
    installed = util.find_spec("onnxruntime") is not None
    remedies = ([] if installed else ["pip install 'fewstep[onnxruntime]'"]) + (
        ["pip install 'fewstep[compile]'"] if missing else []
    )
    detail = "CPU provider" if installed else "onnxruntime is not installed"
    if missing:
        detail += f"; cannot compile without {', '.join(missing)}"
    version = metadata.version("onnxruntime") if installed else None
    return Availability(NAME, installed and not missing, installed, version, detail, " and ".join(remedies) or None)


def open_session(
    path: Path,
    spec: ComponentSpec,
    threads: int | None = None,
    *,
    mapped: bool = False,
    settings: Mapping[str, str] | None = None,
) -> CheckedSession:
    """Returns a session on an ONNX file, whose inputs and outputs must be those of the manifest.

    Args:
        path: the ``model.onnx``.
        spec: what the manifest says of the component.
        threads: threads inside an op; None leaves the choice to ONNX Runtime.
        mapped: compute with weights as they lie in the file of external data, which the system maps into memory once
            for all graphs that refer to it, and share the memory of what is in between. Otherwise every session packs
            copies of its weights for its kernels, which are faster then.
        settings: further settings of the session, by ONNX Runtime's names.

    Raises:
        RuntimeMissingError: onnxruntime is not installed.
        ContractError: the model cannot be loaded, or its inputs or outputs are not those of the manifest.
    """
    if util.find_spec("onnxruntime") is None:
        raise RuntimeMissingError("onnxruntime is not installed", hint="pip install 'fewstep[onnxruntime]'")
    import onnxruntime

    options = session_options(threads, mapped=mapped, path=path)
    for name, value in (settings or {}).items():
        options.add_session_config_entry(name, value)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception classes are private and many
        raise ContractError(f"{path}: ONNX Runtime cannot load it: {error}", hint="build the bundle again") from error
    for given, expected in ((session.get_inputs(), spec.inputs), (session.get_outputs(), spec.outputs)):
        _check_contract(path, given, expected)
    return CheckedSession(path.parent.name, spec, _OrtSession(session))


def session_options(
    threads: int | None, *, mapped: bool = False, path: Path | None = None
) -> onnxruntime.SessionOptions:
    """Returns the options of `open_session`; ``path`` of the model, which says how it multiplies."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in ({} if path is None else session_settings(path)).items():
        options.add_session_config_entry(name, value)
    if threads is not None:
        options.intra_op_num_threads = threads
    if mapped:
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.disable_prepacking", "1")
        # The level above lays the weights of convolutions out anew.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return options


def session_settings(path: Path) -> dict[str, str]:
    """Returns the settings of a session that computes a model's integers exactly, by ONNX Runtime's names."""
    # ONNX Runtime fails with them where both factors are signed.
    return dict([EXACT_PRODUCTS]) if path.is_file() and onnx_file.multiplies_unsigned(path) else {}


@functools.cache
def _share_arena() -> None:
    """Makes one arena that sessions can share for what they compute."""
    import onnxruntime

    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    where = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(where, None)


class _OrtSession:
    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        if self._session is None:
            raise ContractError("the session is closed")
        try:
            outputs = self._session.run(self._outputs, dict(feeds))
        except Exception as error:  # onnxruntime's exception classes are private and many
            raise ContractError(
                f"ONNX Runtime stopped: {error}", hint="are the bundle's tokenizers and networks of one build?"
            ) from error
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        """Drops the session and with it the model's memory."""
        self._session = None


def _check_contract(path: Path, given: list[Any], expected: tuple[TensorSpec, ...]) -> None:
    names, wanted = [g.name for g in given], [e.name for e in expected]
    if names != wanted:
        raise ContractError(f"{path}: model has {names}, the manifest has {wanted}", hint="build the bundle again")
    for value, spec in zip(given, expected, strict=True):
        dtype = _NUMPY_NAMES.get(value.type, value.type.removeprefix("tensor(").removesuffix(")"))
        spec.check(tuple(value.shape), dtype, str(path))


def _compile(program: Program, folder: Path, weights: str) -> Artifact:
    from fewstep.runtimes.onnxruntime.compile import lower as ort_lower  # needs torch, which running a bundle does not

    return ort_lower.lower(program, folder, weights)


def _compile_variants(programs: Iterable[Program], folder: Path, weights: str) -> list[Artifact]:
    from fewstep.runtimes.onnxruntime.compile import lower as ort_lower  # as above

    return ort_lower.lower_variants(programs, folder, weights)


def _compare_integers(program: Program, path: Path, feeds: Mapping[str, Array]) -> list[PointResult]:
    from fewstep.runtimes.onnxruntime.debug import compare_tensors as ort_points

    return ort_points.compare_integers(program, path, feeds)


def _compare_integers_at(program: Program, path: Path, feeds: Mapping[str, Array], run: RunModel) -> list[PointResult]:
    from fewstep.runtimes.onnxruntime.debug import compare_tensors as ort_points

    return ort_points.compare_integers(program, path, feeds, run)


def _run_cut(
    path: Path, feeds: Mapping[str, Array], given: Mapping[str, Array], wanted: Sequence[str]
) -> dict[str, Array]:
    import onnxruntime

    cut = onnx_file.Cut(given, tuple(wanted))
    with scratch() as folder:
        target = cut.write(path, Path(folder))
        session = onnxruntime.InferenceSession(
            str(target), session_options(None, path=path), providers=["CPUExecutionProvider"]
        )
        results = session.run([cut.stored_name(path, name) for name in wanted], {**feeds, **cut.feeds()})
    return dict(zip(wanted, results, strict=True))


def _write_loop(bundle: Bundle, path: Path, steps: int) -> Path:
    from fewstep.runtimes.onnxruntime.compile import single_file  # needs onnx_ir, which running a bundle does not

    return single_file.write_loop(bundle, path, runtime=NAME, steps=steps)


def _open_loop(path: Path) -> OpenLoop:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(path), session_options(None, path=path), providers=["CPUExecutionProvider"]
    )
    shapes = {value.name: value.shape for value in session.get_inputs()}
    return OpenLoop(shapes, lambda feeds: session.run(None, dict(feeds))[0])


RUNTIME = Runtime(
    NAME,
    availability,
    _compile,
    open_session,
    _compare_integers,
    _compare_integers_at,
    compile_variants=_compile_variants,
    open_mapped=functools.partial(open_session, mapped=True),
    stored=onnx_file.stored,
    run_cut=_run_cut,
    session_settings=session_settings,
    single_file=SingleFile(_write_loop, _open_loop),
)

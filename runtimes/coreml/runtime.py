"""Core ML: opens the bundle's ``.mlpackage`` folders, with Core ML itself on macOS and with our evaluator elsewhere."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.bundle.contract import ComponentSpec, OutputSpec, TensorSpec
from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.errors import BundleError, ContractError, RuntimeMissingError
from fewstep.numerics.outputs import from_levels
from fewstep.runtimes.base import (
    Array,
    Availability,
    CheckedSession,
    OpenLoop,
    PointResult,
    Runtime,
    SingleFile,
    Stored,
)
from fewstep.runtimes.coreml.image_outputs import Unrounded, fits, from_metadata, image_features
from fewstep.runtimes.coreml.mil import Evaluator, MilProgram, Precision, open_package
from fewstep.runtimes.coreml.mil.program import Block, Feature
from fewstep.runtimes.sampling.int32_feeds import narrow

if TYPE_CHECKING:
    from fewstep.bundle.bundle import Bundle

NAME = "coreml"
# The file of a package that the manifest of a bundle lists as its artifact: a package is a folder.
ENTRY = "Manifest.json"
_PACKAGE = ".mlpackage"
COMPUTE_UNITS = ("ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE")
_COMPILER_PACKAGES = ("torch", "coremltools")
# Core ML has no 64-bit whole numbers at its interface.
_INTERFACE = {"int64": "int32", "bool": "int32"}


def availability() -> Availability:
    """Returns whether packages can be made here; they can be evaluated anywhere."""
    missing = [name for name in _COMPILER_PACKAGES if util.find_spec(name) is None]
    version = metadata.version("coremltools") if util.find_spec("coremltools") is not None else None
    detail = executor()
    if missing:
        detail += f"; cannot compile without {', '.join(missing)}"
    return Availability(NAME, not missing, True, version, detail, "pip install 'fewstep[coreml]'" if missing else None)


def runs_core_ml() -> bool:
    """Returns whether Core ML itself runs packages here."""
    return platform.system() == "Darwin" and util.find_spec("coremltools") is not None


def executor() -> str:
    """Returns what runs packages here, for reports."""
    if runs_core_ml():
        return f"Core ML on macOS {platform.mac_ver()[0]}"
    return "MIL evaluator, fp16 results rounded (Core ML itself runs on macOS only)"


def open_session(
    path: Path, spec: ComponentSpec, threads: int | None = None, *, function: str | None = None
) -> CheckedSession:
    """Returns a session on a package as it ships: Core ML itself on macOS, else the evaluator rounding to fp16.

    Args:
        path: the package's ``Manifest.json``.
        spec: what the manifest says of the component.
        threads: refused on macOS, where Core ML chooses; ignored by the evaluator, whose BLAS has been told by now.
        function: of the package; None takes its default one.

    Raises:
        BundleError: the package is damaged or of a newer specification.
        ContractError: its inputs or outputs are not those of the manifest, it has no such function, or an operation
            that the evaluator does not know.
    """
    if runs_core_ml():
        return open_core_ml(path, spec, function=function)
    return open_evaluator(path, spec, "fp16", function=function)


def open_exact(
    path: Path, spec: ComponentSpec, threads: int | None = None, *, function: str | None = None
) -> CheckedSession:
    """Returns a session that evaluates a package with fp32 arithmetic: what is left is what conversion changed.

    Where the package gives an image, the session gives what it was before it was rounded to levels.
    """
    return open_evaluator(path, spec, "fp32", function=function)


def open_evaluator(
    path: Path, spec: ComponentSpec, precision: Precision, *, function: str | None = None
) -> CheckedSession:
    """Returns a session on our evaluator; with fp16 precision, images have the levels that the package gives."""
    package = path.parent
    program = open_package(package, function)
    _check_contract(package, program, spec)
    return CheckedSession(package.stem, spec, _EvaluatorSession(program, precision, spec))


def open_core_ml(
    path: Path, spec: ComponentSpec, compute_units: str = "ALL", *, function: str | None = None
) -> CheckedSession:
    """Returns a session on Core ML itself.

    Args:
        path: the package's ``Manifest.json``.
        spec: what the manifest says of the component.
        compute_units: one of `COMPUTE_UNITS`.
        function: of the package; None takes its default one.

    Raises:
        RuntimeMissingError: this is not macOS, or coremltools is not installed.
        ContractError: unknown compute units, a package that Core ML refuses, no such function, or another interface
            than the manifest's.
    """
    if compute_units not in COMPUTE_UNITS:
        raise ContractError(
            f"unknown compute units {compute_units!r}, expected one of {', '.join(COMPUTE_UNITS)}",
            hint="ALL lets Core ML choose",
        )
    if not runs_core_ml():
        raise RuntimeMissingError(
            "Core ML runs on macOS with coremltools only", hint="elsewhere packages are evaluated: open_evaluator"
        )
    import coremltools

    package = path.parent
    program = open_package(package, function)
    _check_contract(package, program, spec)
    units = coremltools.ComputeUnit[compute_units]
    try:
        model = coremltools.models.MLModel(str(package), compute_units=units, function_name=function)
    except Exception as error:  # Core ML's errors arrive as RuntimeError and as plain Exception
        raise ContractError(f"{package}: Core ML cannot load it: {error}", hint="build the bundle again") from error
    return CheckedSession(package.stem, spec, _CoreMLSession(model, spec, _pictures(program)))


def interface_name(name: str) -> str:
    """Returns what a package calls an input or output: Core ML's names have letters, digits and underscores."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def function_name(variant: str) -> str:
    """Returns what a package calls the function of a component's variant: ``row_1``, ``main_512x768``."""
    name = interface_name(variant)
    return name if name and name[0].isalpha() else f"main_{name}".removesuffix("_")


def to_interface(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Returns inputs by the names and in the types that Core ML has at its interface.

    Raises:
        ContractError: a whole number does not fit in 32 bits.
    """
    found = {}
    for name, array in narrow(feeds, "Core ML").items():
        dtype = _INTERFACE.get(str(array.dtype), str(array.dtype))
        found[interface_name(name)] = array.astype(dtype)
    return found


def _pictures(program: MilProgram) -> dict[str, OutputSpec]:
    """Returns how the levels of a package's images and its component's outputs belong together, by their names."""
    return {feature.name: from_metadata(program, feature.name) for feature in image_features(program)}


class _EvaluatorSession:
    def __init__(self, program: MilProgram, precision: Precision, spec: ComponentSpec) -> None:
        self._evaluator: Evaluator | None = Evaluator(program, precision=precision)
        self._outputs = {output.name: output.dtype for output in spec.outputs}
        self._pictures = _pictures(program)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        if self._evaluator is None:
            raise ContractError("the session is closed")
        unrounded = Unrounded(self._evaluator.program)
        results = self._evaluator.run(to_interface(feeds), observe=unrounded if self._pictures else None)
        for name, picture in self._pictures.items():
            exact = self._evaluator.precision == "fp32"
            results[name] = unrounded.values[name] if exact else from_levels(results[name], picture)
        return {name: results[interface_name(name)].astype(dtype) for name, dtype in self._outputs.items()}

    def close(self) -> None:
        """Drops the program."""
        self._evaluator = None


class _CoreMLSession:
    """Works with whatever has ``predict``, so that it can be tested where Core ML is not."""

    def __init__(self, model: Any, spec: ComponentSpec, pictures: Mapping[str, OutputSpec]) -> None:
        self._model = model
        self._outputs = spec.outputs
        self._pictures = pictures

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        if self._model is None:
            raise ContractError("the session is closed")
        results = self._model.predict(to_interface(feeds))
        return {o.name: self._output(results[interface_name(o.name)], o) for o in self._outputs}

    def _output(self, result: Any, tensor: TensorSpec) -> Array:
        values = np.asarray(result)
        picture = self._pictures.get(interface_name(tensor.name))
        if picture is not None:  # a PIL image [H, W, C], of four channels where Core ML adds one, or [H, W]
            channels = tensor.shape[1]
            values = from_levels(np.atleast_3d(values)[..., :channels].transpose(2, 0, 1), picture)
        return values.astype(tensor.dtype).reshape(tensor.shape)

    def close(self) -> None:
        """Drops the model."""
        self._model = None


def _check_contract(package: Path, program: MilProgram, spec: ComponentSpec) -> None:
    features = program.inputs[program.default], program.outputs[program.default]
    for given, expected in zip(features, (spec.inputs, spec.outputs), strict=True):
        # By name: conversion orders inputs as the graph first reads them.
        found = {feature.name: feature for feature in given}
        wanted = {interface_name(tensor.name): tensor for tensor in expected}
        if found.keys() != wanted.keys():
            raise ContractError(
                f"{package}: model has {sorted(found)}, the manifest has {sorted(wanted)}", hint="build it again"
            )
        for name, tensor in wanted.items():
            _check_tensor(package, found[name], tensor)


def _check_tensor(package: Path, value: Feature, tensor: TensorSpec) -> None:
    if value.image is not None and fits(value, tensor):
        return
    if value.dtype is None:
        raise ContractError(
            f"{package}: {value.name} is {_said(value)}, expected {tensor.dtype} {list(tensor.shape)}",
            hint="build it again",
        )
    interface = TensorSpec(tensor.name, _INTERFACE.get(tensor.dtype, tensor.dtype), tensor.shape or (1,))
    interface.check(value.shape or interface.shape, value.dtype.numpy.name, str(package))


def _said(value: Feature) -> str:
    return "no array" if value.image is None else f"an image {value.image} {list(value.shape)}"


def _compile(program: Program, folder: Path, weights: str) -> Artifact:
    from fewstep.runtimes.coreml.compile import lower as coreml_lower  # needs torch, which running a bundle does not

    return coreml_lower.lower(program, folder, weights)


def _compile_variants(programs: Iterable[Program], folder: Path, weights: str) -> list[Artifact]:
    from fewstep.runtimes.coreml.compile import multifunction as coreml_functions  # as above

    return coreml_functions.lower_variants(programs, folder, weights)


def _compare_integers(
    program: Program, path: Path, feeds: Mapping[str, Array], function: str | None = None
) -> list[PointResult]:
    from fewstep.runtimes.coreml.debug import compare_tensors as coreml_points  # as above

    return coreml_points.compare_integers(program, path, feeds, function)


def _stored(path: Path, function: str | None = None) -> Stored:
    """Returns the constants of a package. Its grids are compared operation by operation: it names them otherwise."""
    package = open_package(path.parent, function)
    names = [function] if function is not None else list(package.functions)
    return Stored(lambda: (found for name in names for found in _constants(package.functions[name].block)))


def _constants(block: Block) -> Iterator[tuple[str, Array]]:
    for operation in block.operations:
        bound = (value for values in operation.inputs.values() for value in values)
        for value in (*operation.attributes.values(), *bound):
            found = value.read() if not isinstance(value, str) else None
            if isinstance(found, np.ndarray) and found.dtype.kind in "fiu":
                yield operation.name, found
        for inner in operation.blocks:
            yield from _constants(inner)


def _write_loop(bundle: Bundle, path: Path, steps: int) -> Path:
    if path.suffix != _PACKAGE:
        raise BundleError(f"{path.name} is to be a Core ML package, expected a name in {_PACKAGE}", hint="rename it")
    from fewstep.runtimes.coreml.compile import single_file  # needs coremltools

    return single_file.write_loop(bundle, path, steps=steps)


def _open_loop(path: Path) -> OpenLoop:
    """Returns a package of the whole loop on the evaluator."""
    program = open_package(path)
    evaluator = Evaluator(program, precision="fp32")
    shapes = {feature.name: feature.shape for feature in program.inputs[program.default]}
    return OpenLoop(shapes, lambda feeds: next(iter(evaluator.run(to_interface(feeds)).values())))


def _at_function(function: str) -> Runtime:
    return replace(
        RUNTIME,
        stored=functools.partial(_stored, function=function),
        open=functools.partial(open_session, function=function),
        open_exact=functools.partial(open_exact, function=function),
        compare_integers=functools.partial(_compare_integers, function=function),
    )


RUNTIME = Runtime(
    NAME,
    availability,
    _compile,
    open_session,
    _compare_integers,
    compile_variants=_compile_variants,
    open_exact=open_exact,
    at_function=_at_function,
    executor=executor,
    stored=_stored,
    single_file=SingleFile(_write_loop, _open_loop),
    image_outputs=True,
)

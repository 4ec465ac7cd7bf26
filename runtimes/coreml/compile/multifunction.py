"""Puts the graphs of a component into one Core ML package, as functions that share their weights (iOS 18).

coremltools has `save_multifunction` for this, which loads the weights of all packages and writes the programs anew.
Here operations are copied as their packages have them, and weights one at a time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from coremltools.models import MLModel
from coremltools.proto import Model_pb2

from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.disk import scratch
from fewstep.errors import ExportError
from fewstep.runtimes.coreml.compile.lower import DEFAULT_TARGET, MODEL, WEIGHTS, fp32_operations_of, lower, save
from fewstep.runtimes.coreml.mil.names import METADATA
from fewstep.runtimes.coreml.mil.weight_file import BlobFile, BlobWriter
from fewstep.runtimes.coreml.runtime import function_name
from fewstep.runtimes.passes.short_names import ShortNames, other_names

# iOS 18, the first specification whose models have several functions.
_SPECIFICATION = 9


def lower_variants(
    programs: Iterable[Program], folder: Path, weights: str, *, target: str = DEFAULT_TARGET
) -> list[Artifact]:
    """Returns the artifacts of several graphs of one component: functions of one package, the first the default.

    The bytes of the first are those of a package of it alone, those of the others what they add.

    Args:
        programs: looked at one after the other.
        folder: see `fewstep.runtimes.coreml.compile.lower.lower`.
        weights: see there.
        target: see there; from iOS 18 on.

    Raises:
        ExportError: see there; or the target's packages have one function.
    """
    artifacts: list[Artifact] = []
    fp32: frozenset[str] | None = None
    with FunctionsWriter() as writer:
        for program in programs:
            fp32 = fp32_operations_of(program, weights, target=target, known=fp32)
            with scratch() as alone:
                artifact = lower(program, Path(alone), weights, target=target, fp32_operations=fp32)
                name = function_name(program.variant)
                added = writer.add(name, (Path(alone) / artifact.path).parent)
            artifacts.append(replace(artifact, bytes=added, function=name))
        path = (folder / artifacts[0].path).parent
        writer.save(path)
    rest = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) - sum(a.bytes for a in artifacts)
    return [replace(artifacts[0], bytes=artifacts[0].bytes + rest), *artifacts[1:]]


class FunctionsWriter:
    """Collects packages as functions of one. A context manager: leaving it frees what was collected.

    The first function keeps its names, by which profilers list operations; the others have short ones.

    Packages can be deleted once they have been added, so that disk holds two sets of weights at most.
    """

    def __init__(self) -> None:
        self._model = Model_pb2.Model()
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(scratch()))
        self._weights = self._stack.enter_context(BlobWriter(self._folder / WEIGHTS.name))
        self._names = ShortNames()
        self._short: list[str] = []

    def add(self, name: str, package: Path) -> int:
        """Returns how many bytes a package of one function adds, which becomes a function of this name.

        Raises:
            ExportError: the name is taken, or the package is for a system before iOS 18.
            BundleError: its weight file is damaged.
        """
        model = read_model(package)
        if model.specificationVersion < _SPECIFICATION:
            raise ExportError(
                f"{package.name} is of specification {model.specificationVersion}, and several functions need "
                f"{_SPECIFICATION} (iOS 18)",
                hint="compile for iOS 18, or give one shape, no batch, no tiles and the table form",
            )
        functions = self._model.mlProgram.functions
        if name in functions:
            raise ExportError(
                f"function {name!r} is given twice, it has {', '.join(sorted(functions))}", hint="rename one"
            )
        before = self._size()
        function = _only_function(model, package)
        move_weights(function, package, self._weights)
        share_constants(function)
        if functions and shorten(function, self._names):
            self._short.append(name)
        description = model.description
        if not functions:
            self._model.CopyFrom(model)
            functions.clear()
            for field in ("input", "output", "state"):
                self._model.description.ClearField(field)
            self._model.description.defaultFunctionName = name
        functions[name].CopyFrom(function)
        self._model.description.functions.add(
            name=name, input=description.input, output=description.output, state=description.state
        )
        return self._size() - before

    def save(self, path: Path) -> None:
        """Writes the package. Nothing can be added any more."""
        self._weights.close()
        if self._short:
            told = {"functions": self._short, "stems": self._names.table}
            self._model.description.metadata.userDefined[METADATA] = json.dumps(told)
        save(MLModel(self._model, weights_dir=str(self._folder), skip_model_load=True), path)

    def _size(self) -> int:
        return self._weights.size + int(self._model.ByteSize())

    def __enter__(self) -> Self:
        """Returns the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Deletes what was collected."""
        self._stack.close()


def read_model(package: Path) -> Any:
    """Returns the specification of a package that was written here."""
    return Model_pb2.Model.FromString((package / MODEL).read_bytes())


def _only_function(model: Any, package: Path) -> Any:
    functions = model.mlProgram.functions
    if len(functions) != 1:
        raise ExportError(f"{package.name} has the functions {', '.join(sorted(functions))}, expected one")
    return next(iter(functions.values()))


def move_weights(function: Any, package: Path, weights: BlobWriter) -> None:
    """Writes what a function of a package refers to into another weight file, and makes it refer to that, in place."""
    stored = package / WEIGHTS
    if not stored.is_file():
        return  # a component without a large constant
    file = BlobFile(stored)
    for block in function.block_specializations.values():
        for value in _values(block):
            if value.HasField("blobFileValue"):
                value.blobFileValue.offset = weights.place(file.blob(value.blobFileValue.offset))


def _values(block: Any) -> Iterator[Any]:
    """Yields the constants of a block's operations, those inside of their blocks included."""
    for operation in block.operations:
        yield from operation.attributes.values()
        for argument in operation.inputs.values():
            yield from (binding.value for binding in argument.arguments if binding.HasField("value"))
        for inner in operation.blocks:
            yield from _values(inner)


def share_constants(function: Any) -> None:
    """Gives the constants of a function short names, and keeps one of those that are equal, in place.

    Every operation has shapes and numbers of its own, and names of weights are long: that is half of a small network's
    graph, and its graph is what a function adds to a package. A function with control flow is left as it is.
    """
    block = function.block_specializations[function.opset]
    if _has_control_flow(block):
        return
    taken = {value.name for value in (*function.inputs, *(out for one in block.operations for out in one.outputs))}
    fresh = (name for name in (f"c{i}" for i in itertools.count()) if name not in taken)
    kept: dict[bytes, str] = {}
    names: dict[str, str] = {}
    for operation in block.operations:
        if operation.type != "const":
            continue
        content = operation.attributes["val"].SerializeToString(deterministic=True)
        old = operation.outputs[0].name
        if content in kept:
            names[old] = kept[content]
            operation.Clear()
        else:
            names[old] = kept[content] = next(fresh)
    left = [operation for operation in block.operations if operation.type]
    del block.operations[:]
    block.operations.extend(left)
    _rename(block, names)


def shorten(function: Any, names: ShortNames) -> bool:
    """Returns whether all that a function computes has got short names, in place.

    See `fewstep.runtimes.coreml.mil.names`.

    A function with control flow is left as it is. Its inputs and outputs keep their names.
    """
    block = function.block_specializations[function.opset]
    if _has_control_flow(block):
        return False
    fixed = {*(value.name for value in function.inputs), *block.outputs}
    constants, computed = dict[str, None](), dict[str, None]()
    for operation in block.operations:
        found = constants if operation.type == "const" else computed
        found.update(dict.fromkeys([*(value.name for value in operation.outputs), *_own_name(operation)]))
    short = names.shorten([name for name in computed if name not in fixed], fixed)
    others = [name for name in constants if name not in fixed and name not in short]
    _rename(block, short | dict(zip(others, other_names(fixed), strict=False)))
    return True


def _has_control_flow(block: Any) -> bool:
    return any(operation.blocks for operation in block.operations)


def _own_name(operation: Any) -> Any:
    """Returns the name of an operation as a list that can be edited, which most share with their output."""
    return operation.attributes["name"].immediateValue.tensor.strings.values if "name" in operation.attributes else []


def _rename(block: Any, names: Mapping[str, str]) -> None:
    """Gives the values and operations of a block other names, in place."""
    for operation in block.operations:
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.HasField("name"):
                    binding.name = names.get(binding.name, binding.name)
        own = _own_name(operation)
        own[:] = [names.get(name, name) for name in own]
        for output in operation.outputs:
            output.name = names.get(output.name, output.name)
    block.outputs[:] = [names.get(name, name) for name in block.outputs]

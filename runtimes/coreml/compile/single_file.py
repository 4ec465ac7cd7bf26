"""Puts a bundle's networks and its sampler into one Core ML package: tokens and noise in, picture out.

The operations of each component are copied, as its package has them, once for each of its calls; its weights and all
else that no input decides are there once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coremltools.models import MLModel
from coremltools.proto import MIL_pb2, Model_pb2

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.manifest import Manifest
from fewstep.bundle.schedule import Schedule
from fewstep.disk import scratch
from fewstep.errors import ContractError
from fewstep.runtimes.coreml.compile.lower import WEIGHTS, save
from fewstep.runtimes.coreml.compile.multifunction import move_weights, read_model
from fewstep.runtimes.coreml.mil.weight_file import BlobWriter
from fewstep.runtimes.coreml.runtime import NAME
from fewstep.runtimes.sampling.unrolled_graph import Unrolled, check_unrolls, input_name

OUTPUT = "picture"
_FLOAT, _INT = (MIL_pb2.FLOAT32, "floats"), (MIL_pb2.INT32, "ints")


def write_loop(bundle: Bundle, path: Path, *, steps: int | None = None) -> Path:
    """Returns the path of a package that samples with one of a bundle's schedules, unrolled.

    Its inputs are named as those of `fewstep.runtimes.onnxruntime.compile.single_file.write_loop`, integers are
    int32. Its output ``picture`` is the last component's, scaled and clipped as the contract says, channels first.

    Args:
        bundle: the bundle, with artifacts for Core ML.
        path: of the package.
        steps: the schedule; None takes the bundle's default.

    Raises:
        ContractError: see `check_unrolls`; or the last component gives an image; or a component has control flow, or
            another operation set than the others.
    """
    manifest = bundle.manifest
    check_unrolls(manifest)
    if manifest.recipe.get("image_output", False):
        raise ContractError(
            f"{manifest.name}: the last component gives an image, expected the values that a loop scales itself",
            hint="build without image_output for a loop",
        )
    schedule = manifest.schedule(manifest.default_steps if steps is None else steps)
    artifacts = {name: manifest.artifact(NAME, name) for name in manifest.components}
    with scratch() as folder:
        with BlobWriter(Path(folder) / WEIGHTS.name) as weights:
            parts = {
                name: _Part.read(name, bundle.file(artifact.path).parent, artifact.function, weights)
                for name, artifact in artifacts.items()
            }
        model = _Loop(manifest, schedule, parts).model()
        save(MLModel(model, weights_dir=str(folder), skip_model_load=True), path)
    return path


@dataclass
class _Part:
    """A component's operations, and what its values are called in the loop that no input decides."""

    component: str
    version: int
    opset: str
    inputs: tuple[str, ...]
    block: Any
    constants: dict[str, str]
    calls: int = 0

    @classmethod
    def read(cls, component: str, package: Path, name: str, weights: BlobWriter) -> _Part:
        """Returns a component's function of a package, whose weights are written into another file."""
        model = read_model(package)
        function = model.mlProgram.functions[name or "main"]
        move_weights(function, package, weights)
        block = function.block_specializations[function.opset]
        if any(operation.blocks for operation in block.operations):
            raise ContractError(f"{component} has control flow, expected operations that can be written in a row")
        inputs = tuple(value.name for value in function.inputs)
        return cls(component, model.specificationVersion, function.opset, inputs, block, {})

    def call(self, inputs: Sequence[str]) -> tuple[list[Any], list[str]]:
        """Returns the operations of one more call, and the names of its outputs."""
        names = dict(zip(self.inputs, inputs, strict=True)) | self.constants
        first, made = self.calls == 0, []
        for operation in self.block.operations:
            fixed = all(name in self.constants for name in _read(operation))
            if fixed and not first:
                continue
            prefix = f"{self.component}_" if fixed else f"{self.component}_{self.calls}_"
            made.append(self._copy(operation, prefix, names))
            if fixed:
                self.constants |= {value.name: names[value.name] for value in operation.outputs}
        self.calls += 1
        return made, [names[name] for name in self.block.outputs]

    def _copy(self, operation: Any, prefix: str, names: dict[str, str]) -> Any:
        """Returns an operation under other names, and enters those of its outputs."""
        copy = MIL_pb2.Operation()
        copy.CopyFrom(operation)
        for argument in copy.inputs.values():
            for binding in argument.arguments:
                if binding.HasField("name"):
                    binding.name = names[binding.name]
        for output in copy.outputs:
            names[output.name] = output.name = prefix + output.name
        if "name" in copy.attributes:
            strings = copy.attributes["name"].immediateValue.tensor.strings.values
            strings[0] = prefix + strings[0]
        return copy


def _read(operation: Any) -> list[str]:
    """Returns the names of the values that an operation takes."""
    bound = (binding for argument in operation.inputs.values() for binding in argument.arguments)
    return [binding.name for binding in bound if binding.HasField("name")]


@dataclass(frozen=True)
class _Value:
    name: str
    shape: tuple[int, ...]


class _Loop(Unrolled[_Value]):
    """Builds the function, operation by operation."""

    def __init__(self, manifest: Manifest, schedule: Schedule, parts: Mapping[str, _Part]) -> None:
        super().__init__(manifest, schedule)
        self._parts = parts
        opsets = {part.opset for part in parts.values()}
        if len(opsets) != 1:
            raise ContractError(
                f"the components are compiled for {', '.join(sorted(opsets))}, expected one operation set",
                hint="build the bundle again",
            )
        self._function = MIL_pb2.Function(opset=opsets.pop())
        self._block = self._function.block_specializations[self._function.opset]
        self._numbers: dict[tuple[str, float, tuple[int, ...]], _Value] = {}
        self._features: list[tuple[_Value, str]] = []

    def model(self) -> Any:
        """Returns the model's specification."""
        result, shape = self.picture()
        picture = self._op("identity", {"x": result}, shape, OUTPUT)
        self._block.outputs.append(picture.name)
        model = Model_pb2.Model(specificationVersion=max(part.version for part in self._parts.values()))
        model.mlProgram.version = 1
        model.mlProgram.functions["main"].CopyFrom(self._function)
        for value, dtype in self._features:
            _describe(model.description.input.add(), value, dtype)
        _describe(model.description.output.add(), picture, "float32")
        return model

    def call(self, component: str, inputs: Sequence[_Value]) -> Sequence[_Value]:
        """Returns the outputs of a component."""
        operations, names = self._parts[component].call([value.name for value in inputs])
        self._block.operations.extend(operations)
        outputs = self.manifest.components[component].outputs
        return [_Value(name, tensor.shape) for name, tensor in zip(names, outputs, strict=True)]

    def input(self, origin: str, dtype: str, shape: tuple[int, ...]) -> _Value:
        """Returns a new input of the function."""
        value = _Value(input_name(origin), shape or (1,))
        self._features.append((value, dtype))
        _type(self._function.inputs.add(), value, _kind(dtype)[0])
        return value

    def constant(self, number: float, dtype: str, shape: tuple[int, ...]) -> _Value:
        """Returns a tensor of one number."""
        key = dtype, number, shape or (1,)
        if key not in self._numbers:
            value = self._numbers[key] = _Value(f"number_{len(self._numbers)}", shape or (1,))
            self._const(value, [number], dtype)
        return self._numbers[key]

    def scale(self, value: _Value, factor: float) -> _Value:
        """Returns a value times a number."""
        return self._op("mul", {"x": value, "y": self._scalar(factor)}, value.shape)

    def add(self, a: _Value, b: _Value) -> _Value:
        """Returns the sum of two values."""
        return self._op("add", {"x": a, "y": b}, a.shape)

    def shift(self, value: _Value, number: float) -> _Value:
        """Returns a value plus a number."""
        return self._op("add", {"x": value, "y": self._scalar(number)}, value.shape)

    def clip(self, value: _Value, low: float, high: float) -> _Value:
        """Returns a value between two numbers."""
        return self._op("clip", {"x": value, "alpha": self._scalar(low), "beta": self._scalar(high)}, value.shape)

    def _scalar(self, number: float) -> _Value:
        key = "float32", number, ()
        if key not in self._numbers:
            value = self._numbers[key] = _Value(f"number_{len(self._numbers)}", ())
            self._const(value, [number], "float32")
        return self._numbers[key]

    def _const(self, value: _Value, numbers: Sequence[float], dtype: str) -> None:
        primitive, field = _kind(dtype)
        operation = self._block.operations.add(type="const")
        _name(operation, value.name)
        _type(operation.outputs.add(), value, primitive)
        stored = operation.attributes["val"]
        _tensor_type(stored.type.tensorType, value.shape, primitive)
        count = 1
        for size in value.shape:
            count *= size
        whole = [int(n) if field == "ints" else float(n) for n in numbers]
        getattr(stored.immediateValue.tensor, field).values.extend(whole * count)

    def _op(self, kind: str, inputs: Mapping[str, _Value], shape: tuple[int, ...], name: str = "") -> _Value:
        value = _Value(name or f"{kind}_{len(self._block.operations)}", shape)
        operation = self._block.operations.add(type=kind)
        for argument, source in inputs.items():
            operation.inputs[argument].arguments.add(name=source.name)
        _name(operation, value.name)
        _type(operation.outputs.add(), value, MIL_pb2.FLOAT32)
        return value


def _kind(dtype: str) -> tuple[int, str]:
    """Returns the type that a number of a component's input has at its interface, and the field for its values."""
    return _FLOAT if dtype.startswith("float") else _INT


def _type(named: Any, value: _Value, primitive: int) -> None:
    named.name = value.name
    _tensor_type(named.type.tensorType, value.shape, primitive)


def _tensor_type(target: Any, shape: Sequence[int], primitive: int) -> None:
    target.dataType, target.rank = primitive, len(shape)
    for size in shape:
        target.dimensions.add().constant.size = size


def _name(operation: Any, name: str) -> None:
    attribute = operation.attributes["name"]
    attribute.type.tensorType.dataType = MIL_pb2.STRING
    attribute.immediateValue.tensor.strings.values.append(name)


def _describe(feature: Any, value: _Value, dtype: str) -> None:
    """Writes what an app sees of an input or output."""
    feature.name = value.name
    array = feature.type.multiArrayType
    array.shape.extend(value.shape)
    array.dataType = array.FLOAT32 if dtype.startswith("float") else array.INT32

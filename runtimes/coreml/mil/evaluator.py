"""Evaluates a MIL program operation by operation, as the package would ship, on any machine.

Arithmetic. An operation gets its floating-point inputs as float32 and computes in float32 (sums, too: matrix products,
means, softmax and the like accumulate in float32). Then

* with ``precision="fp16"`` a result that the program declares as fp16 is rounded to fp16 once: what a phone sees at
  best. Hardware that also accumulates in fp16 is worse.
* with ``precision="fp32"`` it is not: what is left of the difference from PyTorch is what conversion changed.

Weights are the shipped ones in both. A result must have the shape and type that the program declares.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fewstep.errors import ContractError
from fewstep.runtimes.coreml.mil.dtypes import Array
from fewstep.runtimes.coreml.mil.ops import OPS
from fewstep.runtimes.coreml.mil.program import (
    Block,
    Constant,
    Function,
    ListType,
    MilProgram,
    Operation,
    StateType,
    TensorType,
    ValueType,
)

Precision = Literal["fp32", "fp16"]
Observer = Callable[[Operation, Mapping[str, Any], tuple[Any, ...]], None]
"""Told of every operation, its arguments (fp16 widened to fp32) and its results, in the order of computation."""

# Operations whose constants may have another type than the tensors that they compute with (iOS 17).
_MIXED = frozenset({"matmul", "linear"})
CONTROL = ("cond", "while_loop", "read_state", "write_state", "const")


def known_operations() -> frozenset[str]:
    """Returns the names of all operations that the evaluator knows."""
    return frozenset(OPS) | frozenset(CONTROL)


class Evaluator:
    """A program, ready to run.

    Args:
        program: what `fewstep.runtimes.coreml.mil.package.open_package` returned.
        precision: whether fp16 results are rounded to fp16.
        strict: refuse the first operation that makes an infinity or NaN of finite numbers, naming it.

    Raises:
        ContractError: the program has an operation that the evaluator does not know.
    """

    def __init__(self, program: MilProgram, *, precision: Precision = "fp32", strict: bool = False) -> None:
        self.program = program
        self.precision = precision
        self.strict = strict
        for function in program.functions.values():
            _check_known(function.block, function.name)

    def make_state(self, function: str | None = None) -> dict[str, Array]:
        """Returns the states of a function, all zeros, to be handed to `run` and changed by it."""
        states = self._function(function).states
        return {name: np.zeros(_fixed(type_, name), type_.dtype.numpy) for name, type_ in states.items()}

    def run(
        self,
        feeds: Mapping[str, Array],
        *,
        function: str | None = None,
        state: MutableMapping[str, Array] | None = None,
        observe: Observer | None = None,
        given: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Returns the outputs by name, fp16 ones as float32 if the precision is fp32.

        Args:
            feeds: the inputs by name, of the types and shapes that the function declares.
            function: which entry point; None takes the default one.
            state: from `make_state`; updated in place. None starts from zeros and forgets.
            observe: told of every operation.
            given: values that take the place of computed ones, by name, after ``observe`` was told of those.

        Raises:
            ContractError: an input, operation or result is not as declared, or (strict) not finite.
        """
        chosen = self._function(function)
        states = self.make_state(chosen.name) if state is None else state
        scope = _Scope(None, _last_uses(chosen.block))
        wanted = {name for name, type_ in chosen.inputs if not isinstance(type_, StateType)}
        if feeds.keys() != wanted:
            missing, unknown = sorted(wanted - feeds.keys()), sorted(feeds.keys() - wanted)
            raise ContractError(f"function {chosen.name!r}: inputs missing {missing}, unknown {unknown}")
        for name, type_ in chosen.inputs:
            if not isinstance(type_, StateType):
                scope.values[name] = self._declared(feeds[name], type_, f"input {name!r}")
        run = _Run(self, states, observe, given or {})
        run.block(chosen.block, scope)
        return {name: run.value(name, scope) for name in chosen.block.outputs}

    def _function(self, name: str | None) -> Function:
        chosen = name or self.program.default
        if chosen not in self.program.functions:
            raise ContractError(f"no function {chosen!r}, the program has {', '.join(self.program.functions)}")
        return self.program.functions[chosen]

    def _declared(self, value: Any, type_: ValueType, where: str) -> Any:
        """Returns a value in the type that the program declares for it.

        Raises:
            ContractError: it has another shape or kind of elements.
        """
        if isinstance(type_, ListType):
            return tuple(value)
        assert isinstance(type_, TensorType)
        if type_.dtype.name == "string":
            return value
        array = np.asarray(value)
        fits = type_.shape is None or (
            array.ndim == len(type_.shape)
            and all(n in (None, m) for n, m in zip(type_.shape, array.shape, strict=True))
        )
        if not fits or (array.dtype.kind == "f") != type_.dtype.floating:
            raise ContractError(
                f"{where} is {array.dtype} {list(array.shape)}, the program declares {type_}",
                hint="the program contradicts itself or its inputs: convert it again",
            )
        if type_.dtype.name == "fp16" and self.precision == "fp32":
            return array.astype(np.float32, copy=False)
        with np.errstate(over="ignore"):  # an overflow to infinity is a result: `strict` reports it
            return array.astype(type_.dtype.numpy, copy=False)


@dataclass
class _Scope:
    """The values of a block that are still wanted; constants are made each time that they are used."""

    parent: _Scope | None
    uses: Counter[str]
    values: dict[str, Any] = field(default_factory=dict)
    lazy: dict[str, tuple[Operation, int]] = field(default_factory=dict)

    def used(self, names: Iterable[str]) -> None:
        """Frees the values whose last use this was."""
        for name in names:
            if name in self.uses:
                self.uses[name] -= 1
                if self.uses[name] <= 0:
                    self.values.pop(name, None)


class _Run:
    def __init__(
        self,
        evaluator: Evaluator,
        states: MutableMapping[str, Array],
        observe: Observer | None,
        given: Mapping[str, Array],
    ) -> None:
        self._evaluator = evaluator
        self._states = states
        self._observe = observe
        self._given = given

    def block(self, block: Block, scope: _Scope) -> None:
        for operation in block.operations:
            if operation.type == "const" or operation.type.startswith("constexpr_"):
                scope.lazy.update({name: (operation, i) for i, (name, _) in enumerate(operation.outputs)})
                continue
            self._operation(operation, scope)
            scope.used(_names(operation))

    def value(self, name: str, scope: _Scope) -> Any:
        """Returns a value by name, from this block or one around it."""
        at: _Scope | None = scope
        while at is not None:
            if name in at.values:
                return at.values[name]
            if name in at.lazy:
                operation, index = at.lazy[name]
                return self._constant(operation, index, at)
            at = at.parent
        raise ContractError(
            f"value {name!r} is used and not defined", hint="the program contradicts itself: convert it again"
        )

    def _constant(self, operation: Operation, index: int, scope: _Scope) -> Any:
        arguments: Mapping[str, Any] = {}
        if operation.type == "const":
            results: tuple[Any, ...] = (operation.attributes["val"].read(),)
        else:
            arguments = self._arguments(operation, scope)
            results = self._call(operation, arguments)
        name, type_ = operation.outputs[index]
        if operation.type != "const" and self._observe is not None:
            self._observe(operation, arguments, results)
        return self._evaluator._declared(results[index], type_, f"{operation.where} output {name!r}")

    def _operation(self, operation: Operation, scope: _Scope) -> None:
        arguments: Mapping[str, Any] = {}
        if operation.type in ("read_state", "write_state"):
            results = self._state(operation, scope)
        elif operation.type == "cond":
            branch = operation.blocks[0 if bool(self._argument(operation, "pred", scope)) else 1]
            results = self._inner(branch, (), scope)
        elif operation.type == "while_loop":
            results = self._loop(operation, scope)
        else:
            arguments = self._arguments(operation, scope)
            results = self._call(operation, arguments)
        if len(results) != len(operation.outputs):
            raise ContractError(f"{operation.where} has {len(operation.outputs)} outputs, computed {len(results)}")
        declared = tuple(
            self._evaluator._declared(value, type_, f"{operation.where} output {name!r}")
            for value, (name, type_) in zip(results, operation.outputs, strict=True)
        )
        if self._evaluator.strict:
            _refuse_nonfinite(operation, arguments, declared)
        if self._observe is not None:
            self._observe(operation, arguments, declared)
        scope.values.update(
            {
                name: self._given.get(name, value)
                for (name, _), value in zip(operation.outputs, declared, strict=True)
                if name in scope.uses
            }
        )

    def _arguments(self, operation: Operation, scope: _Scope) -> dict[str, Any]:
        arguments = {name: self._argument(operation, name, scope) for name in operation.inputs}
        arguments.update({name: _widened(constant.read()) for name, constant in operation.attributes.items()})
        return _in_kind_of_result(operation, arguments) if operation.type in _MIXED else arguments

    def _call(self, operation: Operation, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        function = OPS[operation.type]
        try:
            bound = _signature(operation.type).bind(**arguments)
        except TypeError as error:
            raise ContractError(
                f"{operation.where}: {error}",
                hint="the evaluator does not know this form of the operation: convert with coremltools 9, or report it",
            ) from error
        try:
            with np.errstate(all="ignore"):  # infinities and NaN are results: `strict` reports them
                result = function(*bound.args, **bound.kwargs)
        except (ValueError, IndexError) as error:
            raise ContractError(
                f"{operation.where}: {error}", hint="the program is damaged: convert it again"
            ) from error
        return result if isinstance(result, tuple) else (result,)

    def _argument(self, operation: Operation, name: str, scope: _Scope) -> Any:
        if name not in operation.inputs:
            raise ContractError(f"{operation.where}: input {name!r} is missing", hint="convert it again")
        values = tuple(
            _widened(bound.read() if isinstance(bound, Constant) else self.value(bound, scope))
            for bound in operation.inputs[name]
        )
        return values[0] if len(values) == 1 else values

    def _state(self, operation: Operation, scope: _Scope) -> tuple[Any, ...]:
        (name,) = operation.inputs["input"]
        if not isinstance(name, str) or name not in self._states:
            raise ContractError(f"{operation.where}: {name!r} is no state of this function")
        if operation.type == "read_state":
            return (self._states[name].copy(),)
        (data,) = operation.inputs["data"]
        value = data.read() if isinstance(data, Constant) else self.value(data, scope)
        self._states[name] = np.array(value, dtype=self._states[name].dtype)
        return ()

    def _inner(self, block: Block, inputs: tuple[Any, ...], scope: _Scope) -> tuple[Any, ...]:
        inside = _Scope(scope, _last_uses(block))
        inside.values.update({name: v for (name, _), v in zip(block.inputs, inputs, strict=True)})
        self.block(block, inside)
        return tuple(self.value(name, inside) for name in block.outputs)

    def _loop(self, operation: Operation, scope: _Scope) -> tuple[Any, ...]:
        values = tuple(
            bound.read() if isinstance(bound, Constant) else self.value(bound, scope)
            for bound in operation.inputs["loop_vars"]
        )
        condition, body = operation.blocks
        while bool(self._inner(condition, values, scope)[0]):
            values = self._inner(body, values, scope)
        return values


def _refuse_nonfinite(operation: Operation, arguments: Mapping[str, Any], results: tuple[Any, ...]) -> None:
    inputs = [v for value in arguments.values() for v in (value if isinstance(value, tuple) else (value,))]
    floats = [v for v in inputs if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
    for (name, _), value in zip(operation.outputs, results, strict=True):
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or np.isfinite(value).all():
            continue
        if all(np.isfinite(v).all() for v in floats):
            largest = max((float(np.abs(v).max()) for v in floats if v.size), default=0.0)
            bad = value[~np.isfinite(value)].reshape(-1)
            raise ContractError(
                f"{operation.where}: {name!r} has {bad.size} of {value.size} elements that are not finite "
                f"(first: {bad[0]}), from inputs up to {largest:.4g}",
                hint="compute this operation in fp32",
            )


def _widened(value: Any) -> Any:
    """Returns fp16 arrays as fp32, all else as it is."""
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value


def _in_kind_of_result(operation: Operation, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the operands of a product of whole numbers as whole numbers: the result has the type of what varies.

    Raises:
        ContractError: a constant is no whole number.
    """
    (_, type_), *_ = operation.outputs
    if not isinstance(type_, TensorType) or type_.dtype.floating:
        return arguments
    found = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            found[name] = value.astype(type_.dtype.numpy)
            if not np.array_equal(found[name], value):
                raise ContractError(
                    f"{operation.where}: {name!r} has fractions, and the result is {type_}", hint="convert it again"
                )
    return found


@functools.cache
def _signature(kind: str) -> inspect.Signature:
    return inspect.signature(OPS[kind])


def _names(operation: Operation) -> list[str]:
    """Returns the values that an operation uses, those inside of its blocks included, each once."""
    found = {b for bound in operation.inputs.values() for b in bound if isinstance(b, str)}
    for block in operation.blocks:
        found.update(block.outputs)
        for inner in block.operations:
            found.update(_names(inner))
    return list(found)


def _last_uses(block: Block) -> Counter[str]:
    """Returns how many operations use each value; the block's own outputs are never used up."""
    uses = Counter(name for operation in block.operations for name in _names(operation))
    uses.update({name: 1 for name in block.outputs})
    return uses


def _fixed(type_: TensorType, name: str) -> tuple[int, ...]:
    if type_.shape is None or None in type_.shape:
        raise ContractError(f"state {name!r} has no fixed shape: {type_}")
    return tuple(n for n in type_.shape if n is not None)


def _check_known(block: Block, function: str) -> None:
    for operation in block.operations:
        if operation.type not in OPS and operation.type not in CONTROL:
            raise ContractError(
                f"function {function!r}: unknown operation {operation.where}",
                hint="the evaluator cannot say what it computes: convert without it, or report it",
            )
        for inner in operation.blocks:
            _check_known(inner, function)

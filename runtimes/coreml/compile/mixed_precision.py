"""Chooses which operations of a component must stay in fp32, by evaluating it on real inputs.

Three things go wrong in fp16: a value is beyond 65504; an operation magnifies the rounding of its inputs (the sine of
an angle in the hundreds, the difference of two nearly equal numbers); or a constant, such as a third, becomes another
number. All are measured, and nothing is listed by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.bundle.contract import STEP, TIMESTEP
from fewstep.bundle.program import Program
from fewstep.disk import scratch
from fewstep.errors import ExportError
from fewstep.numerics.metrics import sqnr_db
from fewstep.runtimes.base import Array
from fewstep.runtimes.coreml.mil import Evaluator, Operation, open_package
from fewstep.runtimes.coreml.mil.ops import OPS
from fewstep.runtimes.coreml.mil.program import TensorType
from fewstep.runtimes.coreml.runtime import to_interface

if TYPE_CHECKING:
    from coremltools.models import MLModel

FP16_MAX = 65504.0
# What coremltools appends to the name of a value when it makes it fp16.
FP16_SUFFIX = "_cast_fp16"
# Rounding a value to fp16 costs 2^-11 of it, 66 to 76 dB. An operation whose result is worse than this for rounded
# inputs has magnified that 15 times: it would decide the component's error alone.
CONDITION_DB = 43.0
# A constant is the same in every call: rounding it changes the function itself. Ten such errors leave 100 dB, the limit
# of a component's lowering, where each is below 110 dB.
CONSTANT_DB = 110.0
_ROUNDS = 4
# Operations that pass a rounding error on as it is: what made their inputs must stay in fp32 as well.
_PASSING = frozenset(
    "add sub mul real_div cast concat expand_dims gather identity reshape select slice_by_index slice_by_size split "
    "squeeze stack tile transpose".split()
)
# Times that samplers hand to networks, for programs without recorded calls: the first, an odd one and the last of 1000.
_TIMES = (1, 499, 999)


def choose_fp32_operations(
    program: Program, convert: Callable[[frozenset[str] | None], MLModel], known: frozenset[str] | None = None
) -> frozenset[str]:
    """Returns the operations that stay in fp32, by the name of their first output.

    They are found in the component as converted to fp32, and then looked for again as converted to fp16.

    Args:
        program: the component. Its recorded calls are evaluated; without them, normal numbers and usual times.
        convert: returns the model converted to fp16 but for some operations, and to fp32 for None.
        known: operations of another graph of the component, which are kept and take the place of looking in fp32:
            graphs that compute alike then share their weights.

    Raises:
        ExportError: a value is beyond fp16's range and keeping its operation in fp32 does not help.
    """
    feeds = feeds_of(program)
    kept = frozenset(_unfit(convert(None), feeds, "fp32")) if known is None else known
    for _ in range(_ROUNDS):
        found = _unfit(convert(kept), feeds, "fp16")
        fresh = frozenset(found) - kept
        if not fresh:
            break
        kept |= fresh
    if found:
        name, reason = next(iter(found.items()))
        raise ExportError(
            f"{program.component}: {name} {reason}, in fp32 as well", hint="use a recipe with fp32 weights for Core ML"
        )
    return kept


def _unfit(model: MLModel, feeds: Sequence[Mapping[str, Array]], dtype: str) -> dict[str, str]:
    with scratch() as folder:
        path = Path(folder) / "component.mlpackage"
        model.save(str(path))
        return find_unfit(path, feeds, dtype)


def find_unfit(path: Path, feeds: Sequence[Mapping[str, Array]], dtype: str) -> dict[str, str]:
    """Returns the operations of a package that compute in ``dtype`` and should not in fp16, with the reason."""
    evaluator = Evaluator(open_package(path), precision="fp32")
    found: dict[str, str] = {}
    for feed in feeds:
        inputs = to_interface(feed)
        watch = _Watch(inputs.keys(), dtype)
        evaluator.run(inputs, observe=watch)
        for name, reason in watch.found.items():
            found.setdefault(name, reason)
    return found


def feeds_of(program: Program) -> list[dict[str, Array]]:
    """Returns the recorded calls of a program, or made-up ones if it has none."""
    if program.feeds:
        return [dict(feed) for feed in program.feeds]
    made = []
    for i, time in enumerate(_TIMES):
        rng = np.random.default_rng(i)
        feed: dict[str, Array] = {}
        for spec in program.spec.inputs:
            if program.spec.bindings.get(spec.name) == TIMESTEP:
                feed[spec.name] = np.full(spec.shape, time, dtype=spec.dtype)
            elif np.dtype(spec.dtype).kind == "f":
                feed[spec.name] = rng.standard_normal(spec.shape).astype(spec.dtype)
            elif program.spec.bindings.get(spec.name) == STEP:
                feed[spec.name] = np.zeros(spec.shape, dtype=spec.dtype)  # a table has at least one row
            else:
                feed[spec.name] = np.ones(spec.shape, dtype=spec.dtype)
        made.append(feed)
    return made


class _Watch:
    """Observes an evaluation and collects the operations that should not compute in fp16."""

    def __init__(self, inputs: Iterable[str], dtype: str) -> None:
        self.found: dict[str, str] = {}
        self._inputs = frozenset(inputs)
        self._dtype = dtype
        self._producers: dict[str, Operation] = {}

    def __call__(self, operation: Operation, arguments: Mapping[str, Any], results: tuple[Any, ...]) -> None:
        """Looks at one operation, its arguments and its results, all computed in fp32."""
        self._producers.update({name: operation for name, _ in operation.outputs})
        if operation.type == "cast" or operation.type not in OPS or not self._examined(operation):
            return
        beyond = max((_largest(v) for v in (*_arrays(arguments), *results)), default=0.0)
        if beyond > FP16_MAX:
            self._keep(operation, f"has values up to {beyond:.4g}, beyond fp16's {FP16_MAX:.0f}")
            return
        constants = {name: _rounded(v) for name, v in arguments.items() if self._constant(operation, name)}
        if any(not np.array_equal(v, arguments[name]) for name, v in constants.items()):
            quality = _quality(operation, {**arguments, **constants}, results)
            if not quality >= CONSTANT_DB:
                self._keep(operation, f"has a constant that fp16 does not hold: {quality:.0f} dB")
        quality = _quality(operation, {name: _rounded(value) for name, value in arguments.items()}, results)
        if not quality >= CONDITION_DB:
            self._keep_with_sources(operation, f"turns fp16 rounding of its inputs into {quality:.0f} dB of error")

    def _constant(self, operation: Operation, name: str) -> bool:
        """Returns whether an input is written in the program."""
        return all(
            not isinstance(bound, str) or (bound not in self._producers and bound not in self._inputs)
            for bound in operation.inputs.get(name, ())
        )

    def _examined(self, operation: Operation) -> bool:
        return any(isinstance(type_, TensorType) and type_.dtype.name == self._dtype for _, type_ in operation.outputs)

    def _keep(self, operation: Operation, reason: str) -> None:
        self.found.setdefault(operation.outputs[0][0].removesuffix(FP16_SUFFIX), f"({operation.type}) {reason}")

    def _keep_with_sources(self, operation: Operation, reason: str) -> None:
        self._keep(operation, reason)
        waiting, seen = [operation], {operation.name}
        while waiting:
            for name in (n for bound in waiting.pop().inputs.values() for n in bound if isinstance(n, str)):
                source = self._producers.get(name)
                if source is None or source.name in seen:
                    continue
                seen.add(source.name)
                if self._examined(source) and source.type in OPS and not source.type.startswith("constexpr_"):
                    if source.type != "cast":
                        self._keep(source, f"feeds {operation.outputs[0][0]}, which {reason}")
                    if source.type in _PASSING:
                        waiting.append(source)


def _quality(operation: Operation, arguments: Mapping[str, Any], exact: tuple[Any, ...]) -> float:
    """Returns the least SQNR of the results for other arguments; infinite where there is nothing to compare."""
    with np.errstate(all="ignore"):
        again = OPS[operation.type](**arguments)
    values = zip(exact, again if isinstance(again, tuple) else (again,), strict=True)
    return min(
        (sqnr_db(e, v) for e, v in values if e.dtype.kind == "f" and np.isfinite(e).all() and e.any()),
        default=float("inf"),
    )


def _arrays(arguments: Mapping[str, Any]) -> list[Array]:
    flat = [v for value in arguments.values() for v in (value if isinstance(value, tuple) else (value,))]
    return [v for v in flat if isinstance(v, np.ndarray)]


def _largest(value: Any) -> float:
    """Returns the largest finite magnitude: infinities are masks, which fp16 has as well."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return 0.0
    finite = np.where(np.isfinite(value), np.abs(value), 0)
    return float(finite.max(initial=0.0))


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_rounded(v) for v in value)
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return value.astype(np.float16).astype(np.float32)
    return value

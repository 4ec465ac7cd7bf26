"""A pytest plugin that lets coremltools' own tests run off macOS: our evaluator predicts in Core ML's place.

coremltools compares predictions with expected values on macOS only; elsewhere its tests convert and compare nothing.
Here every comparison runs. What each test evaluated is kept beside its outcome, so that a test which passed without a
prediction is not taken for a proof. A record is written when its test begins and again when it ends: the run goes on
where it was interrupted, and a test that brought the process down is known.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Read by coremltools' tests when they are imported.
os.environ["PYMIL_TEST_TARGETS"] = "mlprogram"
os.environ["INCLUDE_MIL_FP32_UNIT_TESTS"] = "1"

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters import _converters_entry
from coremltools.converters.mil import testing_utils
from coremltools.converters.mil.mil import Program
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from coremltools.converters.mil.mil.passes.defs import optimize_activation
from coremltools.models import MLModel
from PIL import Image

from fewstep.errors import ContractError
from fewstep.runtimes.coreml.mil import Evaluator, known_operations, open_package
from fewstep.runtimes.coreml.mil.program import Feature, Function, TensorType
from tests.unit.runtimes.coreml.mil.operators import INTERRUPTED, PLUMBING, RULE, evaluator_sources, evaluator_version

# What rounding to fp16 and a sum in another order can leave of a value.
_UNIT = 2.0**-10
# Read with the code that runs: files may change while it does.
_SOURCES = evaluator_sources()


class _Log:
    """What the test that is running has evaluated."""

    def __init__(self) -> None:
        self.operations: set[str] = set()
        self.predictions = 0
        self.unknown: str | None = None
        self.halves = False
        """Whether a program declares a tensor of fp16, or a case's expected values are of it."""
        self.wide = False
        """Whether values are compared to fp16's precision."""


_LOG = _Log()
_EMPTY: dict[str, Any] = {"operations": [], "predictions": 0, "unknown": None, "wide": False}


def _operations(function: Function) -> set[str]:
    found: set[str] = set()
    blocks = [function.block]
    while blocks:
        for operation in blocks.pop().operations:
            found.add(operation.type)
            blocks += operation.blocks
    return found


def _declares_halves(function: Function) -> bool:
    declared = [type_ for _, type_ in function.inputs]
    declared += [type_ for operation in function.block.operations for _, type_ in operation.outputs]
    return any(isinstance(type_, TensorType) and type_.dtype.name == "fp16" for type_ in declared)


def _predict(model: MLModel, data: dict[str, Any], state: Any = None) -> dict[str, Any]:
    """Returns what Core ML's ``predict`` would, from the saved package."""
    if model.package_path is None:
        _LOG.unknown = "no ML program, but a neural network of before iOS 15"
        raise ContractError(_LOG.unknown)
    program = open_package(Path(model.package_path))
    name = model.function_name or program.default
    function = program.functions[name]
    _LOG.operations |= _operations(function)
    _LOG.halves |= _declares_halves(function)
    try:
        evaluator = Evaluator(program, precision="fp16")
    except ContractError as error:
        _LOG.unknown = error.message
        raise
    declared = dict(function.inputs)
    features = {feature.name: feature for feature in program.inputs[name]}
    feeds = {key: _fed(value, features[key], declared[key]) for key, value in data.items()}
    try:
        outputs = evaluator.run(feeds, function=name, state=None if state is None else state.values)
    except ContractError as error:  # in the words of Core ML, which tests of bad inputs look for
        raise RuntimeError(f"Unable to compute the prediction using ML Program: {error.message}") from error
    _LOG.predictions += 1
    shown = {feature.name: feature for feature in program.outputs[name]}
    return {key: _shown(value, shown[key]) for key, value in outputs.items()}


def _fed(value: Any, feature: Feature, type_: Any) -> Any:
    assert isinstance(type_, TensorType)
    if isinstance(value, Image.Image):
        array = np.asarray(value)
        array = array[None, None] if array.ndim == 2 else array[..., :3].transpose(2, 0, 1)[None]
        return (array[:, ::-1] if feature.image == "BGR" else array).astype(type_.dtype.numpy)
    array = np.asarray(value)
    return (array.reshape(()) if type_.shape == () else array).astype(type_.dtype.numpy)


def _shown(value: Any, feature: Feature) -> Any:
    if feature.image is not None:
        picture = np.clip(np.round(value[0]), 0, 255).astype(np.uint8)
        return Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0))
    # Core ML has no scalars at its interface.
    return np.atleast_1d(value).astype(feature.dtype.numpy) if feature.dtype is not None else value


class _State:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def read_state(self, name: str) -> Any:
        """Returns a state's value."""
        return self.values[name]

    def write_state(self, name: str, value: Any) -> None:
        """Sets a state's value."""
        self.values[name] = np.asarray(value, dtype=self.values[name].dtype)


def _make_state(model: MLModel) -> _State:
    program = open_package(Path(model.package_path))
    return _State(Evaluator(program).make_state(model.function_name))


def _write(record: dict[str, Any]) -> None:
    version = evaluator_version(record["operations"], _SOURCES)
    line = json.dumps({**record, "rule": RULE, "evaluator": version})
    with Path(os.environ["FEWSTEP_MIL_RECORDS"]).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def _name(item: pytest.Item) -> str:
    return item.nodeid.split("ops/tests/")[-1]


def _converting(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a conversion that refuses at once what the evaluator would not know: 7,000 cases of recurrent networks.

    coremltools rewrites dialects, and folds what depends on constants alone; both are converted.
    """
    known, core = known_operations(), SSAOpRegistry.core_ops

    def converted(program: Any, *args: Any, **options: Any) -> Any:
        for function in program.functions.values():
            for operation in function.operations:
                computed = any(output.val is None for output in operation.outputs)
                if operation.op_type in core and operation.op_type not in known and computed:
                    _LOG.operations.add(operation.op_type)
                    _LOG.unknown = f"unknown operation {operation.op_type} {operation.name!r}"
                    raise ContractError(_LOG.unknown)
        return convert(program, *args, **options)

    return converted


def _comparing(compare: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a comparison that can be made to fp16's precision: one unit in the last place of the largest value."""

    def compared(*, expected_outputs: dict[str, Any] | None = None, **options: Any) -> Any:
        arrays = [value for value in (expected_outputs or {}).values() if isinstance(value, np.ndarray)]
        _LOG.halves |= any(array.dtype == np.float16 for array in arrays)
        if _LOG.wide:
            largest = max((float(np.abs(a).max(initial=0)) for a in arrays if a.dtype.kind == "f"), default=0.0)
            options["atol"] = max(options["atol"], _UNIT * largest)
        return compare(expected_outputs=expected_outputs, **options)

    return compared


def pytest_configure(config: pytest.Config) -> None:
    """Puts the evaluator in Core ML's place."""
    testing_utils._IS_MACOS = True
    testing_utils.ct_convert = _converting(testing_utils.ct_convert)
    testing_utils.compare_backend = _comparing(testing_utils.compare_backend)
    # Each conversion ends with a full collection, which costs as much as the conversion. Python collects by itself.
    _converters_entry.gc = SimpleNamespace(collect=lambda: 0)
    # coremltools examines the program after each of its 80 passes, a quarter of the rest. Here values are examined.
    Program.validate = lambda self, check_essential_scope=False: None
    # Patterns to look for, which are built anew in each conversion: a third of what is left.
    for owner, name in (
        (optimize_activation.fuse_gelu_tanh_approximation, "get_gelu_pattern1"),
        (optimize_activation.fuse_gelu_tanh_approximation, "get_gelu_pattern2"),
        (optimize_activation.FusePreluPattern1, "get_prelu_pattern"),
        (optimize_activation.FusePreluPattern2, "get_prelu_pattern"),
    ):
        setattr(owner, name, staticmethod(functools.cache(getattr(owner, name))))
    ct.models.utils._macos_version = lambda: (15, 2)
    MLModel.predict = _predict
    MLModel.make_state = _make_state


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes the next cases without a record, and puts those first that spread over each function's parameters.

    Functions of which a case had an operation that the evaluator does not know come last.
    """
    counts = Counter(_name(item).split("::")[0] for item in items)
    Path(os.environ["FEWSTEP_MIL_COUNTS"]).write_text(json.dumps(counts, indent=1), encoding="utf-8")
    records = Path(os.environ["FEWSTEP_MIL_RECORDS"])
    lines = records.read_text(encoding="utf-8").splitlines() if records.is_file() else []
    found = [json.loads(line) for line in lines]
    done = {record["test"] for record in found}
    unknown = {record["test"].split("[")[0] for record in found if record["unknown"]}
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.split("[")[0], []).append(item)
    turn: dict[int, int] = {}
    for cases in functions.values():
        bits = len(cases).bit_length()
        spread = sorted(range(len(cases)), key=lambda i, bits=bits: int(f"{i:0{bits}b}"[::-1], 2))
        turn.update({id(cases[i]): at for at, i in enumerate(spread)})
    waiting = [item for item in items if _name(item) not in done]
    waiting.sort(key=lambda item: (_name(item).split("[")[0] in unknown, turn[id(item)]))
    chosen = waiting[: int(os.environ["FEWSTEP_MIL_BATCH"])]
    kept = {id(item) for item in chosen}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = chosen


def pytest_collection_finish(session: pytest.Session) -> None:
    """Takes the modules and the 20,000 collected cases out of the garbage collector's sight: a second each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Starts a record for the test, whose random inputs follow from its name.

    A test with the tolerance of an fp32 backend that fails on values of fp16 is compared again, to fp16's precision.
    """
    global _LOG
    _LOG = _Log()
    seed = zlib.crc32(_name(item).encode())
    np.random.seed(seed)
    _write({**_EMPTY, "test": _name(item), "outcome": "failed", "reason": INTERRUPTED})
    try:
        return (yield)
    except AssertionError:
        if "precision='fp32'" not in item.nodeid or not _LOG.predictions or not _LOG.halves:
            raise
        _LOG = _Log()
        _LOG.wide = True
        np.random.seed(seed)
        return item.runtest()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """Keeps the outcome with what was evaluated."""
    report: pytest.TestReport = yield
    if report.when == "call" or (report.when == "setup" and not report.passed):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        error = ""
        if call.excinfo is not None:
            error = str(call.excinfo.value).strip().split("\n")[0][:200] or call.excinfo.typename
        _write(
            {
                "test": _name(item),
                "outcome": report.outcome,
                "operations": sorted(_LOG.operations - PLUMBING),
                "predictions": _LOG.predictions if report.when == "call" else 0,
                "unknown": _LOG.unknown if report.when == "call" else None,
                "wide": _LOG.wide,
                "reason": reason or error,
            }
        )
    return report

"""Integers of the golden pack: a few operations of each quantized component, to compare without PyTorch or a source.

Each has the integers that it takes and, at every place, the least and the largest integer that rounding explains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.contract import ComponentSpec
from fewstep.errors import BundleError
from fewstep.runtimes import get_runtime
from fewstep.runtimes.base import PointResult
from fewstep.runtimes.parity.harness import LOWERING, Check
from fewstep.strict import parse_json

Array = npt.NDArray[Any]

_REBUILD = "build the bundle again"
FILE = "golden/operations/integers.safetensors"
MOST_OPERATIONS, MOST_BYTES = 8, 1 << 20


@dataclass(frozen=True)
class GoldenOperation:
    """What lies between quantized tensors: its integers in and out.

    Attributes:
        component: the component.
        step: of the recorded call.
        point: the quantized tensor that it computes, as the program names it.
        path: module path of the tensor.
        given: the quantized tensors that it reads, by name.
        inputs: inputs of the component that it reads.
        least: the least integer that is right, at each place.
        most: the largest.
    """

    component: str
    step: int | None
    point: str
    path: str
    given: Mapping[str, Array]
    inputs: Mapping[str, Array]
    least: Array
    most: Array

    @property
    def bytes(self) -> int:
        """How large it is in the pack."""
        return sum(a.nbytes for a in (*self.given.values(), *self.inputs.values(), self.least, self.most))


def save_operations(operations: Sequence[GoldenOperation], folder: Path) -> None:
    """Writes operations into the golden pack of a bundle's folder; none leave no file."""
    if not operations:
        return
    arrays: dict[str, Array] = {}
    heads = []
    for i, one in enumerate(operations):
        # Quantized tensors and inputs that several operations of a component read are stored once.
        arrays |= {f"{one.component}/given/{name}": values for name, values in one.given.items()}
        arrays |= {f"{one.component}/in/{name}": values for name, values in one.inputs.items()}
        arrays |= {f"{i}/least": one.least, f"{i}/most": one.most}
        head = {"component": one.component, "step": one.step, "point": one.point, "path": one.path}
        heads.append({**head, "given": list(one.given), "inputs": list(one.inputs)})
    (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    save_file(contiguous, folder / FILE, metadata={"fewstep": json.dumps(heads)})


def load_operations(bundle: Bundle) -> list[GoldenOperation]:
    """Returns the operations of a bundle's golden pack, none where it has none.

    Raises:
        BundleError: the file is damaged.
    """
    if FILE not in bundle.manifest.files:
        return []
    path = bundle.file(FILE)
    try:
        with safe_open(path, framework="numpy") as stream:
            heads = parse_json((stream.metadata() or {})["fewstep"], str(path), error=BundleError, hint=_REBUILD)
            return [
                GoldenOperation(
                    head["component"],
                    head["step"],
                    head["point"],
                    head["path"],
                    {name: stream.get_tensor(f"{head['component']}/given/{name}") for name in head["given"]},
                    {name: stream.get_tensor(f"{head['component']}/in/{name}") for name in head["inputs"]},
                    stream.get_tensor(f"{i}/least"),
                    stream.get_tensor(f"{i}/most"),
                )
                for i, head in enumerate(heads)
            ]
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} has no operations: {error}", hint=_REBUILD) from error


def golden_operation_checks(bundle: Bundle, runtime: str) -> tuple[list[Check], str | None]:
    """Returns the checks of the golden operations on a runtime, and why there are none."""
    operations = load_operations(bundle)
    components = dict.fromkeys(one.component for one in operations)
    if not components:
        return [], "quantized operations were not compared one by one: the golden pack has none"
    checks: list[Check] = []
    for component in components:
        artifact = bundle.manifest.artifact(runtime, component)
        run = get_runtime(runtime).of(artifact).run_cut
        if run is None:
            return [], f"quantized operations were not compared one by one: {runtime} shows nothing of what is inside"
        some = [one for one in operations if one.component == component]
        checks += _compare(run, bundle.file(artifact.path), bundle.manifest.components[component], some)
    return checks, None


def _compare(
    run: Callable[[Path, Mapping[str, Array], Mapping[str, Array], Sequence[str]], dict[str, Array]],
    path: Path,
    spec: ComponentSpec,
    operations: Sequence[GoldenOperation],
) -> list[Check]:
    given = {name: values for one in operations for name, values in one.given.items()}
    known = {name: values for one in operations for name, values in one.inputs.items()}
    # What none of them reads is wanted all the same.
    feeds = {t.name: known.get(t.name, np.zeros(t.shape, dtype=t.dtype)) for t in spec.inputs}
    results = run(path, feeds, given, [one.point for one in operations])
    checks = []
    for one in operations:
        point = judged_operation(one, results[one.point])
        where = (LOWERING, "operation", one.component, one.step, "golden pack", f"{one.path} ({one.point})")
        checks.append(Check(*where, "unexplained integers, negated", -float(point.unexplained), 0.0))
    return checks


def judged_operation(operation: GoldenOperation, values: Array) -> PointResult:
    """Returns how many integers of an operation's result no rounding explains."""
    same = values.shape == operation.least.shape
    strange = (values < operation.least) | (values > operation.most) if same else np.ones_like(operation.least, bool)
    count = int(np.count_nonzero(strange))
    return PointResult(operation.point, operation.path, operation.least.size, count, 0, count)

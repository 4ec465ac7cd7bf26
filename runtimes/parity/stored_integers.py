"""Integers of an artifact's file, compared exactly with those of the plan; and every constant looked at for NaN.

No network runs and no torch is needed: the file is read, and what it holds is looked up by hash in the table that was
written beside the plan. Files turn weights for their kernels, so that every order of a weight's axes is tried.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.manifest import PLAN_FOLDER, Artifact
from fewstep.errors import BundleError
from fewstep.runtimes import get_runtime
from fewstep.runtimes.base import Array, Stored
from fewstep.runtimes.parity.harness import LOWERING, Check

STORED = "stored"
TABLE = "integers.json"
# Orders of axes that kernels are known to want come first: im2col, channels last.
_ORDERS: Mapping[int, Sequence[tuple[int, ...]]] = {
    2: [(0, 1), (1, 0)],
    4: [(0, 1, 2, 3), (2, 3, 1, 0), (0, 2, 3, 1), (1, 2, 3, 0)],
}
_NIBBLES_ZERO = 8
_NOTHING: Mapping[str, Any] = {"weights": (), "biases": (), "grids": (), "zero_points": ()}


def digest(values: Array) -> str:
    """Returns a hash of values in their order, whatever the shape."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def load_table(bundle: Bundle) -> dict[str, Any] | None:
    """Returns the table of a bundle's integers, None for a bundle in float.

    Raises:
        BundleError: a quantized bundle has none.
    """
    if bundle.manifest.recipe.get("quantization") is None:
        return None
    path = bundle.file(f"{PLAN_FOLDER}/{TABLE}")
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in bundle.manifest.components if name not in table]
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint="build the bundle again") from error
    if missing:
        raise BundleError(f"{path} says nothing of {missing[0]}", hint="build the bundle again")
    return table


def stored_checks(bundle: Bundle, runtime: str, table: Mapping[str, Any] | None) -> tuple[list[Check], list[str]]:
    """Returns the checks of what the files of a runtime hold, and what could not be read.

    Args:
        bundle: the bundle.
        runtime: one of its runtimes.
        table: what they must hold, see `fewstep.optimize.quantize.integer_table`; None for a bundle in float, whose
            constants are only looked at for what is not finite.
    """
    checks: list[Check] = []
    unread = []
    for artifact in (a for a in bundle.manifest.artifacts if a.runtime == runtime):
        read = get_runtime(runtime).of(artifact).stored
        if read is None:
            unread.append(artifact.component)
            continue
        found = read(bundle.file(artifact.path))
        checks += _artifact(artifact, found, None if table is None else table[artifact.component])
    named = ", ".join(dict.fromkeys(unread))
    notes = (
        [f"the stored integers of {named} were not compared: files of {runtime} cannot be read back"] if named else []
    )
    return checks, notes


def _artifact(artifact: Artifact, found: Stored, expected: Mapping[str, Any] | None) -> Iterator[Check]:
    wanted = _Wanted(expected or _NOTHING)
    broken = []
    for name, values in found.constants():
        if not _finite(values):
            broken.append(name)
        wanted.see(name, values)
    component, of = artifact.component, artifact.variant or None

    def check(metric: str, tensor: str | None, value: float) -> Check:
        return Check(LOWERING, STORED, component, None, of, tensor, metric, value, 1.0)

    yield check("finite constants", ", ".join(broken[:3]) or None, float(not broken))
    if expected is None or not any(expected[kind] for kind in ("weights", "biases", "grids")):
        return
    for metric, paths in wanted.missing().items():
        yield check(metric, ", ".join(dict.fromkeys(paths[:3])) or None, float(not paths))
    if found.grids is not None:
        for grid in expected["grids"]:
            uses = found.grids.get(grid["name"])
            if uses is None and of:  # graphs of other rows have grids of their own
                continue
            same = uses is not None and all(_same_grid(grid, use) for use in uses)
            yield check("grid as planned", grid["path"], float(same))


def _same_grid(grid: Mapping[str, Any], use: tuple[float, int]) -> bool:
    scale, zero = use
    return bool(np.float32(scale) == np.float32(grid["scale"]) and zero == grid["zero_point"])


def _finite(values: Array) -> bool:
    """Returns whether constants are numbers; a mask of zeros and minus infinities is one, and so is a bound."""
    if values.dtype.kind != "f" or bool(np.isfinite(values).all()):
        return True
    if values.size == 1:
        return not bool(np.isnan(values).any())
    others = values[~np.isneginf(values)]
    return bool((others == 0).all())


class _Wanted:
    """What a table wants, crossed off as constants are seen."""

    def __init__(self, expected: Mapping[str, Any]) -> None:
        self._weights = {(w["integers"], w["scales"]): w for w in expected["weights"]}
        self._biases = {b["integers"]: b for b in expected["biases"]}
        self._scales: set[str] = set()
        self._floats: set[str] = set()
        self._integers: set[str] = set()
        self._shapes: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        for weight in expected["weights"]:
            self._shapes[math.prod(weight["shape"])].add(tuple(weight["shape"]))
        self._counts = {w["count"] for w in expected["weights"]}
        self._lengths = {math.prod(b["shape"]) for b in expected["biases"]}
        self._zeros = {0, *expected["zero_points"]}
        self._known = {w["integers"] for w in expected["weights"]}
        self._strangers: list[str] = []

    def see(self, name: str, values: Array) -> None:
        """Crosses off what a constant is."""
        if values.dtype in (np.int8, np.uint8):
            self._see_bytes(name, values)
        elif values.dtype == np.int32 and values.size in self._lengths:
            self._integers.add(digest(values))
        elif values.dtype.kind == "f" and values.size in self._counts | self._lengths:
            self._see_floats(values.astype(np.float32))

    def missing(self) -> dict[str, list[str]]:
        """Returns the paths of what was not seen, by metric."""
        weights, scales = [], []
        for (integers, scale), weight in self._weights.items():
            weights += [] if integers in self._integers else [weight["path"]]
            scales += [] if scale in self._scales else [weight["path"]]
        biases = [
            bias["path"]
            for integers, bias in self._biases.items()
            if integers not in self._integers and bias["values"] not in self._floats
        ]
        found = {"integers of weights as planned": weights, "scales of weights as planned": scales}
        if self._biases:
            found["biases as planned"] = biases
        return {**found, "zero points as planned": self._strangers}

    def _see_bytes(self, name: str, values: Array) -> None:
        for shape in self._shapes.get(values.size, ()):
            for candidate in _turned(values, shape):
                if (found := digest(candidate.astype(np.int8))) in self._known:
                    self._integers.add(found)
                    return
        for shape in self._shapes.get(2 * values.size, ()):  # two of 4 bits to a byte
            nibbles = np.stack([values & 15, values >> 4], axis=-1).astype(np.int16) - _NIBBLES_ZERO
            for candidate in _turned(nibbles, shape):
                if (found := digest(candidate.astype(np.int8))) in self._known:
                    self._integers.add(found)
                    return
        if (
            values.size
            and not {int(value) for value in np.unique(values)} <= self._zeros
            and values.size not in self._shapes
        ):
            self._strangers.append(name)

    def _see_floats(self, values: Array) -> None:
        found = {digest(values)}
        if values.size > 1:
            squeezed = values.reshape([n for n in values.shape if n > 1])
            found.add(digest(squeezed.T))
            # One scale may be written once for every channel.
            found |= {digest(values.reshape(-1)[:1])} if (values == values.reshape(-1)[0]).all() else set()
        self._scales |= found
        self._floats |= found


def _turned(values: Array, shape: Sequence[int]) -> Iterator[Array]:
    """Yields what a stored array is if it holds a weight of a shape in any order of its axes."""
    rank = len(shape)
    first = _ORDERS.get(rank, [tuple(range(rank))])
    for order in (*first, *(o for o in itertools.permutations(range(rank)) if o not in first)):
        turned = values.reshape([shape[axis] for axis in order])
        yield turned.transpose(np.argsort(order))

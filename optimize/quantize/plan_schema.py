"""What a stored plan may hold, checked before any of it is used: see `fewstep.optimize.quantize.plan`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt

from fewstep.errors import QuantizationError
from fewstep.recipe.target_profiles import PROFILES
from fewstep.strict import validator

Array = npt.NDArray[Any]
HINT = "build the bundle again; plans are not edited"
_ROWS = 4096
_INTEGER = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
_SCALE = {"type": "number", "exclusiveMinimum": 0, "maximum": 3.0e38}
_GRID = {
    "type": "object",
    "properties": {
        "dtype": {"enum": ["int8", "uint8", "int32"]},
        "bits": {"type": "integer", "minimum": 1, "maximum": 32},
        "low": _INTEGER,
        "high": _INTEGER,
        "scale": {"anyOf": [_SCALE, {"type": "array", "minItems": 1, "maxItems": _ROWS, "items": _SCALE}]},
        "zero_point": {"anyOf": [_INTEGER, {"type": "array", "minItems": 1, "maxItems": _ROWS, "items": _INTEGER}]},
        "axis": {"type": "integer", "minimum": 0, "maximum": 7},
        "group_size": {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31},
    },
    "required": ["dtype", "low", "high"],
    "oneOf": [{"required": ["scale", "zero_point"]}, {"required": ["axis", "group_size"]}],
    "additionalProperties": False,
}
_NAMES = {"type": "array", "items": {"type": "string"}}
_COMPONENT = {
    "type": "object",
    "properties": {
        "network": {"type": "string"},
        "split": {"type": "boolean"},
        "float_bias": {"type": "boolean"},
        "weights": {"type": "object", "additionalProperties": _GRID},
        "activations": {"type": "object", "additionalProperties": _GRID},
        "rounded": _NAMES,
        "computes": _NAMES,
        "dynamic": _NAMES,
        "outputs": _NAMES,
        "reasons": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["network", "split", "weights", "activations", "rounded", "computes", "outputs", "reasons"],
    "additionalProperties": False,
}
_PLAN = validator(
    {
        "type": "object",
        "properties": {
            "version": {"type": "integer"},
            "source": {"type": "string"},
            "profile": {"enum": list(PROFILES)},
            "components": {"type": "object", "additionalProperties": _COMPONENT},
            "quality": {"type": "object"},
        },
        "required": ["version", "source", "profile", "components", "quality"],
        "additionalProperties": False,
    }
)


def check_plan(head: Any, arrays: Mapping[str, Array], where: Path) -> None:
    """Raises QuantizationError unless a plan's text has the right form and its arrays are those that it names."""
    wrong = jsonschema.exceptions.best_match(islice(_PLAN.iter_errors(head), 50))
    if wrong is not None:
        place = "/".join(str(part) for part in wrong.absolute_path) or "(top)"
        raise QuantizationError(f"{where}: {place[:300]}: {wrong.message[:500]}", hint=HINT)
    wanted = set()
    for component, plan in head["components"].items():
        for name, grid in {**plan["weights"], **plan["activations"]}.items():
            if "axis" in grid:
                wanted |= {f"{component}/{name}/scale", f"{component}/{name}/zero_point"}
                _check_channels(f"{component}/{name}", grid, arrays, where)
        wanted |= {f"{component}/{name}/rounded" for name in plan["rounded"]}
    if wanted != arrays.keys():
        name = min(wanted ^ arrays.keys())
        what = "is not there" if name in wanted else "is named by no grid"
        raise QuantizationError(f"{where}: the array {name} {what}", hint=HINT)
    for name, array in arrays.items():
        if name.endswith("/rounded") and array.dtype.kind not in "iu":
            raise QuantizationError(f"{where}: {name} is {array.dtype}, expected integers", hint=HINT)


def _check_channels(name: str, grid: Mapping[str, Any], arrays: Mapping[str, Array], where: Path) -> None:
    """Raises QuantizationError unless the scales and zero points of channels are arrays that belong together."""
    for part, dtype in (("scale", np.float32), ("zero_point", np.int32)):
        array = arrays.get(f"{name}/{part}")
        sides = 1 if grid["group_size"] is None else 2
        if array is None or array.dtype != dtype or array.ndim != sides or array.size == 0:
            found = "missing" if array is None else f"{array.dtype} {list(array.shape)}"
            raise QuantizationError(
                f"{where}: {name}/{part} is {found}, expected {np.dtype(dtype)} of {sides} sides", hint=HINT
            )

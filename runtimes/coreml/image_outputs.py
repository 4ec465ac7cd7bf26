"""Pictures as a Core ML package hands them to an app: images of 8 bits a channel, computed inside of the package.

``level = round(255 clip(scale y + shift, 0, 1))`` with the numbers of the contract, where y is the decoder's output.
The package rounds too, so that it does not matter what Core ML makes of a fraction. What y was can be read off an
evaluation: `Unrounded`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fewstep.bundle.contract import OutputSpec, TensorSpec
from fewstep.errors import BundleError
from fewstep.runtimes.base import Array
from fewstep.runtimes.coreml.mil import MilProgram, Operation
from fewstep.runtimes.coreml.mil.program import Feature

# The key in a package's metadata under which it says how levels and the decoder's output belong together.
METADATA = "fewstep.picture"
# What is appended to an output's name for its value before it becomes a picture.
UNROUNDED = "_unrounded"
# Colour layouts by number of channels.
LAYOUTS = {1: "GRAYSCALE", 3: "RGB"}


def to_metadata(picture: OutputSpec) -> str:
    """Returns what a package says of its picture."""
    return json.dumps({"scale": picture.scale, "shift": picture.shift})


def from_metadata(program: MilProgram, where: str) -> OutputSpec:
    """Returns what a package says of its picture.

    Raises:
        BundleError: it says nothing, or not two numbers.
    """
    try:
        values = json.loads(program.metadata[METADATA])
        return OutputSpec(scale=float(values["scale"]), shift=float(values["shift"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{where} gives an image and does not say of which values", hint="build the bundle again"
        ) from error


def image_features(program: MilProgram) -> tuple[Feature, ...]:
    """Returns the outputs that are images."""
    return tuple(feature for feature in program.outputs[program.default] if feature.image is not None)


def fits(feature: Feature, tensor: TensorSpec) -> bool:
    """Returns whether an image is one of a tensor [1, channels, height, width]."""
    return tensor.shape[:1] + tensor.shape[2:] == (1, *feature.shape) and LAYOUTS.get(tensor.shape[1]) == feature.image


class Unrounded:
    """Observes an evaluation, and keeps the values of its images before they were rounded, by the outputs' names."""

    def __init__(self, program: MilProgram) -> None:
        self.values: dict[str, Array] = {}
        self._names = {feature.name + UNROUNDED: feature.name for feature in image_features(program)}

    def __call__(self, operation: Operation, arguments: Mapping[str, Any], results: tuple[Any, ...]) -> None:
        """Looks at the results of one operation."""
        for (name, _), value in zip(operation.outputs, results, strict=True):
            if name in self._names:
                self.values[self._names[name]] = value

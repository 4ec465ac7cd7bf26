"""Ends a Core ML model with the picture of its output: see `fewstep.runtimes.coreml.image_outputs`."""

from __future__ import annotations

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types
from coremltools.converters.mil.mil import Program as MilProgram
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

from fewstep.numerics.outputs import LEVELS
from fewstep.runtimes.coreml.image_outputs import UNROUNDED

PASS = "fewstep::picture_output"


@register_pass(namespace="fewstep")
class picture_output(AbstractGraphPass):  # type: ignore[misc]  # the pass's name is the class's
    """Puts the levels of a picture in the place of each function's only output.

    After coremltools' own passes, which would fold the scale into the last convolution's weights.
    """

    # Options of passes are text.
    scale = "1"
    shift = "0"

    def apply(self, prog: MilProgram) -> None:
        """Does so in every function of a program."""
        for function in prog.functions.values():
            _end(function, float(self.scale), float(self.shift))


def _end(function: Function, scale: float, shift: float) -> None:
    (output,) = function.outputs
    name, source = output.name, output
    if output.op.op_type == "cast" and output.op.x.dtype == types.fp16:
        source = output.op.x  # levels are whole numbers of fp16: the cast may come after them
    number = np.float16 if source.dtype == types.fp16 else np.float32
    with function:
        levels = mb.mul(x=source, y=number(LEVELS * scale), name=f"{name}_scaled")
        levels = mb.add(x=levels, y=number(LEVELS * shift), name=f"{name}_shifted")
        levels = mb.clip(x=levels, alpha=number(0), beta=number(LEVELS), name=f"{name}_clipped")
        levels = mb.round(x=levels, name=f"{name}_levels")
        if source is not output:
            levels = mb.cast(x=levels, dtype="fp32", name=f"{name}_picture")
    function.replace_uses_of_var_after_op(anchor_op=levels.op, old_var=output, new_var=levels)
    output.set_name(f"{name}_unused")
    source.set_name(name + UNROUNDED)
    levels.set_name(name)

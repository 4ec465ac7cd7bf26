"""Gives the values of a package's further functions the names back that only the first has in full.

A function adds nothing but its graph to a package, and most of a graph is names. What their values are called in the
network is in the package's metadata, once for all of them: by it they are compared with PyTorch's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace

from fewstep.runtimes.coreml.mil.program import Block, Constant, Function, MilProgram, Operation
from fewstep.runtimes.passes.short_names import lengthener

METADATA = "fewstep.names"


def restored(program: MilProgram) -> MilProgram:
    """Returns a program with the names that its values had; one with its own names as it is."""
    if METADATA not in program.metadata:
        return program
    told = json.loads(program.metadata[METADATA])
    lengthen = functools.cache(lengthener(told["stems"]))
    functions = {
        name: replace(function, block=_block(function, lengthen)) if name in told["functions"] else function
        for name, function in program.functions.items()
    }
    return replace(program, functions=functions)


def _block(function: Function, lengthen: Callable[[str], str]) -> Block:
    """Returns a function's block, which has none in it, with other names for all but its inputs and outputs."""
    block = function.block
    kept = {*(name for name, _ in function.inputs), *block.outputs}

    def name(short: str) -> str:
        return short if short in kept else lengthen(short)

    def value(bound: str | Constant) -> str | Constant:
        return name(bound) if isinstance(bound, str) else bound

    operations = tuple(
        Operation(
            one.type,
            name(one.name),
            {key: tuple(map(value, bound)) for key, bound in one.inputs.items()},
            tuple((name(short), type_) for short, type_ in one.outputs),
            one.attributes,
            one.blocks,
        )
        for one in block.operations
    )
    return Block(block.inputs, block.outputs, operations)

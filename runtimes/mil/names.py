"""Gives the values of a package's further functions the names back that only the first has in full.

A function adds nothing but its graph to a package, and most of a graph is names. What their values are called in the
network is in the package's metadata, once for all of them: by it they are compared with PyTorch's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from fewstep.runtimes.mil.program import Block, MilProgram, Operation
from fewstep.runtimes.short_names import lengthener

METADATA = "fewstep.names"


def restored(program: MilProgram) -> MilProgram:
    """Returns a program with the names that its values had; one with its own names as it is."""
    if METADATA not in program.metadata:
        return program
    told = json.loads(program.metadata[METADATA])
    lengthen = lengthener(told["stems"])
    functions = {
        name: replace(function, block=_block(function.block, {n for n, _ in function.inputs}, lengthen))
        if name in told["functions"]
        else function
        for name, function in program.functions.items()
    }
    return replace(program, functions=functions)


def _block(block: Block, inputs: set[str], lengthen: Callable[[str], str]) -> Block:
    """Returns a block without blocks in it, with other names for all but its inputs and outputs."""
    kept = inputs | {*block.outputs}

    def name(short: str) -> str:
        return short if short in kept else lengthen(short)

    def operation(one: Operation) -> Operation:
        return replace(
            one,
            name=name(one.name),
            inputs={
                key: tuple(name(value) if isinstance(value, str) else value for value in values)
                for key, values in one.inputs.items()
            },
            outputs=tuple((name(value), type_) for value, type_ in one.outputs),
        )

    return replace(block, operations=tuple(operation(one) for one in block.operations))

"""The values of weights that stay in their files, for converters that want them in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fewstep.bundle.program import Program


@contextmanager
def materialized(program: Program) -> Iterator[None]:
    """Puts the values of weights that stay in their files into the program, for the length of a block."""
    if program.weights is None:
        yield
        return
    state = program.exported.state_dict
    fakes: Mapping[str, torch.Tensor] = dict(state)
    names = set(program.weights)  # a mapping may read a value to say whether it has it
    try:
        for name in [*fakes]:
            if name in names:
                value = program.weights[name].to(fakes[name].dtype)
                state[name] = torch.nn.Parameter(value, False) if isinstance(fakes[name], torch.nn.Parameter) else value
        yield
    finally:
        state.update(fakes)

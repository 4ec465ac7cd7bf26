"""What a loop in plain PyTorch does to its network's output before it meets the latent: part of the network then.

The table of a sampler is linear. A ``tanh`` or the mean of a mixture is not, and neither has the latent's shape, but as
long as it sees nothing beside the network's output it can go with the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewstep.bundle.contract import DENOISER, LATENT
from fewstep.export.record.run_record import Run, flatten_tensors
from fewstep.export.record.tape import Glue, GlueModule

_aten = torch.ops.aten
# Operations that the table has a number for, or a clip, if all else in them is constant.
_IN_THE_TABLE = frozenset(
    {
        _aten.mul.Tensor,
        _aten.mul.Scalar,
        _aten.div.Tensor,
        _aten.div.Scalar,
        _aten.neg.default,
        _aten.clone.default,
        _aten._to_copy.default,
        _aten.clamp.default,
        _aten.clip.default,
    }
)


@dataclass(frozen=True)
class Post:
    """Operations on the network's output alone; the last of them is recorded ``after`` so many others."""

    glue: Glue
    after: int

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        """Returns what the loop makes of an output of the network."""
        made: torch.Tensor = GlueModule(self.glue)(output)[0]
        return made


def read_post(run: Run) -> Post | None:
    """Returns what the loop of a recorded run does to the output in every step, None if the table says all of it."""
    calls = run.denoiser_calls
    ends = [*(call.position for call in calls[1:]), run.tape.position]
    outputs = [next(tensor for _, tensor in flatten_tensors(call.result, "")) for call in calls]
    chains = [run.tape.made_of(F, c.position, end) for F, c, end in zip(outputs, calls, ends, strict=True)]
    starts = [call.position for call in calls]
    for i in reversed(range(min(map(len, chains)))):
        each = [chain[i] for chain in chains]
        if each[0].op in _IN_THE_TABLE and each[0].sources == 1:
            continue
        after = {made.position - start for made, start in zip(each, starts, strict=True)}
        glues = [
            run.tape.cut([made.result], what=DENOISER, since=start, through=LATENT)
            for made, start in zip(each, starts, strict=True)
        ]
        if len(after) == 1 and _all_same(glues):
            return Post(glues[0], after.pop())
    return None


def _all_same(glues: Sequence[Glue]) -> bool:
    first = glues[0]
    return all(
        (glue.leaves, glue.steps, glue.targets) == (first.leaves, first.steps, first.targets)
        and len(glue.constants) == len(first.constants)
        and all(torch.equal(a, b) for a, b in zip(glue.constants, first.constants, strict=True))
        for glue in glues
    )

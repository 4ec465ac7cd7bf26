"""What the denoiser sees at each step, deep inside: how a sampler tells which steps are alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from fewstep.bundle.contract import DENOISER, is_denoiser
from fewstep.calibration.record import SampleRequest, record_samples
from fewstep.calibration.samplers import Floats
from fewstep.export import Description, Generator

_MIDDLES = ("mid_block", "middle_block")


def step_features(
    generator: Generator, described: Description, requests: Iterable[SampleRequest]
) -> tuple[Floats, str]:
    """Returns the features of each step, [trajectories, N, F], and where in the denoiser they were taken.

    From its middle block, else from the middle one of its longest list of blocks, else (and where its weights are not
    in memory, or steps call different networks) from its output.
    """
    several = sum(map(is_denoiser, generator.parts)) > 1
    path = None if several or generator.stored is not None else middle_of(generator.module(DENOISER))
    rows = []
    for request in requests:
        found: list[Floats] = []
        handle = None
        if path is not None:
            inner = generator.module(DENOISER).get_submodule(path)
            handle = inner.register_forward_hook(lambda *call: found.append(_flat(call[-1])))  # noqa: B023 - taken off below
        try:
            sample = next(record_samples(generator, described, [request]))
        finally:
            if handle is not None:
                handle.remove()
        if path is None:
            feeds = [feed for feed in sample.feeds if is_denoiser(feed.component)]
            found = [np.concatenate([a.ravel() for a in f.outputs.values()]).astype(np.float64) for f in feeds]
        # Guidance may call the network several times in a step: their features are side by side.
        rows.append(np.stack(found).reshape(request.steps, -1))
    return np.stack(rows), "the denoiser's output" if path is None else path


def middle_of(module: torch.nn.Module) -> str | None:
    """Returns the path of a network's middle block, or None where it has no list of blocks."""
    for name in _MIDDLES:
        if isinstance(getattr(module, name, None), torch.nn.Module):
            return name
    lists = {path: m for path, m in module.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 2}
    if not lists:
        return None
    longest = max(lists, key=lambda path: len(lists[path]))
    return f"{longest}.{len(lists[longest]) // 2}"


def _flat(output: Any) -> Floats:
    tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors])

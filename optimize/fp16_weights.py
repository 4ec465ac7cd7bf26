"""Rounds weights to fp16 values, still held and computed with in fp32."""

from __future__ import annotations

from dataclasses import replace

import torch

from fewstep.errors import ExportError
from fewstep.export.generator import Generator
from fewstep.export.source.offloaded_networks import StoredNetworks
from fewstep.optimize.passes import PassNote, copies


class RoundWeights:
    """Rounds every fp32 parameter and buffer to the nearest fp16 value.

    The rounded network is the reference for lowering, which may then store its weights as halves without loss. A
    weight beyond fp16's range is refused, not clipped.
    """

    def __call__(self, generator: Generator) -> tuple[Generator, PassNote]:
        """Returns a generator with rounded copies of its modules, and how many tensors changed.

        Raises:
            ExportError: a weight does not fit in fp16.
        """
        if generator.stored is not None:
            return _stored(generator, generator.stored)
        modules = copies(generator)
        changed = total = 0
        for component, module in modules.items():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if tensor.dtype != torch.float32:
                    continue
                rounded = tensor.detach().half().float()
                if not torch.isfinite(rounded).all() and torch.isfinite(tensor).all():
                    raise _beyond(component, name, tensor)
                total += 1
                changed += not torch.equal(rounded, tensor)
                tensor.data.copy_(rounded)
        note = PassNote("round weights to fp16", changed > 0, f"{changed} of {total} tensors changed")
        return generator.with_modules(modules), note


def _stored(generator: Generator, stored: StoredNetworks) -> tuple[Generator, PassNote]:
    """Rounds weights that stay in their files: each is rounded when it is read."""
    changed = total = 0
    for attribute, component in {part.attribute: name for name, part in generator.parts.items()}.items():
        for name, tensor in stored.weights(attribute, generator.module(component)).stored.items():
            total += 1
            if tensor.dtype == torch.float16:
                continue
            values = tensor.read().float()
            rounded = values.half().float()
            if not torch.isfinite(rounded).all() and torch.isfinite(values).all():
                raise _beyond(component, name, values)
            changed += not torch.equal(rounded, values)
    note = PassNote("round weights to fp16", changed > 0, f"{changed} of {total} tensors changed")
    return replace(generator, stored=stored.rounded()), note


def _beyond(component: str, name: str, values: torch.Tensor) -> ExportError:
    return ExportError(
        f"{component}: {name} has values up to {values.abs().max():.4g}, beyond fp16's 65504",
        hint="use weights = 'fp32' for this generator",
    )

"""Traces networks that compute with complex numbers as programs of real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fewstep.errors import ExportError
from fewstep.export.trace.complex_pairs import ComplexAsPairs, Pair, is_complex

Tensor = torch.Tensor


@contextmanager
def complex_as_pairs(module: torch.nn.Module) -> Iterator[None]:
    """Computes complex numbers as pairs of real ones within the context, those among a module's weights included.

    What is called within raises ExportError where a pair has no rule.
    """
    with _weights_as_pairs(module), ComplexAsPairs():
        yield


def in_real_numbers(
    module: torch.nn.Module, export: Callable[[], torch.export.ExportedProgram]
) -> torch.export.ExportedProgram:
    """Returns what ``export`` traces of a module; if that computes with complex tensors, its trace in real ones.

    Raises:
        ExportError: something of it has no form in real numbers.
    """
    exported = export()
    if not has_complex(exported):
        return exported
    with complex_as_pairs(module):
        exported = export()
    if has_complex(exported):
        node = next(n for n in exported.graph.nodes if is_complex(n.meta.get("val")))
        raise ExportError(
            f"{node.name} is a complex tensor that is no weight of {type(module).__name__}",
            hint="register it as a buffer, or make it in forward",
        )
    return exported


def has_complex(exported: torch.export.ExportedProgram) -> bool:
    """Returns whether a program computes with complex tensors."""
    return any(is_complex(node.meta.get("val")) for node in exported.graph.nodes)


@contextmanager
def _weights_as_pairs(module: torch.nn.Module) -> Iterator[None]:
    """Lets each complex parameter or buffer be two real buffers, ``NAME_real`` and ``NAME_imag``."""
    held: list[tuple[torch.nn.Module, type, Any, str, Tensor]] = []
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            found = {name: tensor for name, tensor in tensors.items() if tensor is not None and is_complex(tensor)}
            held += [(owner, type(owner), tensors, name, tensor) for name, tensor in found.items()]
    try:
        for owner, _, tensors, name, tensor in held:
            del tensors[name]
            _split(owner, name, tensor.detach())
        yield
    finally:
        for owner, cls, tensors, name, tensor in held:
            owner.__class__ = cls
            for part in ("real", "imag"):
                owner._buffers.pop(f"{name}_{part}", None)
            tensors[name] = tensor


def _split(owner: torch.nn.Module, name: str, tensor: Tensor) -> None:
    # Looked up at each use: a trace puts other tensors in the place of buffers.
    both = property(lambda self: Pair(getattr(self, f"{name}_real"), getattr(self, f"{name}_imag")))
    cls = type(owner)
    owner.__class__ = type(cls.__name__, (cls,), {name: both, "__module__": cls.__module__})
    owner.register_buffer(f"{name}_real", tensor.real.clone())
    owner.register_buffer(f"{name}_imag", tensor.imag.clone())

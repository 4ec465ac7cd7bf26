"""Stand-ins for tensors and parameters that have shapes but no values."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.errors import ExportError


def fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """Returns a tensor of the same shape and dtype on the CPU, without values."""
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def fake_arguments(value: Any, mode: FakeTensorMode) -> Any:
    """Returns nested arguments with fake tensors in place of theirs."""
    if isinstance(value, torch.Tensor):
        return fake(value, mode)
    if isinstance(value, Mapping):
        return {key: fake_arguments(item, mode) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(fake_arguments(item, mode) for item in value)
    return value


def with_fake_parameters(module: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """Returns a copy of a module whose parameters are fake; buffers stay as they are."""
    copied = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    fakes: dict[int, torch.nn.Parameter] = {}  # a tied parameter stays one
    for owner in copied.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                if id(parameter) not in fakes:
                    fakes[id(parameter)] = torch.nn.Parameter(fake(parameter, mode), requires_grad=False)
                owner._parameters[name] = fakes[id(parameter)]
    return copied


def fake_trace(module: torch.nn.Module, example: Sequence[torch.Tensor]) -> torch.export.ExportedProgram:
    """Returns the trace of a module with parameters on the meta device; the module is left as it is.

    The parameters of the program are fake: a runtime needs ``Program.weights`` to compile it.

    Args:
        module: buffers are real, see `fewstep.export.source.lazy_weights.meta_module`.
        example: the inputs; only their shapes and dtypes count, so they may be on the meta device too.

    Raises:
        ExportError: ``torch.export`` cannot trace it.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            inputs = tuple(fake(tensor, mode) for tensor in example)
            return torch.export.export(with_fake_parameters(module, mode), inputs)
    except Exception as error:  # torch.export raises many classes, most of them private; all mean the same here
        raise refused(type(module).__name__, "be traced", error) from error


def refused(what: str, verb: str, error: Exception) -> ExportError:
    """Returns the error for a module that does not do without values."""
    first_line = str(error).strip().split("\n", 1)[0]
    return ExportError(
        f"{what} cannot {verb} without its weights: {type(error).__name__}: {first_line}",
        hint="a module whose forward reads values of its weights must be traced with them",
    )

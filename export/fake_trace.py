"""Traces modules whose parameters have no values, so that a network of any size is traced in the same memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.errors import ExportError


def fake_trace(module: torch.nn.Module, example: Sequence[torch.Tensor]) -> torch.export.ExportedProgram:
    """Returns the trace of a module with parameters on the meta device; the module is left as it is.

    The parameters of the program are fake: a runtime needs ``Program.weights`` to compile it.

    Args:
        module: buffers are real, see `fewstep.export.weights.meta_module`.
        example: the inputs; only their shapes and dtypes count, so they may be on the meta device too.

    Raises:
        ExportError: ``torch.export`` cannot trace it.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            inputs = tuple(_fake(tensor, mode) for tensor in example)
            return torch.export.export(_with_fake_parameters(module, mode), inputs)
    except Exception as error:  # torch.export raises many classes, most of them private; all mean the same here
        first_line = str(error).strip().split("\n", 1)[0]
        raise ExportError(
            f"{type(module).__name__} cannot be traced without its weights: {type(error).__name__}: {first_line}",
            hint="a module whose forward reads values of its weights must be traced with them",
        ) from error


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _with_fake_parameters(module: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    copied = copy.deepcopy(module)
    fakes: dict[int, torch.nn.Parameter] = {}  # a tied parameter stays one
    for owner in copied.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                if id(parameter) not in fakes:
                    fakes[id(parameter)] = torch.nn.Parameter(_fake(parameter, mode), requires_grad=False)
                owner._parameters[name] = fakes[id(parameter)]
    return copied

"""Traces modules whose parameters have no values, so that a network of any size is traced in the same memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.errors import ExportError
from fewstep.export.generator import Part
from fewstep.export.reference import Call, name_inputs, name_outputs
from fewstep.export.tape import Glue, Ref
from fewstep.export.weights import meta_module, stored_weights
from fewstep.export.wiring import WiredModule, Wiring
from fewstep.manifest import ComponentSpec, TensorSpec
from fewstep.program import Program


def stored_program(
    folder: Path,
    component: str,
    part: Part,
    arguments: Mapping[str, Any],
    cls: type[torch.nn.Module] | None = None,
) -> Program:
    """Returns a component traced from its folder, its values still there: the specification binds no inputs.

    Args:
        folder: where ``config.json`` and the weights are.
        component: its name in the bundle.
        part: the method to trace and the folder name of its ONNX export.
        arguments: what its pipeline gives to the method; of tensors only shapes and dtypes count.
        cls: the module's class; None takes the one that the configuration names.

    Raises:
        SourceError: configuration or weights are missing, damaged or of another network.
        ExportError: the module cannot be traced.
    """
    module = meta_module(folder, cls)
    weights = stored_weights(module, folder)
    call = fake_call(module, component, part, arguments)
    exported = fake_trace(WiredModule(_unglued(call, part), module, part.method).eval(), tuple(call.inputs.values()))
    spec = ComponentSpec(_specs(call.inputs), _specs(call.outputs), {})
    return Program(component, part.folder, exported, spec, weights.under("module"))


def fake_call(module: torch.nn.Module, component: str, part: Part, arguments: Mapping[str, Any]) -> Call:
    """Returns the call that a run with these arguments would have recorded, with fake outputs.

    Args:
        module: parameters may be on the meta device.
        component: its name in the bundle.
        part: the method that is called.
        arguments: of tensors only shapes and dtypes count.

    Raises:
        ExportError: the method does not take them.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = _with_fake_parameters(module, mode)
    try:
        with torch.no_grad(), mode:
            result = getattr(copied, part.method)(**_fake_arguments(arguments, mode))
    except Exception as error:  # whatever the module raises
        raise _refused(f"{component} ({type(module).__name__})", "run", error) from error
    inputs, outputs = name_inputs(part.folder, arguments), name_outputs(part.folder, result)
    return Call(component, component, 0, 0, arguments, result, inputs, outputs)


def _unglued(call: Call, part: Part) -> Wiring:
    """Returns the wiring in which every tensor of a call is an input of the program."""
    names, results = tuple(call.inputs), tuple(call.outputs)
    glue = Glue(names, (), (), tuple(Ref(("leaf", name)) for name in names))
    return Wiring(call.component, call.component, part.folder, call, names, glue, results, None, results, "before")


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
        raise _refused(type(module).__name__, "be traced", error) from error


def _refused(what: str, verb: str, error: Exception) -> ExportError:
    first_line = str(error).strip().split("\n", 1)[0]
    return ExportError(
        f"{what} cannot {verb} without its weights: {type(error).__name__}: {first_line}",
        hint="a module whose forward reads values of its weights must be traced with them",
    )


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _fake_arguments(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, torch.Tensor):
        return _fake(value, mode)
    if isinstance(value, Mapping):
        return {key: _fake_arguments(item, mode) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_fake_arguments(item, mode) for item in value)
    return value


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


def _specs(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items())

"""Traces modules whose parameters have no values, so that a network of any size is traced in the same memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.bundle.contract import ComponentSpec, TensorSpec
from fewstep.bundle.program import Program
from fewstep.export.generator import Part
from fewstep.export.record.run_record import Call, name_inputs, name_outputs
from fewstep.export.record.tape import Glue, Ref
from fewstep.export.source.lazy_weights import meta_module, stored_weights
from fewstep.export.trace.component_module import WiredModule, Wiring, normalise
from fewstep.export.trace.fake_tensors import fake_arguments, fake_trace, refused, with_fake_parameters


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
    exported = fake_trace(WiredModule(unglued(call, part), module, part.method).eval(), tuple(call.inputs.values()))
    normalise(exported)
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
    copied = with_fake_parameters(module, mode)
    try:
        with torch.no_grad(), mode:
            result = getattr(copied, part.method)(**fake_arguments(arguments, mode))
    except Exception as error:  # whatever the module raises
        raise refused(f"{component} ({type(module).__name__})", "run", error) from error
    inputs, outputs = name_inputs(part.folder, arguments), name_outputs(part.folder, result)
    return Call(component, component, 0, 0, arguments, result, inputs, outputs)


def unglued(call: Call, part: Part) -> Wiring:
    """Returns the wiring in which every tensor of a call is an input of the program."""
    names, results = tuple(call.inputs), tuple(call.outputs)
    glue = Glue(names, (), (), tuple(Ref(("leaf", name)) for name in names))
    return Wiring(call.component, call.component, part.folder, call, names, glue, results, None, results, "before")


def _specs(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items())

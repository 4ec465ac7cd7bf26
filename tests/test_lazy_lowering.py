"""A network compiled from its folder without its values in memory is the one compiled with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from fewstep.errors import ExportError
from fewstep.export.fake_trace import fake_call, stored_program
from fewstep.export.tracing import Traced
from fewstep.export.weights import StoredWeights
from fewstep.metrics import sqnr_db
from fewstep.program import Program
from fewstep.runtimes import ort_lower
from fewstep.runtimes.ort_weights import StoredInitializer
from tests.networks import NETWORKS, Network, network

LIMIT_DB = 120.0  # two float32 executions of one graph with one set of weights


def eager_program(made: Network, *, halves: bool) -> Program:
    """Returns the network traced with its values in memory, rounded as `RoundWeights` does."""
    if halves:
        for tensor in [*made.module.parameters(), *made.module.buffers()]:
            if tensor.dtype == torch.float32:
                tensor.data.copy_(tensor.half().float())
    call = fake_call(made.module, "network", made.part, made.arguments)
    traced = Traced(made.module, made.part.method, made.part.folder, call).eval()
    with torch.no_grad():
        exported = torch.export.export(traced, tuple(call.inputs.values()))
    lazy = stored_spec(call.inputs, call.outputs)
    return Program("network", made.part.folder, exported, lazy)


def stored_spec(inputs: Any, outputs: Any) -> Any:
    from fewstep.export.fake_trace import _specs
    from fewstep.manifest import ComponentSpec

    return ComponentSpec(_specs(inputs), _specs(outputs), {})


def values(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    graph = ir.load(path).graph
    return {str(n): v.const_value.numpy() for n, v in graph.initializers.items() if v.const_value is not None}


def run(path: Path, program: Program, made: Network) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {spec.name: tensor.numpy() for spec, tensor in zip(program.spec.inputs, _tensors(made), strict=True)}
    return list(session.run([spec.name for spec in program.spec.outputs], feeds))


def _tensors(made: Network) -> list[torch.Tensor]:
    return [value for value in made.arguments.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("weights", ["fp32", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_lazy_lowering_is_the_eager_one(name: str, weights: str, tmp_path: Path) -> None:
    made = network(name)
    made.module.save_pretrained(tmp_path / "source")
    program = stored_program(tmp_path / "source", "network", made.part, made.arguments)
    lazy = ort_lower.lower(program, tmp_path / "lazy", weights)
    eager = ort_lower.lower(eager_program(made, halves=weights == "fp16"), tmp_path / "eager", weights)

    stored, expected = values(tmp_path / "lazy" / lazy.path), values(tmp_path / "eager" / eager.path)
    print(set(stored)^set(expected))
    assert sorted(stored) == sorted(expected)
    for key, array in expected.items():
        assert stored[key].dtype == array.dtype, key
        np.testing.assert_array_equal(stored[key], array, err_msg=key)
    pairs = zip(
        run(tmp_path / "lazy" / lazy.path, program, made),
        run(tmp_path / "eager" / eager.path, program, made),
        strict=True,
    )
    for spec, (found, reference) in zip(program.spec.outputs, pairs, strict=True):
        assert sqnr_db(reference, found) >= LIMIT_DB, spec.name

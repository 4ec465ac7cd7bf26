"""Where the weights of an ONNX model are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from fewstep.runtimes.onnxruntime import runtime as ort
from fewstep.runtimes.onnxruntime.compile.lower import lower
from tests.support.quantized import program_of, random, run


@pytest.mark.parametrize(("size", "beside"), [(64, False), (640, True)])  # 16 KiB and 1.6 MiB
def test_large_weights_are_beside_the_graph(size: int, beside: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = random(1, size)
    program = program_of(torch.nn.Linear(size, size), x)
    artifact = lower(program, tmp_path, "fp32")
    path = tmp_path / artifact.path
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"][: 1 + beside]
    assert artifact.bytes == sum(p.stat().st_size for p in path.parent.iterdir())
    assert (path.stat().st_size < 8 << 10) == beside
    tensors = [value.const_value for value in ir.load(path).graph.initializers.values()]
    assert any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors) == beside
    feeds = {program.spec.inputs[0].name: x.numpy()}
    for mapped in (False, True):
        with ort.open_session(path, program.spec, 1, mapped=mapped) as session:
            (found,) = session.run(feeds).values()
        np.testing.assert_allclose(found, run(program, x).numpy(), atol=1e-5)

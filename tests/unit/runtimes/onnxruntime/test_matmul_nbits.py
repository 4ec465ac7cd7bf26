"""Linear layers with 4-bit weights that stay packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from fewstep.bundle.contract import ComponentSpec, TensorSpec
from fewstep.bundle.program import Program
from fewstep.numerics.metrics import sqnr_db
from fewstep.optimize.quantize import ComponentPlan, quantize
from fewstep.optimize.quantize.apply import float_graph
from fewstep.optimize.quantize.plan import network_sha256
from fewstep.optimize.quantize.qparams import weight_grid
from fewstep.runtimes.onnxruntime.compile import lower as ort_lower

INPUTS, OUTPUTS = 64, 48


def program(rows: int) -> Program:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(INPUTS, INPUTS), torch.nn.GELU(), torch.nn.Linear(INPUTS, OUTPUTS))
    x = torch.randn(1, rows, INPUTS)
    spec = ComponentSpec(
        (TensorSpec("x", "float32", tuple(x.shape)),),
        (TensorSpec("y", "float32", (1, rows, OUTPUTS)),),
        {"x": "latent"},
        "loop",
    )
    return Program("network", "network", torch.export.export(module.eval(), (x,)), spec)


@pytest.mark.parametrize(("rows", "packed"), [(600, 2), (64, 0)])
def test_packed_where_it_is_not_slower_and_exact(rows: int, packed: int, tmp_path: Path) -> None:
    float_program = program(rows)
    module, sites = float_graph(float_program)
    weights = {
        site.weight: weight_grid(module.get_parameter(site.weight), 4, axis=0, granularity="group", group_size=32)
        for site in sites
    }
    quantized = quantize(float_program, ComponentPlan(network_sha256(sites), weights, {}))
    artifact = ort_lower.lower(quantized, tmp_path, "fp32")
    model = ir.load(tmp_path / artifact.path)
    assert sum(node.op_type == "MatMulNBits" for node in model.graph) == packed
    x = np.random.default_rng(0).normal(size=(1, rows, INPUTS)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / artifact.path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = quantized.exported.module()(torch.from_numpy(x)).numpy()
    # Float arithmetic on the same weights: another order of sums costs about 120 dB.
    assert sqnr_db(expected, session.run(None, {"x": x})[0]) > 110

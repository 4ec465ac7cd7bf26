"""A network compiled from its folder without its values in memory is the one compiled with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from fewstep.bundle.program import Program
from fewstep.errors import ExportError
from fewstep.export.trace.component_module import WiredModule, normalise
from fewstep.export.trace.fake_trace import fake_call, fake_trace, stored_program, unglued
from fewstep.numerics.metrics import sqnr_db
from fewstep.runtimes.onnxruntime.compile import lower as ort_lower
from fewstep.runtimes.onnxruntime.compile.writer import save_model
from tests.support.networks import NETWORKS, Network, network

LIMIT_DB = 120.0  # two float32 executions of one graph with one set of weights
# Compiling a network twice takes seconds: two for every run, the others with the slow tests.
QUICK = (("unet", "fp16"), ("t5", "fp32"))
CASES = [(name, weights) for name in NETWORKS for weights in ("fp32", "fp16")]
Values = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Returns a tiny UNet traced from its folder."""
    made = network("unet")
    folder = tmp_path_factory.mktemp("unet")
    made.module.save_pretrained(folder)
    return stored_program(folder, "denoiser", made.part, made.arguments)


def with_values(made: Network, program: Program, *, halves: bool) -> Program:
    """Returns the program traced with its values in memory, rounded as `RoundWeights` does."""
    for tensor in [*made.module.parameters(), *made.module.buffers()]:
        if halves and tensor.dtype == torch.float32:
            tensor.data.copy_(tensor.half().float())
    call = fake_call(made.module, "network", made.part, made.arguments)
    traced = WiredModule(unglued(call, made.part), made.module, made.part.method).eval()
    with torch.no_grad():
        exported = torch.export.export(traced, tuple(call.inputs.values()))
    normalise(exported)
    return replace(program, exported=exported, weights=None)


def values(path: Path) -> Values:
    initializers = ir.load(path).graph.initializers.items()
    return {str(name): value.const_value.numpy() for name, value in initializers if value.const_value is not None}


def run(path: Path, program: Program, made: Network) -> dict[str, np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tensors = [value.numpy() for value in made.arguments.values() if isinstance(value, torch.Tensor)]
    feeds = {spec.name: tensor for spec, tensor in zip(program.spec.inputs, tensors, strict=True)}
    names = [spec.name for spec in program.spec.outputs]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize(
    ("name", "weights"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_lazy_lowering_is_the_eager_one(name: str, weights: str, tmp_path: Path) -> None:
    made = network(name)
    made.module.save_pretrained(tmp_path / "source")
    program = stored_program(tmp_path / "source", "network", made.part, made.arguments)
    eager = with_values(made, program, halves=weights == "fp16")
    lazy_path, eager_path = (
        tmp_path / kind / ort_lower.lower(lowered, tmp_path / kind, weights).path
        for kind, lowered in (("lazy", program), ("eager", eager))
    )

    stored, expected = values(lazy_path), values(eager_path)
    assert sorted(stored) == sorted(expected)
    for key, array in expected.items():
        assert stored[key].dtype == array.dtype, key
        np.testing.assert_array_equal(stored[key], array, err_msg=key)
    found, reference = run(lazy_path, program, made), run(eager_path, program, made)
    for output, array in reference.items():
        assert sqnr_db(array, found[output]) >= LIMIT_DB, output


class Watched(Mapping[str, torch.Tensor]):
    """Weights that note which of them are read."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.weights = weights
        self.read: list[str] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_large_values_are_read_once_and_only_to_be_written(unet: Program, tmp_path: Path) -> None:
    assert unet.weights is not None
    watched = Watched(unet.weights)
    program = replace(unet, weights=watched)
    large = {name for name, tensor in unet.weights.items() if tensor.numel() > 8192}  # the optimizer's own limit
    model = ort_lower.translate(program, halves=True).model
    assert large
    assert not large & set(watched.read)
    watched.read.clear()
    ort_lower.save(program, model, tmp_path, "fp16")
    assert sorted(large) == sorted(name for name in watched.read if name in large)


def test_weight_beyond_half_precision_is_named(unet: Program, tmp_path: Path) -> None:
    assert unet.weights is not None
    spoiled = dict(unet.weights) | {"module.conv_out.bias": torch.tensor([0.0, 1e5, 0.0, 0.0])}
    program = replace(unet, weights=spoiled)
    with pytest.raises(ExportError, match=r"module.conv_out.bias has values up to 1e\+05, beyond fp16's 65504"):
        ort_lower.lower(program, tmp_path, "fp16")


def test_one_file_is_what_protobuf_writes(unet: Program, tmp_path: Path) -> None:
    model = ort_lower.translate(unet).model
    save_model(model, tmp_path / "streamed.onnx", external=False)
    ir.save(model, tmp_path / "whole.onnx")
    streamed, whole = (onnx.load(tmp_path / f"{name}.onnx") for name in ("streamed", "whole"))
    assert values(tmp_path / "streamed.onnx").keys() == values(tmp_path / "whole.onnx").keys()
    for proto in (streamed, whole):
        proto.graph.ClearField("value_info")  # of initializers, the file leaves out what they say themselves
        proto.graph.initializer.sort(key=lambda tensor: tensor.name)
    assert streamed == whole


def test_module_that_reads_its_weights_is_refused() -> None:
    class Reads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if self.weight.item() > 0 else x

    with pytest.raises(ExportError, match="Reads cannot be traced without its weights") as caught:
        fake_trace(Reads(), [torch.empty(1, device="meta")])
    assert caught.value.hint == "a module whose forward reads values of its weights must be traced with them"

"""NaN and Inf in weights are found by looking at all of them, in memory and in files, whatever the prompt."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import SourceError
from fewstep.export import describe, load
from fewstep.export.source import finite_weights as finite
from fewstep.export.source.finite_weights import _wrong, check_finite
from fewstep.export.source.offloaded_networks import StoredNetworks
from tests.support import tiny

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("at", [0, 7, 24])
def test_every_element_is_looked_at(dtype: torch.dtype, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_CHUNK", 8)
    values = torch.arange(25, dtype=torch.float32)
    assert _wrong(values.to(dtype).view(5, 5), True) is None
    values[at] = NAN
    assert _wrong(values.to(dtype).view(5, 5), True) == ("NaN", at)


def test_infinity_is_wrong_in_weights_and_may_be_in_buffers() -> None:
    values = torch.tensor([0.0, -INF, 1.0])
    assert _wrong(values, True) == ("Inf", 1)
    assert _wrong(values, False) is None, "a mask"
    assert _wrong(torch.tensor([-INF, NAN]), False) == ("NaN", 1)
    assert _wrong(torch.tensor([1, 2]), True) is None
    assert _wrong(torch.empty(0), True) is None


def generator_of(module: torch.nn.Module, stored: Any = None) -> Any:
    return SimpleNamespace(
        parts={"denoiser": SimpleNamespace(attribute="unet")}, module=lambda _: module, stored=stored
    )


def test_buffers_of_a_network(tmp_path: Path) -> None:
    norm = torch.nn.BatchNorm2d(4)
    norm.register_buffer("mask", torch.tensor([-INF]))
    norm.register_buffer("computed", torch.tensor([NAN]), persistent=False)
    check_finite(generator_of(norm))
    assert norm.running_var is not None
    norm.running_var[2] = NAN
    with pytest.raises(SourceError, match="unet: running_var has NaN among its weights, first at element 2"):
        check_finite(generator_of(norm))


def test_a_source_with_one_nan_is_refused_in_memory_and_from_its_files(tmp_path: Path) -> None:
    source = tiny.lcm_folder(tmp_path / "source")
    path = source / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = "mid_block.resnets.0.conv1.weight"
    generator = load(str(source))
    stored = replace(generator, stored=StoredNetworks(source))
    check_finite(generator)
    check_finite(stored)
    tensors[name].view(-1)[17] = NAN
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=re.escape(f"{path}: {name} has NaN among its weights, first at element 17")):
        check_finite(stored)
    with pytest.raises(SourceError, match=f"unet: {name} has NaN among its weights, first at element 17") as caught:
        describe(load(str(source)), [2])
    assert "download it again" in str(caught.value.hint)

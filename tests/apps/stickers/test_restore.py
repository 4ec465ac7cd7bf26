"""Training goes on from the committed weights: the states hold exactly what the folder holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.errors import SourceError
from fewstep.stickers import WEIGHTS, distill, package, restore
from fewstep.stickers.training import load_state, save_state


def test_states_are_the_committed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "WORK", tmp_path)
    restore.restore()
    state = load_state(tmp_path / "teacher.pt")
    assert state is not None
    assert state["step"] == 0
    unet = load_file(WEIGHTS / "unet" / "diffusion_pytorch_model.safetensors")
    kept = {name.removeprefix("unet."): t for name, t in state["ema"].items() if name.startswith("unet.")}
    assert unet.keys() - kept.keys() == {"time_embedding.cond_proj.weight"}
    assert all(torch.equal(tensor, unet[name].float()) for name, tensor in kept.items())
    student = load_state(tmp_path / "student.pt")
    assert student is not None
    assert student["ema"].keys() == unet.keys()
    assert all(torch.equal(tensor, unet[name].float()) for name, tensor in student["ema"].items())
    with pytest.raises(SourceError, match="holds training states"):
        restore.restore()


def test_variant_of_other_latents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "WORK", tmp_path)
    monkeypatch.setenv("STICKERS_VARIANT", "large")
    with pytest.raises(SourceError, match="factor 4 and 4 channels"):
        restore.restore()
    assert not any(tmp_path.iterdir())


def test_package_of_restored_states_is_the_committed_network_and_prefers_refined_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (restore, package, distill):
        monkeypatch.setattr(module, "WORK", tmp_path)
    restore.restore()
    committed = load_file(WEIGHTS / "unet" / "diffusion_pytorch_model.safetensors")
    pipeline = package.assemble()
    assert all(torch.equal(tensor, committed[name].float()) for name, tensor in pipeline.unet.state_dict().items())

    both = torch.nn.ModuleDict({"text_encoder": pipeline.text_encoder, "unet": pipeline.unet})
    save_state(tmp_path / "refined.pt", {"ema": {name: tensor + 1 for name, tensor in both.state_dict().items()}})
    refined = package.assemble()
    assert all(torch.equal(tensor, committed[name].float() + 1) for name, tensor in refined.unet.state_dict().items())
    text = load_file(WEIGHTS / "text_encoder" / "model.safetensors")
    assert all(torch.equal(t, text[name].float() + 1) for name, t in refined.text_encoder.state_dict().items())

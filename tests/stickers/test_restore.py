"""Training goes on from the committed weights: the states hold exactly what the folder holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.errors import SourceError
from fewstep.stickers import WEIGHTS, restore
from fewstep.stickers.training import load_state


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
    with pytest.raises(SourceError, match="holds training states"):
        restore.restore()

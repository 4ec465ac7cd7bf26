"""diffusers with PEFT merges the same LoRA files to the same weights.

An oracle that we did not write: ``load_lora_weights`` and ``fuse_lora``, with PEFT, which the compiler does without.
``make interop`` runs it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

pytest.importorskip("peft")

import fewstep
from fewstep.export import load
from tests.support import loras, tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.turbo_folder(tmp_path_factory.mktemp("peft") / "source")


@pytest.mark.parametrize("style", ["header", "bare", "diffusers", "processor", "kohya", "ldm"])
def test_same_weights(source: Path, tmp_path: Path, style: str) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    unet = loras.branches(pipeline.unet, loras.UNET_MODULES, rank=3, alpha=2.0, seed=0)
    text_names = loras.text_modules(pipeline.text_encoder)
    text = loras.branches(pipeline.text_encoder, text_names, rank=3, alpha=2.0, seed=1)
    path = loras.write(tmp_path / "lora.safetensors", style, unet, text)
    if style == "ldm":  # diffusers knows these names in SDXL alone, and drops them in silence elsewhere
        state, alphas = StableDiffusionXLPipeline.lora_state_dict(
            tmp_path, weight_name=path.name, unet_config=pipeline.unet.config
        )
        pipeline.load_lora_into_unet(state, alphas, pipeline.unet, adapter_name="one")
        pipeline.load_lora_into_text_encoder(state, alphas, pipeline.text_encoder, adapter_name="one")
    else:
        pipeline.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="one")
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    ours = load(fewstep.SourceSpec(str(source), loras=(fewstep.Lora(str(path), 0.7),))).pipeline
    plain = load(str(source)).pipeline
    for name in ("unet", "text_encoder"):
        expected = getattr(pipeline, name).state_dict()
        for key, weight in getattr(ours, name).state_dict().items():
            assert torch.allclose(weight, expected[key], rtol=1e-5, atol=1e-6), key
    for name, modules in (("unet", loras.UNET_MODULES), ("text_encoder", text_names)):
        for module in modules:
            one, other = (getattr(p, name).get_submodule(module).weight for p in (ours, plain))
            assert not torch.allclose(one, other, atol=1e-3), module

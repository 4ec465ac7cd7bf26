"""Optimum's ONNX Runtime pipeline opens the ONNX folder of a bundle unchanged and draws the same picture.

An oracle that we did not write: another loader, another sampler, another tokenizer, on our files. It needs versions of
transformers and diffusers that the compiler does not use, hence the environment of its own (`make interop`). The
bundle is in step form: Optimum gives the network its time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import diffusers.schedulers.scheduling_lcm
import numpy as np
import pytest
import torch
from optimum.onnxruntime import ORTLatentConsistencyModelPipeline, ORTPipelineForText2Image

import fewstep
from fewstep.numerics import noise
from fewstep.numerics.metrics import psnr_db

BUNDLE = Path(os.environ.get("FEWSTEP_BUNDLE", "build/stickers-step"))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """Returns Optimum's pipeline on the bundle's ``onnxruntime`` folder."""
    loaded = ORTPipelineForText2Image.from_pretrained(BUNDLE / "onnxruntime")
    assert isinstance(loaded, ORTLatentConsistencyModelPipeline)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("prompt", "seed"), [("red apple", 7), ("cat face", 0)])
def test_same_picture(pipeline: Any, prompt: str, seed: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = fewstep.Bundle.open(BUNDLE)
    shape = (1, *bundle.manifest.contract.latent_shape)
    drawn = iter(range(1, steps))

    def step_noise(*_: object, **__: object) -> torch.Tensor:
        return torch.from_numpy(noise.normal(seed, next(drawn), shape))

    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", step_noise)
    latents = torch.from_numpy(noise.normal(seed, 0, shape))
    reference = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=bundle.manifest.contract.guidance.scale,
        latents=latents,
        output_type="np",
    ).images[0]
    ours = bundle.generate(prompt, seed, steps=steps).picture_HWC
    # The same models in the same runtime; only the sampler's float32 sums are in another order.
    assert psnr_db(np.asarray(reference, np.float32), ours) >= 80

"""Trains the teacher: text encoder and latent diffusion UNet together, v-prediction, captions dropped for guidance."""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys

import torch
from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from fewstep.stickers.autoencoder import make_autoencoder, pictures
from fewstep.stickers.sets import styled_caption, training_images
from fewstep.stickers.training import (
    WORK,
    MuonAdamW,
    learning_rate,
    load_state,
    save_state,
    steps,
    training_precision,
    update_ema,
)
from fewstep.stickers.variant import GRID, variant
from fewstep.stickers.vocabulary import MAX_TOKENS, VOCABULARY_SIZE, make_tokenizer

WIDTH = 192
CAPTION_DROPOUT = 0.1
# The text encoder comes trained (see `text`); it may follow the UNet, slowly.
TEXT_RATE = 0.5
# Short enough that what the average remembers of the plateau is gone by the end of the decay.
EMA_DECAY = 0.998


def make_text_encoder() -> CLIPTextModel:
    """Returns an untrained CLIP text encoder of three layers."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=VOCABULARY_SIZE - 2,
        eos_token_id=VOCABULARY_SIZE - 1,
        pad_token_id=VOCABULARY_SIZE - 1,
    )
    return CLIPTextModel(config)


def make_unet(*, time_cond_proj_dim: int | None = None) -> UNet2DConditionModel:
    """Returns an untrained UNet on 16x16 latents; ``time_cond_proj_dim`` adds the student's guidance embedding."""
    channels = variant().latent_channels
    return UNet2DConditionModel(
        sample_size=GRID,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # diffusers' name for the number of heads
        norm_num_groups=16,
        time_cond_proj_dim=time_cond_proj_dim,
    )


def make_scheduler() -> DDPMScheduler:
    """Returns the noise schedule of teacher and student."""
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"
    )


def load_autoencoder() -> AutoencoderTiny:
    """Returns the trained autoencoder."""
    model = make_autoencoder()
    model.load_state_dict(torch.load(WORK / "autoencoder.pt", weights_only=True)["model"])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def latents(model: AutoencoderTiny) -> tuple[torch.Tensor, float]:
    """Returns the latents of all pictures at unit spread, float32 [P, C, 16, 16], and the factor that makes it so."""
    z = torch.cat([model.encode(x).latents for x in pictures().split(64)])
    factor = round(1 / z.std().item(), 4)
    return z * factor, factor


class Captions:
    """Token ids of random captions."""

    def __init__(self) -> None:
        self.images = training_images()
        folder = WORK / "tokenizer"
        self.tokenizer = make_tokenizer([image.sticker for image in self.images], folder)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Returns int64 [B, 24]."""
        return self.tokenizer(
            texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids

    def draw(self, indices: list[int], rng: random.Random, *, dropout: float) -> torch.Tensor:
        """Returns the ids of one random caption for each picture."""
        return self([("" if rng.random() < dropout else styled_caption(self.images[i], rng)) for i in indices])


def train(iterations: int, *, batch: int = 32, peak: float = 1.2e-3, seed: int = 0) -> None:
    """Trains (or goes on training) until ``iterations``; keeps an exponential average of the weights."""
    torch.manual_seed(seed)
    captions = Captions()
    z_all, factor = latents(load_autoencoder())
    scheduler = make_scheduler()
    text_encoder, unet = make_text_encoder(), make_unet().to(memory_format=torch.channels_last)
    model = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    text_encoder.load_state_dict(torch.load(WORK / "text.pt", weights_only=True)["text_encoder"])
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = MuonAdamW([(unet, 1.0), (text_encoder, TEXT_RATE)], peak)
    first = 0
    if (state := load_state(WORK / "teacher.pt")) is not None:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)
    running = 0.0
    denoise = torch.compile(unet)
    for step in steps(first, iterations):
        noise_rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        indices = torch.randint(len(z_all), (batch,), generator=noise_rng)
        ids = captions.draw(indices.tolist(), random.Random(seed * 1_000_003 + step), dropout=CAPTION_DROPOUT)
        z = z_all[indices].contiguous(memory_format=torch.channels_last)
        noise = torch.randn(z.shape, generator=noise_rng)
        # More of the noisy half, where only the caption can tell what to draw and where few-step samplers call.
        t = (1000 * torch.rand(batch, generator=noise_rng) ** 0.5).long()
        x = scheduler.add_noise(z, noise, t)
        with training_precision():
            v = denoise(x, t, text_encoder(ids).last_hidden_state).sample
        loss = F.mse_loss(v.float(), scheduler.get_velocity(z, noise, t))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(learning_rate(step, iterations, peak=peak, decay=0.35))
        update_ema(ema, model, min(EMA_DECAY, (step + 1) / (step + 10)))
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"loss {running:.4f}", file=sys.stderr, flush=True)
        if (step + 1) % 500 == 0 or step + 1 == iterations:
            states = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(WORK / "teacher.pt", {**states, "step": step + 1, "latent_factor": factor})
            (WORK / "teacher.json").write_text(json.dumps({"step": step + 1, "loss": running}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=20_000)
    train(parser.parse_args().iterations)

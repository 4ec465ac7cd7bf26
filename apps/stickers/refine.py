"""Trains the student on, with its text encoder, straight on the pictures and on its own few-step trajectory.

A caption of this data set names one image, so what a consistency function has to return at any noise level is known
without a teacher. A step calls the student twice with gradients: at the last timestep, where the caption alone says
what to generate, and at a later timestep of a few-step schedule, on the first call's own result with new noise (or, for
a share, on the training image with noise). Both have the image as their target, so the second call learns to correct
what the first got wrong. An image costs as much work as in `distill`, and none of it is a teacher's. It goes on from
`distill` or from the weights in the tree (`restore`).

Shapes: B batch, C latent channels, H x W latent size, L tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from fewstep.stickers.distill import (
    GUIDANCE_FEATURES,
    GUIDANCE_RANGE,
    NoiseLevels,
    consistency,
    guidance_embedding,
    pseudo_huber,
)
from fewstep.stickers.teacher import Captions, latents, load_autoencoder, make_text_encoder, make_unet
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

LAST_T = 999
LATER_T = (879, 759, 639, 519, 399, 259, 139)
"""The later timesteps of the schedules of 2, 4 and 8 steps (rounded to the grid of 50)."""
TRUE_SHARE = 0.25
"""How often the second call starts from the training picture: its own results alone drift away from the data."""
TEXT_RATE = 0.5
EMA_DECAY = 0.96


@dataclass(frozen=True)
class Drawn:
    """What one step draws: pictures, two noises, the later timesteps, who starts from the truth, guidance, captions."""

    z_BCHW: Tensor
    noise_BCHW: Tensor
    later_noise_BCHW: Tensor
    later_t_B: Tensor
    true_B: Tensor
    w_B: Tensor
    ids_BL: Tensor


def draw(z_all: Tensor, captions: Captions, step: int, *, batch: int, seed: int) -> Drawn:
    """Returns the draw of any step, from a seed and the step's number alone; each epoch sees each picture once."""
    number = (seed + 104_729) * 1_000_003 + step
    rng = torch.Generator().manual_seed(number)
    index_B = shuffled(len(z_all), step, batch=batch, seed=seed)
    z = z_all[index_B].contiguous(memory_format=torch.channels_last)
    low, high = GUIDANCE_RANGE
    return Drawn(
        z_BCHW=z,
        noise_BCHW=torch.randn(z.shape, generator=rng),
        later_noise_BCHW=torch.randn(z.shape, generator=rng),
        later_t_B=torch.tensor(LATER_T)[torch.randint(len(LATER_T), (batch,), generator=rng)],
        true_B=torch.rand(batch, generator=rng) < TRUE_SHARE,
        w_B=low + (high - low) * torch.rand(batch, generator=rng),
        ids_BL=captions.draw(index_B.tolist(), random.Random(number), dropout=0.0),
    )


def shuffled(count: int, step: int, *, batch: int, seed: int) -> Tensor:
    """Returns the picture numbers of a step: consecutive ones of an endless row of permutations."""
    start = step * batch
    epochs = range(start // count, (start + batch - 1) // count + 1)
    rows = [torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7_919 + epoch)) for epoch in epochs]
    offset = start - epochs[0] * count
    return torch.cat(rows)[offset : offset + batch]


def losses(student: UNet2DConditionModel, text_BLC: Tensor, drawn: Drawn, levels: NoiseLevels) -> tuple[Tensor, Tensor]:
    """Returns the distance of the first and of the second call's clean picture to the truth, float32 scalars."""
    guidance = guidance_embedding(drawn.w_B, GUIDANCE_FEATURES)

    def clean(x: Tensor, t_B: Tensor) -> Tensor:
        v = student(x, t_B, text_BLC, timestep_cond=guidance).sample.float()
        return consistency(v, x, t_B, levels)

    last_B = torch.full_like(drawn.later_t_B, LAST_T)
    # A sampler starts from noise alone; the last timestep's trace of the picture would be a hint that it never gets.
    first = clean(drawn.noise_BCHW, last_B)
    start = torch.where(drawn.true_B.view(-1, 1, 1, 1), drawn.z_BCHW, first.detach())
    alpha, sigma = levels(drawn.later_t_B)
    second = clean(alpha * start + sigma * drawn.later_noise_BCHW, drawn.later_t_B)
    return pseudo_huber(first - drawn.z_BCHW), pseudo_huber(second - drawn.z_BCHW)


def load_student() -> tuple[torch.nn.ModuleDict, float]:
    """Returns text encoder and student of `distill` or of `restore`, averaged weights, and their latents' factor."""
    unet = make_unet(time_cond_proj_dim=GUIDANCE_FEATURES).to(memory_format=torch.channels_last)
    model = torch.nn.ModuleDict({"text_encoder": make_text_encoder(), "unet": unet})
    teacher = torch.load(WORK / "teacher.pt", weights_only=True)
    text = {k.removeprefix("text_encoder."): v for k, v in teacher["ema"].items() if k.startswith("text_encoder.")}
    model["text_encoder"].load_state_dict(text)
    model["unet"].load_state_dict(torch.load(WORK / "student.pt", weights_only=True)["ema"])
    return model, float(teacher["latent_factor"])


def train(iterations: int, *, batch: int, peak: float, seed: int, save_every: int) -> None:
    """Trains (or goes on training) until ``iterations``; the average of the weights is the result."""
    torch.manual_seed(seed)
    captions, levels = Captions(), NoiseLevels()
    z_all, own_factor = latents(load_autoencoder())
    model, factor = load_student()
    # The student's latents keep the scale that it was trained with, whatever images are added.
    z_all = z_all * (factor / own_factor)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    text_encoder, student = model["text_encoder"], model["unet"]
    assert isinstance(text_encoder, CLIPTextModel) and isinstance(student, UNet2DConditionModel)
    optimizer = MuonAdamW([(student, 1.0), (text_encoder, TEXT_RATE)], peak)
    first = 0
    if (state := load_state(WORK / "refined.pt")) is not None:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    running = [0.0, 0.0]
    for step in steps(first, iterations, say_every=10):
        drawn = draw(z_all, captions, step, batch=batch, seed=seed)
        with training_precision():
            parts = losses(student, text_encoder(drawn.ids_BL).last_hidden_state, drawn, levels)
        (parts[0] + parts[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(learning_rate(step, iterations, peak=peak, warmup=10, decay=0.5))
        update_ema(ema, model, min(EMA_DECAY, (step + 1) / (step + 10)))
        decay = 0.95 if step > first else 0.0
        running = [decay * a + (1 - decay) * b.item() for a, b in zip(running, parts, strict=True)]
        if (step + 1) % 10 == 0:
            print(f"first {running[0]:.4f}  second {running[1]:.4f}", file=sys.stderr, flush=True)
        if (step + 1) % save_every == 0 or step + 1 == iterations:
            states = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(WORK / "refined.pt", {**states, "step": step + 1})
            (WORK / "refined.json").write_text(json.dumps({"step": step + 1, "first": running[0]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=6e-4, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=20)
    options = parser.parse_args()
    train(
        options.iterations,
        batch=options.batch,
        peak=options.peak,
        seed=options.seed,
        save_every=options.save_every,
    )

"""Distils the teacher into a student of one to eight steps, with the guidance scale as an input of the network.

Latent consistency distillation: Algorithm 1 of Luo et al. (2023), arXiv:2310.04378, with v-prediction, classifier-free
guidance as diffusers writes it (w = 1 is none) and the boundary functions of diffusers' ``LCMScheduler``, so that what
is trained here is what ``LatentConsistencyModelPipeline`` samples.

Shapes: B batch, C latent channels, H x W latent size, L tokens, T timesteps, G guidance features.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
from dataclasses import dataclass

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from fewstep.errors import SourceError
from fewstep.stickers.teacher import (
    WIDTH,
    Captions,
    latents,
    load_autoencoder,
    make_scheduler,
    make_text_encoder,
    make_unet,
)
from fewstep.stickers.training import WORK, learning_rate, load_state, save_state, steps, training_precision, update_ema

TRAIN_STEPS = 1000
GRID_STEPS = 50
SKIPPED_STEPS = 2
TARGET_DECAY = 0.98
GUIDANCE_RANGE = (1.0, 5.0)
GUIDANCE_FEATURES = WIDTH
TIMESTEP_SCALING = 10.0
SIGMA_DATA = 0.5
HUBER_WIDTH = 0.03
"""Errors under this (in latents of unit spread) count by their square, errors over it by their size."""
SAVE_EVERY = 100


@dataclass(frozen=True)
class Teacher:
    """The averaged weights of a teacher run, frozen, and the factor that gives its latents unit spread."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    latent_factor: float
    step: int


def load_teacher() -> Teacher:
    """Returns the exponential average of the teacher's weights.

    Raises:
        SourceError: there is no teacher state in the work folder.
    """
    state = load_state(WORK / "teacher.pt")
    if state is None:
        raise SourceError(f"{WORK / 'teacher.pt'} is missing", hint="run python -m fewstep.stickers.teacher first")
    both = torch.nn.ModuleDict({"text_encoder": make_text_encoder(), "unet": make_unet()})
    both.load_state_dict(state["ema"])
    both.eval().requires_grad_(False)
    return Teacher(both["text_encoder"], both["unet"], state["latent_factor"], state["step"])


def make_student(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """Returns a copy of the teacher with an input for the guidance scale that has no effect yet."""
    student = make_unet(time_cond_proj_dim=GUIDANCE_FEATURES)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if missing != ["time_embedding.cond_proj.weight"] or unexpected:
        raise SourceError(f"the teacher's weights lack {missing} and have {unexpected}, expected the student's network")
    torch.nn.init.zeros_(student.get_parameter("time_embedding.cond_proj.weight"))
    return student


def make_student_scheduler() -> LCMScheduler:
    """Returns the sampler of the student, on the teacher's noise schedule."""
    teacher = make_scheduler().config
    return LCMScheduler(
        beta_schedule=teacher["beta_schedule"],
        beta_start=teacher["beta_start"],
        beta_end=teacher["beta_end"],
        prediction_type=teacher["prediction_type"],
        original_inference_steps=GRID_STEPS,
        timestep_scaling=TIMESTEP_SCALING,
    )


class NoiseLevels:
    """The signal and noise amplitudes of the schedule; a timestep below zero is the clean picture."""

    def __init__(self) -> None:
        product_T = torch.cat([torch.ones(1), make_scheduler().alphas_cumprod])
        self._alpha_T, self._sigma_T = product_T.sqrt(), (1 - product_T).sqrt()

    def __call__(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma, float32 [B, 1, 1, 1] each, for int64 timesteps."""
        index_B = t_B.clamp(min=-1) + 1
        return self._alpha_T[index_B].view(-1, 1, 1, 1), self._sigma_T[index_B].view(-1, 1, 1, 1)


def boundary_scalings(t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns c_skip and c_out, float32 [B, 1, 1, 1] each: 1 and 0 at t = 0, soon 0 and 1 (``LCMScheduler``)."""
    scaled = t_B.float().view(-1, 1, 1, 1) * TIMESTEP_SCALING
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


def consistency(v_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor, levels: NoiseLevels) -> Tensor:
    """Returns the consistency function's clean picture f(x, t) [B, C, H, W] from the network's velocity."""
    c_skip, c_out = boundary_scalings(t_B)
    alpha, sigma = levels(t_B)
    return c_skip * x_BCHW + c_out * (alpha * x_BCHW - sigma * v_BCHW)


def guide(v_conditional: Tensor, v_unconditional: Tensor, w_B: Tensor) -> Tensor:
    """Returns the guided velocity [B, C, H, W], Ho and Salimans (2022), arXiv:2207.12598; w = 1 is no guidance."""
    return v_unconditional + w_B.view(-1, 1, 1, 1) * (v_conditional - v_unconditional)


def ddim_step(v_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor, t_next_B: Tensor, levels: NoiseLevels) -> Tensor:
    """Returns x at ``t_next`` [B, C, H, W]: Eq. 12 of Song et al. (2020), arXiv:2010.02502, without noise."""
    alpha, sigma = levels(t_B)
    alpha_next, sigma_next = levels(t_next_B)
    clean, noise = alpha * x_BCHW - sigma * v_BCHW, alpha * v_BCHW + sigma * x_BCHW
    return alpha_next * clean + sigma_next * noise


def guidance_embedding(w_B: Tensor, features: int = GUIDANCE_FEATURES) -> Tensor:
    """Returns the network's guidance input, float32 [B, features]: sines and cosines of 1000 (w - 1)."""
    half = features // 2
    frequency_G = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
    angle_BG = 1000.0 * (w_B - 1)[:, None] * frequency_G
    return torch.cat([angle_BG.sin(), angle_BG.cos()], dim=1)


def pseudo_huber(error: Tensor) -> Tensor:
    """Returns the mean pseudo-Huber loss in units of its width: quadratic under it, linear over it."""
    return ((error / HUBER_WIDTH) ** 2 + 1).sqrt().sub(1).mean() * HUBER_WIDTH


@dataclass(frozen=True)
class Batch:
    """What one training step draws: pictures, noise, grid timesteps, guidance scales, caption embeddings."""

    z_BCHW: Tensor
    noise_BCHW: Tensor
    t_B: Tensor
    w_B: Tensor
    text_BLC: Tensor


class BatchSource:
    """Draws the batch of any step, from a seed and the step's number alone."""

    def __init__(self, teacher: Teacher, *, size: int, seed: int) -> None:
        self._captions = Captions()
        self._text_encoder = teacher.text_encoder
        self._z_all, factor = latents(load_autoencoder())
        if abs(factor - teacher.latent_factor) > 1e-3:
            raise SourceError(
                f"the autoencoder's latents have factor {factor}, the teacher was trained with {teacher.latent_factor}",
                hint="train the teacher again, or restore its autoencoder.pt",
            )
        self._size, self._seed = size, seed
        self.empty_1LC = self._encode(self._captions([""]))

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step."""
        # The teacher's run uses seed * 1_000_003 + step: the constant keeps the two streams apart.
        number = (self._seed + 7_919) * 1_000_003 + step
        rng = torch.Generator().manual_seed(number)
        index_B = torch.randint(len(self._z_all), (self._size,), generator=rng)
        z_BCHW = self._z_all[index_B].contiguous(memory_format=torch.channels_last)
        spacing = TRAIN_STEPS // GRID_STEPS
        t_B = (torch.randint(GRID_STEPS, (self._size,), generator=rng) + 1) * spacing - 1
        low, high = GUIDANCE_RANGE
        ids_BL = self._captions.draw(index_B.tolist(), random.Random(number), dropout=0.0)
        return Batch(
            z_BCHW=z_BCHW,
            noise_BCHW=torch.randn(z_BCHW.shape, generator=rng),
            t_B=t_B,
            w_B=low + (high - low) * torch.rand(self._size, generator=rng),
            text_BLC=self._encode(ids_BL),
        )

    @torch.no_grad()
    def _encode(self, ids_BL: Tensor) -> Tensor:
        hidden: Tensor = self._text_encoder(ids_BL).last_hidden_state
        return hidden


@dataclass(frozen=True)
class Networks:
    """The three networks of a training step, and the embedding of the empty caption [1, L, C]."""

    teacher: UNet2DConditionModel
    student: UNet2DConditionModel
    target: UNet2DConditionModel
    empty_1LC: Tensor


def losses(networks: Networks, batch: Batch, levels: NoiseLevels) -> tuple[Tensor, Tensor]:
    """Returns the consistency loss and the distance to the training pictures, float32 scalars.

    Consistency: the student at (x, t) against the target network one step of the guided teacher further on. A step that
    would end below t = 0 ends on the teacher's clean picture, which is its own target, since f(x, 0) = x.
    """
    alpha, sigma = levels(batch.t_B)
    x = alpha * batch.z_BCHW + sigma * batch.noise_BCHW
    guidance = guidance_embedding(batch.w_B)
    t_next = batch.t_B - SKIPPED_STEPS * TRAIN_STEPS // GRID_STEPS
    t_target = t_next.clamp(min=0)
    with training_precision():
        with torch.no_grad():
            # Both branches of guidance in one call.
            text = torch.cat([batch.text_BLC, networks.empty_1LC.expand_as(batch.text_BLC)])
            both = networks.teacher(torch.cat([x, x]), batch.t_B.repeat(2), text).sample.float()
            v_guided = guide(both[: len(x)], both[len(x) :], batch.w_B)
            x_next = ddim_step(v_guided, x, batch.t_B, t_next, levels)
            v_target = networks.target(x_next, t_target, batch.text_BLC, timestep_cond=guidance).sample.float()
        v = networks.student(x, batch.t_B, batch.text_BLC, timestep_cond=guidance).sample.float()
    clean = consistency(v, x, batch.t_B, levels)
    wanted = consistency(v_target, x_next, t_target, levels)
    return pseudo_huber(clean - wanted), pseudo_huber(clean - batch.z_BCHW)


def train(iterations: int, *, batch: int, peak: float, data_weight: float, seed: int) -> None:
    """Distils (or goes on distilling) until ``iterations``; the average of the student's weights is the result."""
    torch.manual_seed(seed)
    teacher = load_teacher()
    draw = BatchSource(teacher, size=batch, seed=seed)
    student = make_student(teacher.unet).to(memory_format=torch.channels_last)
    target = copy.deepcopy(student).eval().requires_grad_(False)
    networks = Networks(teacher.unet.to(memory_format=torch.channels_last), student, target, draw.empty_1LC)
    optimizer = torch.optim.AdamW(student.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3)
    first = 0
    if (state := load_state(WORK / "student.pt")) is not None:
        student.load_state_dict(state["model"])
        target.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    levels = NoiseLevels()
    running = [0.0, 0.0]
    for step in steps(first, iterations):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, iterations, peak=peak, warmup=50, decay=0.4)
        consistent, data = losses(networks, draw(step), levels)
        optimizer.zero_grad(set_to_none=True)
        (consistent + data_weight * data).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        update_ema(target, student, TARGET_DECAY)
        decay = 0.95 if step > first else 0.0
        running = [decay * a + (1 - decay) * b for a, b in zip(running, (consistent.item(), data.item()), strict=True)]
        if (step + 1) % 50 == 0:
            print(f"consistency {running[0]:.4f}  data {running[1]:.4f}", file=sys.stderr, flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == iterations:
            states = {"model": student.state_dict(), "ema": target.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(WORK / "student.pt", {**states, "step": step + 1, "teacher_step": teacher.step})
            (WORK / "student.json").write_text(json.dumps({"step": step + 1, "consistency": running[0]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--data-weight", type=float, default=0.0, help="weight of the distance to the pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train(
        options.iterations,
        batch=options.batch,
        peak=options.peak,
        data_weight=options.data_weight,
        seed=options.seed,
    )

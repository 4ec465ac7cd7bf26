"""Trains the autoencoder: images to 16x16 latents and back (diffusers ``AutoencoderTiny``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch.nn import functional as F

from fewstep.stickers.data import Sticker
from fewstep.stickers.sets import training_images
from fewstep.stickers.training import WORK, learning_rate, load_state, save_state, steps, training_precision
from fewstep.stickers.variant import Variant, variant


def make_autoencoder(chosen: Variant | None = None) -> AutoencoderTiny:
    """Returns an untrained autoencoder of the variant's factor; each further stage halves the size."""
    chosen = chosen or variant()
    stages = chosen.factor.bit_length()
    # diffusers' class builds no other than equal widths.
    widths = (chosen.width,) * stages
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, *[2] * (stages - 1)),
        num_decoder_blocks=(*[2] * (stages - 1), 1),
        latent_channels=chosen.latent_channels,
        scaling_factor=1.0,
    )


def pictures() -> torch.Tensor:
    """Returns all training images of the variant, float32 [P, 3, size, size] in [-1, 1]."""
    return as_tensor([styled.sticker for styled in training_images()])


def as_tensor(stickers: Sequence[Sticker]) -> torch.Tensor:
    """Returns the images of stickers, float32 [P, 3, size, size] in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([s.pixels_HWC for s in stickers]))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def _loss(decoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1, plus L1 of the horizontal and vertical differences, which keeps thin outlines sharp."""
    dx, dy = torch.diff(decoded - x, dim=-1), torch.diff(decoded - x, dim=-2)
    return F.l1_loss(decoded, x) + F.mse_loss(decoded, x) + 0.5 * (dx.abs().mean() + dy.abs().mean())


def train(iterations: int, *, decoder_only: bool, batch: int = 16, peak: float = 2e-3, seed: int = 0) -> None:
    """Trains both halves, or (``decoder_only``) the decoder for latents that are already fixed."""
    torch.manual_seed(seed)
    x_all = pictures()
    model = make_autoencoder().to(memory_format=torch.channels_last)
    name = "decoder" if decoder_only else "autoencoder"
    if decoder_only:
        model.load_state_dict(torch.load(WORK / "autoencoder.pt", weights_only=True)["model"])
        model.encoder.requires_grad_(False)
    state = load_state(WORK / f"{name}.pt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=peak, weight_decay=1e-3)
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in steps(first, iterations):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        x = x_all[torch.randint(len(x_all), (batch,), generator=rng)].to(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, iterations, peak=peak)
        with training_precision():
            with torch.set_grad_enabled(not decoder_only):
                z = model.encode(x).latents
            # Noise of 5 % of the latents' spread: the decoder must forgive a sampler's small errors.
            noisy = z.float() + 0.05 * torch.randn(z.shape, generator=rng)
            decoded = model.decode(noisy).sample
        loss = _loss(decoded.float(), x) + 1e-3 * (z.float() ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            psnr = -10 * torch.log10(F.mse_loss(decoded.detach().float(), x) / 4)
            print(
                f"loss {loss.item():.4f}  {psnr.item():.2f} dB  z std {z.float().std():.3f}",
                file=sys.stderr,
                flush=True,
            )
        if (step + 1) % 500 == 0 or step + 1 == iterations:
            save_state(
                WORK / f"{name}.pt",
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--decoder-only", action="store_true", help="train on, with the latents fixed")
    options = parser.parse_args()
    train(options.iterations, decoder_only=options.decoder_only)

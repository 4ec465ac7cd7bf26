"""Pre-trains the text encoder: from a caption alone, a small decoder has to guess the picture's latents.

A text encoder that starts from nothing learns slowly through a denoiser, whose loss is mostly about noise. Here the
caption is all there is, and a step costs a twentieth of the teacher's. The decoder attends to the token states from an
8x8 grid, as the UNet will, and is thrown away.
"""

from __future__ import annotations

import argparse
import random
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.stickers.teacher import WIDTH, Captions, latents, load_autoencoder, make_text_encoder
from fewstep.stickers.training import WORK, learning_rate, load_state, save_state, steps, training_precision
from fewstep.stickers.variant import variant

_GRID, _PATCH = 8, 2


class LatentGuess(nn.Module):
    """Decodes token states into latents: one query for each 2x2 patch of the 16x16 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(_GRID * _GRID, WIDTH))
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, 2)
        self.out = nn.Linear(WIDTH, variant().latent_channels * _PATCH * _PATCH)

    def forward(self, states_BLD: Tensor) -> Tensor:
        """Returns latents, [B, C, 16, 16]."""
        patches = self.out(self.layers(self.queries.expand(len(states_BLD), -1, -1), states_BLD))
        return F.fold(patches.transpose(1, 2).float(), _GRID * _PATCH, _PATCH, stride=_PATCH)


def train(iterations: int, *, batch: int = 128, peak: float = 1e-3, seed: int = 0) -> None:
    """Trains (or goes on training) until ``iterations``."""
    torch.manual_seed(seed)
    captions = Captions()
    z_all, _ = latents(load_autoencoder())
    model = nn.ModuleDict({"text_encoder": make_text_encoder(), "guess": LatentGuess()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-2)
    first, running = 0, 1.0
    if (state := load_state(WORK / "text.pt")) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in steps(first, iterations):
        indices = torch.randint(len(z_all), (batch,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        ids = captions.draw(indices.tolist(), random.Random(seed * 1_000_003 + step), dropout=0.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, iterations, peak=peak, warmup=100)
        with training_precision():
            guess = model["guess"](model["text_encoder"](ids).last_hidden_state)
        loss = F.mse_loss(guess, z_all[indices])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"loss {running:.4f}", file=sys.stderr, flush=True)
        if (step + 1) % 500 == 0 or step + 1 == iterations:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state(WORK / "text.pt", {**states, "text_encoder": model["text_encoder"].state_dict()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=1500)
    train(parser.parse_args().iterations)

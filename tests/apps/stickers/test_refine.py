"""Training straight on the images: each epoch has each image once, and both calls are pulled to the truth."""

from __future__ import annotations

import pytest
import torch

from fewstep.stickers.distill import NoiseLevels
from fewstep.stickers.refine import LAST_T, LATER_T, Drawn, losses, shuffled
from fewstep.stickers.training import Muon, orthogonal


def test_an_epoch_has_each_image_once_and_the_next_another_order() -> None:
    numbers = torch.cat([shuffled(10, step, batch=4, seed=0) for step in range(5)]).tolist()
    first, second = numbers[:10], numbers[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


class _Recorder(torch.nn.Module):
    """A network that gives the velocity of a fixed clean image, and keeps what it was called with."""

    def __init__(self, z: torch.Tensor) -> None:
        super().__init__()
        self.z = torch.nn.Parameter(z)
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, timestep_cond: torch.Tensor) -> object:
        self.calls.append((x, t))
        alpha, sigma = NoiseLevels()(t)
        return type("Output", (), {"sample": (alpha * x - self.z) / sigma})()


def _drawn(z: torch.Tensor, *, true: bool) -> Drawn:
    rng = torch.Generator().manual_seed(0)
    size = len(LATER_T)
    return Drawn(
        z_BCHW=z.expand(size, -1, -1, -1),
        noise_BCHW=torch.randn(size, 4, 16, 16, generator=rng),
        later_noise_BCHW=torch.randn(size, 4, 16, 16, generator=rng),
        later_t_B=torch.tensor(LATER_T),
        true_B=torch.full((size,), true),
        w_B=torch.full((size,), 3.0),
        ids_BL=torch.zeros(size, 24, dtype=torch.int64),
    )


@pytest.mark.parametrize("true", [False, True])
def test_second_call_starts_from_the_first_result_or_from_the_truth(true: bool) -> None:
    z, guess = torch.full((1, 4, 16, 16), 0.5), torch.full((1, 4, 16, 16), -0.5)
    network, drawn = _Recorder(guess), _drawn(z, true=true)
    first, second = losses(network, torch.zeros(7, 24, 192), drawn, NoiseLevels())
    # The boundary function leaves less than 1e-4 of x at these timesteps: a loss of |0.5 - -0.5| minus the Huber width.
    assert first.item() == pytest.approx(0.97, abs=0.01)
    assert second.item() == pytest.approx(0.97, abs=0.01)
    (x_first, t_first), (x_second, _) = network.calls
    assert (t_first == LAST_T).all()
    assert torch.equal(x_first, drawn.noise_BCHW)
    alpha, sigma = NoiseLevels()(drawn.later_t_B)
    start = (x_second - sigma * drawn.later_noise_BCHW) / alpha
    torch.testing.assert_close(start, (z if true else guess).expand_as(start), rtol=0, atol=2e-3)


def test_perfect_network_has_no_loss() -> None:
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    parts = losses(_Recorder(z.clone()), torch.zeros(7, 24, 192), _drawn(z, true=False), NoiseLevels())
    assert all(part.item() < 1e-4 for part in parts)


def test_float32_muon_is_torchs() -> None:
    start = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        (ours, Muon([ours], lr=0.1, weight_decay=0.01)),
        (theirs, torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")),
    )
    for step in range(3):
        gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(step + 1))
        for parameter, optimizer in optimizers:
            parameter.grad = gradient.clone()
            optimizer.step()
    # Torch's runs in bfloat16: 3 updates of at most 0.2 * 0.1 * sqrt(40) * 0.3 an entry, to 2 digits.
    assert (ours - start).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-3)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_orthogonal_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    # The polynomial of five steps ends between 0.7 and 1.2, not at 1 (Jordan et al. 2024).
    assert values.min() > 0.6
    assert values.max() < 1.3

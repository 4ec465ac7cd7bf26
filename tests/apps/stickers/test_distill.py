"""The distillation's formulas are the ones that diffusers samples with."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline

from fewstep.errors import SourceError
from fewstep.stickers.distill import (
    GRID_STEPS,
    GUIDANCE_FEATURES,
    Batch,
    Networks,
    NoiseLevels,
    boundary_scalings,
    consistency,
    ddim_step,
    guidance_embedding,
    guide,
    losses,
    make_student,
    make_student_scheduler,
    pseudo_huber,
)
from fewstep.stickers.teacher import make_scheduler, make_unet

GRID = torch.arange(19, 1000, 20)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_training_grid_is_the_samplers_grid() -> None:
    scheduler = make_student_scheduler()
    scheduler.set_timesteps(GRID_STEPS)
    assert scheduler.timesteps.flip(0).tolist() == GRID.tolist()


def test_sampler_and_teacher_have_the_same_noise_schedule() -> None:
    torch.testing.assert_close(make_student_scheduler().alphas_cumprod, make_scheduler().alphas_cumprod, rtol=0, atol=0)


@pytest.mark.parametrize("t", [0, 1, 19, 499, 999])
def test_boundary_scalings_are_the_schedulers(t: int) -> None:
    c_skip, c_out = boundary_scalings(torch.tensor([t]))
    wanted = make_student_scheduler().get_scalings_for_boundary_condition_discrete(t)
    assert (c_skip.item(), c_out.item()) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_consistency_function_is_the_schedulers_denoised_sample(steps: int) -> None:
    scheduler = make_student_scheduler()
    scheduler.set_timesteps(steps)
    x, v = _random(1, 4, 16, 16, seed=0), _random(1, 4, 16, 16, seed=1)
    for t in scheduler.timesteps:
        wanted = scheduler.step(v, t, x, generator=torch.Generator().manual_seed(2)).denoised
        torch.testing.assert_close(consistency(v, x, t.reshape(1), NoiseLevels()), wanted, rtol=1e-6, atol=1e-6)


def test_consistency_function_is_the_identity_at_zero() -> None:
    x, v = _random(3, 4, 16, 16, seed=0), _random(3, 4, 16, 16, seed=1)
    assert torch.equal(consistency(v, x, torch.zeros(3, dtype=torch.int64), NoiseLevels()), x)


@pytest.mark.parametrize("t", [999, 499, 59, 39, 19])
@pytest.mark.parametrize("w", [1.0, 3.0])
def test_guided_step_is_ddims(t: int, w: float) -> None:
    x, conditional, unconditional = (_random(2, 4, 16, 16, seed=seed) for seed in range(3))
    scheduler = DDIMScheduler.from_config(
        make_scheduler().config, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(25)  # 1000 / 25 = two steps of the grid of 50
    guided = unconditional + w * (conditional - unconditional)
    wanted = scheduler.step(guided, t, x).prev_sample
    t_B = torch.full((2,), t)
    ours = ddim_step(guide(conditional, unconditional, torch.full((2,), w)), x, t_B, t_B - 40, NoiseLevels())
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


def test_guidance_embedding_is_the_pipelines() -> None:
    w = torch.tensor([1.0, 1.7, 3.0, 5.0])
    wanted = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w - 1, GUIDANCE_FEATURES)
    # The angles reach 4000, where one float32 rounding is 2.4e-4.
    torch.testing.assert_close(guidance_embedding(w), wanted, rtol=0, atol=1e-3)


def test_pseudo_huber_is_quadratic_then_linear() -> None:
    assert pseudo_huber(torch.zeros(4)).item() == 0
    assert pseudo_huber(torch.full((4,), 0.003)).item() == pytest.approx(0.003**2 / (2 * 0.03), rel=0.01)
    assert pseudo_huber(torch.full((4,), -3.0)).item() == pytest.approx(3.0 - 0.03, rel=0.01)


def test_student_starts_as_its_teacher_whatever_the_guidance() -> None:
    torch.manual_seed(0)
    teacher = make_unet().eval()
    student = make_student(teacher).eval()
    x, text, t = _random(2, 4, 16, 16, seed=0), _random(2, 24, 192, seed=1), torch.tensor([999, 19])
    with torch.no_grad():
        ours = student(x, t, text, timestep_cond=guidance_embedding(torch.tensor([1.0, 5.0]))).sample
        torch.testing.assert_close(ours, teacher(x, t, text).sample)


def test_student_of_another_network_is_refused() -> None:
    with pytest.raises(SourceError, match="expected the student's network"):
        make_student(make_unet(time_cond_proj_dim=192))


class _Constant(torch.nn.Module):
    """A network whose velocity is that of a fixed clean picture, whatever the caption."""

    def __init__(self, z: torch.Tensor) -> None:
        super().__init__()
        self.z = torch.nn.Parameter(z)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, timestep_cond: torch.Tensor | None = None
    ) -> object:
        alpha, sigma = NoiseLevels()(t)
        v = (alpha * x - self.z) / sigma
        return type("Output", (), {"sample": v})()


def test_perfect_networks_have_no_loss_and_pass_no_gradient_to_the_target() -> None:
    z = _random(1, 4, 16, 16, seed=0)
    teacher, student, target = (_Constant(z.clone()) for _ in range(3))
    size = len(GRID)
    batch = Batch(
        z_BCHW=z.expand(size, -1, -1, -1),
        noise_BCHW=_random(size, 4, 16, 16, seed=1),
        t_B=GRID,
        w_B=torch.linspace(1, 5, size),
        text_BLC=torch.zeros(size, 24, 192),
    )
    consistent, data = losses(Networks(teacher, student, target, torch.zeros(1, 24, 192)), batch, NoiseLevels())
    assert consistent.item() < 1e-4
    assert data.item() < 1e-4
    (consistent + data).backward()
    assert student.z.grad is not None
    assert target.z.grad is None
    assert teacher.z.grad is None

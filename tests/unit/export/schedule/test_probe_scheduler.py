"""The table that `probe` finds samples as diffusers' own scheduler does, and what has no table is refused."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers.schedulers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from fewstep.bundle.schedule import Schedule, sample_loop
from fewstep.errors import ScheduleError
from fewstep.export.schedule.probe_scheduler import probe, replaced_noise

pytestmark = [
    # EulerAncestralDiscreteScheduler.__init__ calls np.array(tensor) the way NumPy 1 wanted it.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`algorithm_types dpmsolver and sde-dpmsolver` is deprecated:FutureWarning"),
]

SHAPE = (2, 3, 4, 4)
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

# The scheduler and the table do the same arithmetic in float64 (1e-16), in another order, in up to 9 steps.
FLOAT64 = 1e-13
# The scheduler casts the latent, or the noise it draws, to float32 (6e-8) in each of up to 8 steps; the table does not.
FLOAT32 = 5e-7
# Two float32 trajectories of up to 9 steps with coefficients up to 16 (Heun): 6e-8 * 16 is 120 dB.
FLOAT32_SQNR_DB = 110.0


@dataclass(frozen=True)
class Case:
    """A scheduler of diffusers, by name and configuration, and what its table should look like."""

    id: str
    scheduler: str
    steps: int
    config: dict[str, Any] = field(default_factory=dict)
    set_timesteps: Callable[[Any, int], None] | None = None
    eta: float | None = None
    calls: int | None = None
    history: int = 0
    clip: float | None = None
    tolerance: float = FLOAT64
    sqnr_db: float = FLOAT32_SQNR_DB

    def make(self) -> Any:
        return getattr(diffusers.schedulers, self.scheduler)(**self.config)

    def probe(self) -> Schedule:
        return probe(self.make(), self.steps, set_timesteps=self.set_timesteps, eta=self.eta)


def _lcm(steps: int) -> Case:
    return Case(f"LCM-{steps}", "LCMScheduler", steps, STABLE_DIFFUSION | {"clip_sample": False})


def _original_steps(scheduler: Any, steps: int) -> None:
    scheduler.set_timesteps(steps, original_inference_steps=20)


def _mu(scheduler: Any, steps: int) -> None:
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.7)


def _scm(scheduler: Any, steps: int) -> None:
    scheduler.set_timesteps(steps, intermediate_timesteps=None)


SD = STABLE_DIFFUSION
CASES = [
    *map(_lcm, (1, 2, 4, 8)),
    Case("LCM-v", "LCMScheduler", 4, SD | {"clip_sample": False, "prediction_type": "v_prediction"}),
    Case("LCM-clip", "LCMScheduler", 4, SD | {"clip_sample": True, "clip_sample_range": 2.0}, clip=2.0),
    Case("LCM-original-steps", "LCMScheduler", 4, SD | {"clip_sample": False}, set_timesteps=_original_steps),
    Case("TCD", "TCDScheduler", 4, SD),
    Case("TCD-eta-0", "TCDScheduler", 4, SD, eta=0.0),
    Case("Euler-trailing", "EulerDiscreteScheduler", 4, SD | {"timestep_spacing": "trailing"}, tolerance=FLOAT32),
    Case(
        "Euler-karras",
        "EulerDiscreteScheduler",
        4,
        SD | {"timestep_spacing": "leading", "use_karras_sigmas": True},
        tolerance=FLOAT32,
    ),
    Case(
        "Euler-v-zero-snr",
        "EulerDiscreteScheduler",
        4,
        SD | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        tolerance=FLOAT32,
        sqnr_db=85,  # in float32, diffusers' first step subtracts numbers as large as sigma = 4096; the table does not
    ),
    Case("EulerAncestral", "EulerAncestralDiscreteScheduler", 4, SD, tolerance=FLOAT32),
    Case("FlowMatchEuler", "FlowMatchEulerDiscreteScheduler", 4, {"shift": 3.0}, tolerance=FLOAT32),
    Case(
        "FlowMatchEuler-mu",
        "FlowMatchEulerDiscreteScheduler",
        4,
        {"use_dynamic_shifting": True},
        set_timesteps=_mu,
        tolerance=FLOAT32,
    ),
    Case(
        "FlowMatchEuler-stochastic",
        "FlowMatchEulerDiscreteScheduler",
        4,
        {"stochastic_sampling": True},
        tolerance=FLOAT32,
    ),
    Case("DDIM", "DDIMScheduler", 4, SD | {"clip_sample": False}),
    Case("DDIM-eta-1", "DDIMScheduler", 4, SD | {"clip_sample": False}, eta=1.0),
    Case("DDPM", "DDPMScheduler", 4, {"clip_sample": False}),
    Case("DDPM-clip", "DDPMScheduler", 4, {"clip_sample": True}, clip=1.0),
    Case("DPM++2M", "DPMSolverMultistepScheduler", 4, SD, history=1, tolerance=FLOAT32),
    Case(
        "DPM++2M-karras-8",
        "DPMSolverMultistepScheduler",
        8,
        SD | {"use_karras_sigmas": True},
        history=1,
        tolerance=FLOAT32,
    ),
    Case("DPM++3M-8", "DPMSolverMultistepScheduler", 8, SD | {"solver_order": 3}, history=2, tolerance=FLOAT32),
    Case(
        "DPM++SDE",
        "DPMSolverMultistepScheduler",
        4,
        SD | {"algorithm_type": "sde-dpmsolver++"},
        history=1,
        tolerance=FLOAT32,
    ),
    Case("UniPC", "UniPCMultistepScheduler", 4, SD, history=2),
    Case("UniPC-8", "UniPCMultistepScheduler", 8, SD, history=2),
    Case("PNDM", "PNDMScheduler", 4, SD | {"skip_prk_steps": True}, calls=5, history=3),
    Case("PNDM-8", "PNDMScheduler", 8, SD | {"skip_prk_steps": True}, calls=9, history=4),
    Case("Heun", "HeunDiscreteScheduler", 4, SD, calls=7, history=1),
    Case("ConsistencyModel-1", "CMStochasticIterativeScheduler", 1, clip=1.0),
    Case("ConsistencyModel-2", "CMStochasticIterativeScheduler", 2, clip=1.0),
    Case("ConsistencyModel-no-clip", "CMStochasticIterativeScheduler", 4, {"clip_denoised": False}),
    Case("SCM-2", "SCMScheduler", 2, tolerance=FLOAT32),
    Case("SCM-4", "SCMScheduler", 4, set_timesteps=_scm, tolerance=FLOAT32),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@dataclass
class Trajectory:
    """What the scheduler itself did: the inputs it was given, the noise it drew, the network inputs and latents."""

    x_init: Any
    outputs: list[Any]
    noises: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    latents: list[Any] = field(default_factory=list)


def diffusers_trajectory(case: Case, schedule: Schedule, dtype: torch.dtype) -> Trajectory:
    """Run diffusers' loop on random network outputs, and listen to the noise that it draws from torch itself."""
    scheduler = case.make()
    if case.set_timesteps is None:
        scheduler.set_timesteps(case.steps)
    else:
        case.set_timesteps(scheduler, case.steps)
    torch.manual_seed(1)
    outputs = [torch.randn(SHAPE, dtype=dtype) for _ in range(schedule.steps)]
    x = torch.randn(SHAPE, dtype=dtype) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    result = Trajectory(x.numpy(), [F.numpy() for F in outputs])
    torch_randn = torch.randn
    for t, F in zip(scheduler.timesteps[: schedule.steps], outputs, strict=True):
        drawn = [torch.full(SHAPE, torch.nan, dtype=dtype)]  # a table that wants noise where none is drawn gives nan

        def listen(*args: Any, drawn: list[torch.Tensor] = drawn, **kwargs: Any) -> torch.Tensor:
            drawn.append(torch_randn(*args, **kwargs))
            return drawn[-1]

        with mock.patch.object(torch, "randn", listen):
            result.inputs.append(
                (scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x).numpy()
            )
            x = scheduler.step(F, t, x, **({} if case.eta is None else {"eta": case.eta})).prev_sample
        result.noises.append(drawn[-1].to(dtype).numpy())
        result.latents.append(x.to(dtype).numpy())
    return result


def table_trajectory(schedule: Schedule, reference: Trajectory) -> Trajectory:
    """Run the table with the inputs and noise of the reference."""
    result = Trajectory(reference.x_init, reference.outputs)

    def denoise(k: int, scaled: Any) -> Any:
        result.inputs.append(scaled)
        return reference.outputs[k]

    sample_loop(
        schedule, reference.x_init, denoise, lambda k: reference.noises[k], lambda k, x, x0: result.latents.append(x)
    )
    return result


def deviation(actual: list[Any], expected: list[Any]) -> float:
    """Return the largest difference of any step, relative to the largest element of that step."""
    return max(float(np.abs(a - e).max() / np.abs(e).max()) for a, e in zip(actual, expected, strict=True))


@each_case
def test_table_samples_as_diffusers_does(case: Case) -> None:
    schedule = case.probe()
    reference = diffusers_trajectory(case, schedule, torch.float64)
    actual = table_trajectory(schedule, reference)
    assert deviation(actual.latents, reference.latents) <= case.tolerance
    assert deviation(actual.inputs, reference.inputs) <= case.tolerance


@each_case
def test_table_in_float32_is_as_near_to_diffusers_as_float32_allows(case: Case) -> None:
    schedule = case.probe()
    reference = diffusers_trajectory(case, schedule, torch.float32)
    actual = table_trajectory(schedule, reference)
    error, signal = actual.latents[-1] - reference.latents[-1], reference.latents[-1]
    sqnr_db = 10 * np.log10(np.square(signal).mean() / max(np.square(error).mean(), 1e-30))
    assert sqnr_db >= case.sqnr_db


@each_case
def test_table_is_short_and_survives_json(case: Case) -> None:
    schedule = case.probe()
    assert schedule.steps == (case.calls or case.steps)
    assert max(map(len, schedule.h)) == case.history
    assert schedule.clip == case.clip
    assert schedule.source == case.scheduler
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_lcm_table_has_the_numbers_of_the_paper() -> None:
    """Algorithm 2 of Luo et al. (2023), arXiv:2310.04378: x = alpha_next x0 + sigma_next noise."""
    scheduler = diffusers.schedulers.LCMScheduler(**STABLE_DIFFUSION, clip_sample=False)
    schedule = probe(scheduler, 4)
    alphas = scheduler.alphas_cumprod.double().numpy()
    assert schedule.timesteps == (999.0, 759.0, 499.0, 259.0)
    assert schedule.timestep_dtype == "int64"
    assert schedule.a == (0.0,) * 4
    np.testing.assert_allclose(schedule.b, [*alphas[[759, 499, 259]] ** 0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(schedule.c, [*(1 - alphas[[759, 499, 259]]) ** 0.5, 0.0], rtol=1e-6)
    assert not schedule.uses_noise(3)


def test_timestep_factor_makes_flow_matching_times() -> None:
    scheduler = diffusers.schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = probe(scheduler, 4, timestep_factor=0.001)
    assert schedule.timestep_dtype == "float32"
    assert schedule.timesteps == pytest.approx([t / 1000 for t in probe(scheduler, 4).timesteps])


def test_integer_timesteps_times_a_factor_are_float32() -> None:
    schedule = probe(diffusers.schedulers.LCMScheduler(clip_sample=False), 2, timestep_factor=0.001)
    assert (schedule.timestep_dtype, schedule.timesteps) == ("float32", (0.999, 0.499))


def test_the_scheduler_is_left_as_it_was() -> None:
    scheduler = diffusers.schedulers.UniPCMultistepScheduler()
    before = copy.deepcopy(scheduler.__dict__)
    module = sys.modules[type(scheduler).__module__]
    probe(scheduler, 4)
    assert before.keys() == scheduler.__dict__.keys()
    assert all(torch.equal(before[name], scheduler.__dict__[name]) for name in ("timesteps", "sigmas"))
    assert scheduler.num_inference_steps is None
    assert not hasattr(module, "randn_tensor")


def test_replaced_noise_is_restored_after_an_error() -> None:
    scheduler = diffusers.schedulers.LCMScheduler()
    module = sys.modules[type(scheduler).__module__]
    with pytest.raises(KeyError), replaced_noise(scheduler, torch.zeros):
        assert torch.equal(module.randn_tensor((2, 3), generator=None, dtype=torch.float16), torch.zeros(2, 3))
        raise KeyError
    assert module.randn_tensor is randn_tensor


class Fake:
    """A linear scheduler, to be spoilt by subclasses."""

    config = SimpleNamespace()
    timesteps = torch.tensor([3.0, 2.0, 1.0])

    def set_timesteps(self, steps: int) -> None:
        assert steps == 3

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> Any:
        return SimpleNamespace(prev_sample=self.following(model_output, timestep, sample))

    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - F / t


class FakeWithNoise(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - F / t + 0.5 * randn_tensor(x.shape, dtype=x.dtype)


class Square(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x**2 - F


class Offset(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - F + 0.01


class Product(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - F * (1 + 0.1 * F.mean())


class TorchRandn(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - F + torch.randn(x.shape, dtype=x.dtype)


class NumpyNoise(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - F + torch.from_numpy(np.random.default_rng().standard_normal(x.shape))


class TwoDraws(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - F + randn_tensor(x.shape) + randn_tensor(x.shape)


class OddNoise(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - F + randn_tensor((1, 1, 1, 1))


class HardClip(Fake):
    """Clips by other means than clamp, far out."""

    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(x - F, torch.tensor(-50.0)), torch.tensor(50.0))


class OneSidedClip(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (x - F).clamp(min=0)


class ClipSometimes(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (x - F).clamp(-1, 1) if t > 2 else x - F


class ClipTwice(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (x - F.clamp(-1, 1)).clamp(-1, 1)


class Infinite(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - F / (t - 2)


class Broken(Fake):
    def following(self, F: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("five channels expected")


class TupleResult(Fake):
    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> Any:
        return (sample - model_output,)


class NeedsMask(Fake):
    def step(  # type: ignore[override]
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, mask: torch.Tensor
    ) -> Any:
        return SimpleNamespace(prev_sample=sample * mask)


class MixesPixels(Fake):
    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample.flip(-1)


class LearnedVariance(Fake):
    config = SimpleNamespace(variance_type="learned_range")


class NoStep:
    config = SimpleNamespace()
    timesteps = torch.tensor([1.0])

    def set_timesteps(self, steps: int) -> None:
        assert steps


def test_a_linear_scheduler_of_ones_own_needs_no_diffusers_class() -> None:
    schedule = probe(FakeWithNoise(), 3)
    assert schedule.init_scale == 1.0
    assert (schedule.s, schedule.a, schedule.p, schedule.q) == ((1.0,) * 3, (1.0,) * 3, (0.0,) * 3, (1.0,) * 3)
    assert schedule.b == pytest.approx([-1 / 3, -1 / 2, -1])
    assert schedule.c == (0.5,) * 3


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (Square, r"Square departs from its table by \S+ of the latent at step 0, expected at most 1e-05, with random"
         r" inputs of scale 1: it is not linear"),
        (Offset, r"Offset is not a table of numbers: result of step 0 leaves 0.01 of .* that no earlier value .*"),
        (Product, r"Product departs from its table by \S+ of the latent at step 0, .* of scale 1: it is not linear"),
        (TorchRandn, r"TorchRandn gives two results for the same inputs: it draws noise .* randn_tensor"),
        (NumpyNoise, r"NumpyNoise gives two results for the same inputs: it draws noise other than through"
         r" randn_tensor"),
        (TwoDraws, r"step 0 of TwoDraws draws noise more than once, expected at most one array"),
        (OddNoise, r"step 0 of OddNoise draws noise \[1, 1, 1, 1\], expected \[2, 3, 4, 4\]"),
        (HardClip, r"HardClip departs from its table by \S+ of the latent at step 0, .* scale 1000: it is not linear"),
        (OneSidedClip, r"OneSidedClip clips to \[0, None\], expected one range \[-r, r\] at all steps"),
        (ClipSometimes, r"ClipSometimes clips x0 at some steps only, expected all or none"),
        (ClipTwice, r"step 0 of ClipTwice clips 2 times, expected at most once"),
        (Infinite, r"step 1 of Infinite itself gives inf or nan, expected finite numbers"),
        (Broken, r"step 0 of Broken fails on a sample \[2, 3, 4, 4\]: five channels expected"),
        (TupleResult, r"step 0 of TupleResult returns no prev_sample \[2, 3, 4, 4\], as diffusers' schedulers do"),
        (NeedsMask, r"NeedsMask.step requires \['model_output', 'timestep', 'sample', 'mask'\], expected model_output,"
         r" timestep and sample only"),
        (MixesPixels, r"MixesPixels is not a table of numbers: input of step 0 leaves 1 of the anchor that .*"),
        (LearnedVariance, r"LearnedVariance.config.variance_type is 'learned_range': the network's output scales the"
         r" noise of a step"),
        (NoStep, r"NoStep has no method step, expected a diffusers scheduler"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)  # fmt: skip
def test_what_is_not_a_table_is_refused(scheduler: Callable[[], Any], message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        probe(scheduler(), 3)
    assert caught.match(rf"^{message}(\n|$)")


REFUSED = [
    (Case("thresholding", "DDIMScheduler", 4, {"thresholding": True, "clip_sample": False}),
     r"DDIMScheduler clips by a bound that depends on the sample \(dynamic thresholding\)"
     r"\n\nhint: set thresholding=False in the scheduler's configuration$"),
    (Case("DDIM-clip", "DDIMScheduler", 4, {"clip_sample": True}),
     r"DDIMScheduler departs from its table by \S+ of the latent at .*: it is not linear around the clip of x0$"),
    (Case("learned-variance", "DDPMScheduler", 4, {"variance_type": "learned_range"}),
     r"DDPMScheduler.config.variance_type is 'learned_range': .*"),
    (Case("UniPC-noise-prediction", "UniPCMultistepScheduler", 4, {"predict_x0": False}),
     r"step 3 of UniPCMultistepScheduler itself gives inf or nan, expected finite numbers$"),
    (Case("eta", "LCMScheduler", 4, eta=0.5), r"eta is 0.5, but LCMScheduler.step takes no eta$"),
    (Case("RePaint", "RePaintScheduler", 4), r"RePaintScheduler.step requires .*'original_image', 'mask'\], .*"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "message"), REFUSED, ids=[case.id for case, _ in REFUSED])
def test_diffusers_schedulers_without_a_table_are_refused(case: Case, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        case.probe()
    assert caught.match(f"^{message}")


def test_a_wrong_table_would_be_noticed() -> None:
    """The comparison of this file is not blind: one coefficient off by 1e-4 shows."""
    case = CASES[2]
    schedule = case.probe()
    wrong = replace(schedule, b=(schedule.b[0] * 1.0001, *schedule.b[1:]))
    reference = diffusers_trajectory(case, schedule, torch.float64)
    assert deviation(table_trajectory(wrong, reference).latents, reference.latents) > 1e-6

"""How generators sample that no diffusers pipeline runs, written from their papers.

Every function has the signature of ``Loop.sample``: ``nets`` are called by name, ``inputs`` come from the user,
``steps`` counts the calls of the denoiser, and ``noise(shape)`` returns fresh standard normal noise at each call.
Coefficients are Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Nets = Mapping[str, Callable[..., Tensor]]
Inputs = Mapping[str, Tensor]
Noise = Callable[[tuple[int, ...]], Tensor]

PICTURE = (1, 3, 16, 16)
LATENT = (1, 4, 8, 8)
VIDEO = (1, 4, 4, 8, 8)
MEL = (1, 1, 8, 32)
Z = (1, 32)

BOUNDARY = torch.randn(PICTURE, generator=torch.Generator().manual_seed(60))

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, RHO = 0.5, 0.002, 80.0, 7.0


def _time(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32)


def _grid(steps: int, start: float = 1.0, end: float = 0.0) -> list[float]:
    return [start + (end - start) * i / steps for i in range(steps + 1)]


def _sigmas(steps: int) -> list[float]:
    """Returns where each step starts: Eq. 5 of Karras et al. (2022), arXiv:2206.00364, with N = steps + 1."""
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return [(high + (low - high) * i / steps) ** RHO for i in range(steps)]


def _edm(net: Callable[..., Tensor], x: Tensor, sigma: float, **conditions: Tensor) -> Tensor:
    """Returns the denoised x: Eq. 7 and Table 1 (EDM) of Karras et al. (2022), arXiv:2206.00364."""
    total = math.sqrt(sigma**2 + SIGMA_DATA**2)
    output = net(x / total, t=_time(math.log(sigma) / 4), **conditions)
    return (SIGMA_DATA / total) ** 2 * x + sigma * SIGMA_DATA / total * output


def mean_flow(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """z_r = z_t - (t - r) u(z_t, r, t): Algorithm 2 of Geng et al. (2025), arXiv:2505.13447."""
    z = noise(LATENT)
    times = _grid(steps)
    for t, r in pairwise(times):
        z = z - (t - r) * nets["denoiser"](z, r=_time(r), t=_time(t), label=inputs["class_label"])
    return nets["decoder"](z / 0.18215)


def moment_matching(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """Pushforward x_s = f(x_t, t, s): Algorithm 2 of Zhou et al. (2025), arXiv:2503.07565.

    The Euler-FM form of its Section 4: x_t = (1 - t) x_0 + t sigma_data n, f = x - (t - s) sigma_data F(c_in x, t, s),
    guided with a null label, F = w F_label + (1 - w) F_null.
    """
    x = SIGMA_DATA * noise(LATENT)
    times = _grid(steps, 0.994, 0.006)
    for t, s in pairwise(times):
        scaled = x / (SIGMA_DATA * math.sqrt((1 - t) ** 2 + t**2))
        given = {"t": _time(t), "s": _time(s)}
        x = x - (t - s) * SIGMA_DATA * nets["denoiser"](scaled, label=inputs["class_label"], **given)
    return nets["decoder"](x / SIGMA_DATA)


def shortcut(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """x_(t+d) = x_t + d s(x_t, t, d), from noise at t = 0: Algorithm 2 of Frans et al. (2024), arXiv:2410.12557."""
    x = noise(LATENT)
    d = 1.0 / steps
    for i in range(steps):
        x = x + d * nets["denoiser"](x, t=_time(i * d), d=_time(d), label=inputs["class_label"])
    return nets["decoder"](x / 0.18215)


def trajectory(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """Gamma-sampling of consistency trajectory models: Kim et al. (2023), arXiv:2310.02279, Section 4.

    G(x, t, s) = s/t x + (1 - s/t) g(x, t, s); every jump goes to sqrt(1 - gamma^2) times the next time, and noise of
    strength gamma leads back to it.
    """
    gamma = 0.5
    times = [*_sigmas(steps), 0.0]
    x = times[0] * noise(PICTURE)
    for i, (t, following) in enumerate(pairwise(times)):
        s = math.sqrt(1 - gamma**2) * following
        clean = _edm(nets["denoiser"], x, t, s=_time(math.log(max(s, SIGMA_MIN)) / 4), label=inputs["class_label"])
        x = s / t * x + (1 - s / t) * clean
        if i < steps - 1:
            x = x + gamma * following * noise(PICTURE)
    return x


def consistency(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """Multistep consistency sampling: Algorithm 1 and Appendix C of Song et al. (2023), arXiv:2303.01469, clipped."""
    x = SIGMA_MAX * noise(PICTURE)
    clean = x
    for i, sigma in enumerate(_sigmas(steps)):
        if i > 0:
            x = clean + math.sqrt(sigma**2 - SIGMA_MIN**2) * noise(PICTURE)
        total, above = math.sqrt(sigma**2 + SIGMA_DATA**2), sigma - SIGMA_MIN
        output = nets["denoiser"](x / total, t=_time(math.log(sigma) / 4))
        clean = SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2) * x + SIGMA_DATA * above / total * output
        clean = clean.clamp(-1.0, 1.0)
    return clean


def one_call(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """G(sigma z) with sigma = 2.5: score identity distillation, Zhou et al. (2024), arXiv:2404.04057."""
    return _edm(nets["denoiser"], 2.5 * noise(PICTURE), 2.5, label=inputs["class_label"]).clamp(-1.0, 1.0)


def _alpha_bar(t: int) -> float:
    """Returns the squared signal scale of Stable Diffusion after t + 1 of its 1000 steps (scaled linear betas)."""
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    return math.prod(1 - (low + (high - low) * i / 999) ** 2 for i in range(t + 1))


def renoise(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """Denoise, add noise, denoise at 999, 749, 499, 249: Section 4.4 of Yin et al. (2024), arXiv:2405.14867."""
    context = nets["text_encoder"](inputs["prompt"])
    clean = x = noise(LATENT)
    for i in range(steps):
        t = 999 - 1000 * i // steps
        signal = _alpha_bar(t)
        if i > 0:
            x = math.sqrt(signal) * clean + math.sqrt(1 - signal) * noise(LATENT)
        predicted = nets["denoiser"](x, t=_time(float(t)), context=context)
        clean = (x - math.sqrt(1 - signal) * predicted) / math.sqrt(signal)
    return nets["decoder"](clean / 0.18215)


def euler_step(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """x_0 = z - v(z, 1): one Euler step of a rectified flow, Zhu et al. (2024), arXiv:2407.12718 (SlimFlow)."""
    z = noise(PICTURE)
    return (z - nets["denoiser"](z, t=_time(1.0))).clamp(-1.0, 1.0)


def acceleration(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """x += v dt + a(x, t, v) t' dt, t' in the middle of the step: Eq. 13 of Park et al. (2024), arXiv:2411.00322.

    The velocity network is called once, on the noise. The times go from noise at 0 to data at 1.
    """
    x = noise(PICTURE)
    velocity = nets["velocity"](x)
    for i in range(steps):
        a = nets["denoiser"](x, t=_time(i / steps), velocity=velocity)
        x = x + velocity / steps + (2 * i + 1) / (2 * steps**2) * a
    return x.clamp(-1.0, 1.0)


def without_time(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """Euler steps of a flow whose network is not told the time: Sun et al. (2025), arXiv:2502.13129."""
    x = noise(PICTURE)
    for _ in range(steps):
        x = x - nets["denoiser"](x) / steps
    return x.clamp(-1.0, 1.0)


def fixed_start(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """DDIM steps (arXiv:2010.02502, Eq. 12) from a stored x_T: Ma et al. (2023), arXiv:2305.15357."""
    x = BOUNDARY
    for i in range(steps):
        t = 999 - 1000 * i // steps
        signal, following = _alpha_bar(t), _alpha_bar(999 - 1000 * (i + 1) // steps) if i < steps - 1 else 1.0
        clean = nets["denoiser"](x, t=_time(float(t)), image=inputs["image"] * 2 - 1)
        x = math.sqrt(following) * clean + math.sqrt((1 - following) / (1 - signal)) * (x - math.sqrt(signal) * clean)
    return x.clamp(-1.0, 1.0)


def residual_shift(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """From the small picture with noise to the large one: ResShift of Yue et al. (2023), arXiv:2307.12348.

    x_T = y + kappa sqrt(eta_T) n; x_(t-1) = eta_(t-1)/eta_t x_t + alpha_t/eta_t f(x_t, y, t) + kappa sqrt(eta_(t-1)
    alpha_t/eta_t) n, alpha_t = eta_t - eta_(t-1), in latents of the picture made as large as the result.
    """
    kappa, power, first, last = 2.0, 0.3, 0.02, 0.99
    roots = [first * (last / first) ** ((i / max(steps - 1, 1)) ** power) for i in range(steps)]
    etas = [0.0, *(r**2 for r in (roots if steps > 1 else [last]))]
    large = F.interpolate(inputs["image"] * 2 - 1, scale_factor=2.0, mode="bicubic")
    y = nets["encoder"](large)
    x = y + kappa * math.sqrt(etas[-1]) * noise(tuple(y.shape))
    for t in range(steps, 0, -1):
        eta, before = etas[t], etas[t - 1]
        scaled = x / math.sqrt(1 + kappa**2 * eta)
        clean = nets["denoiser"](scaled, t=_time(float(t - 1)), image=inputs["image"] * 2 - 1)
        x = before / eta * x + (eta - before) / eta * clean
        if t > 1:
            x = x + kappa * math.sqrt(before * (eta - before) / eta) * noise(tuple(x.shape))
    return nets["decoder"](x)


def audio(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """Euler steps of a rectified flow of mel spectrograms: Liu et al. (2024), arXiv:2410.12266 (FlashAudio)."""
    context = nets["text_encoder"](inputs["prompt"])
    mel = noise(MEL)
    for i in range(steps):
        mel = mel + nets["denoiser"](mel, t=_time(i / steps), context=context) / steps
    return nets["vocoder"](mel)


def video(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """One denoising of a whole video at sigma 80, from its first frame: Ben Yahia et al. (2024), arXiv:2412.07583."""
    image = nets["encoder"](inputs["image"] * 2 - 1)
    return nets["decoder"](_edm(nets["denoiser"], SIGMA_MAX * noise(VIDEO), SIGMA_MAX, image=image))


def depth(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """x_0 predicted at t = 999 from the latents alone, no noise: Lotus-D of He et al. (2024), arXiv:2409.18124."""
    latent = nets["encoder"](inputs["image"] * 2 - 1)
    return nets["decoder"](nets["denoiser"](latent, t=_time(999.0))).mean(dim=1, keepdim=True) * 0.5 + 0.5


def two_texts(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """Euler steps x += dt v, guided in two passes: Liu et al. (2023), arXiv:2309.06380 (InstaFlow).

    Text comes from two encoders, as tokens and as one vector; token 0 everywhere is the empty prompt.
    """
    prompts = (inputs["prompt"], torch.zeros_like(inputs["prompt"]))
    texts = [{"context": nets["text_encoder"](p), "pooled": nets["text_encoder_2"](p)} for p in prompts]
    x = noise(LATENT)
    for i in range(steps):
        x = x + nets["denoiser"](x, t=_time(i / steps), bound=texts[0], free=texts[1]) / steps
    return nets["decoder"](x / 0.18215)


def growing(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """The latents grow in the last step: scale-wise distillation of Starodubcev et al. (2025), arXiv:2503.16397."""
    context = nets["text_encoder"](inputs["prompt"])
    clean = x = noise((1, 4, 4, 4))
    for i in range(steps):
        t = 1.0 - i / steps
        if i > 0:
            if i == steps - 1:
                clean = F.interpolate(clean, scale_factor=2.0, mode="bicubic")
            x = (1 - t) * clean + t * noise(tuple(clean.shape))
        clean = x - t * nets["denoiser"](x, t=_time(t), context=context)
    return nets["decoder"](clean)


def denoising_gan(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """x_0 = G(x_t, z, t), then the posterior of x_(t-1): Xiao et al. (2021), arXiv:2112.07804 (DD-GAN).

    Every step draws twice: z for the generator, and the noise of the posterior.
    """
    signals = [math.exp(-(0.1 * u + 9.95 * u**2)) for u in _grid(steps, 0.0, 1.0)]
    x = noise(PICTURE)
    for i in range(steps, 0, -1):
        clean = nets["denoiser"](x, t=_time(float(i - 1)), z=noise(Z)).tanh()
        signal, before = signals[i], signals[i - 1]
        alpha = signal / before
        x = math.sqrt(before) * (1 - alpha) / (1 - signal) * clean + math.sqrt(alpha) * (1 - before) / (1 - signal) * x
        if i > 1:
            x = x + math.sqrt((1 - before) / (1 - signal) * (1 - alpha)) * noise(PICTURE)
    return x


def guided_trajectory(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """Deterministic jumps x_s = G(x_t, t, s, text, w): Saito et al. (2024), arXiv:2405.18503 (SoundCTM), gamma = 0.

    The guidance scale w is an input of the network.
    """
    context = nets["text_encoder"](inputs["prompt"])
    times = [*_sigmas(steps), 0.0]
    x = times[0] * noise(MEL)
    for t, s in pairwise(times):
        given = {"s": _time(math.log(max(s, SIGMA_MIN)) / 4), "context": context, "w": _time(guidance)}
        x = s / t * x + (1 - s / t) * _edm(nets["denoiser"], x, t, **given)
    return nets["vocoder"](x)


def gaussian_mixture(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """Euler steps along the mean of a mixture of velocities: Chen et al. (2025), arXiv:2504.05304 (GMFlow).

    The network returns K = 4 velocities and K log-weights for every pixel: K C + K channels.
    """
    x = noise(LATENT)
    for t, s in pairwise(_grid(steps)):
        output = nets["denoiser"](x, t=_time(t), label=inputs["class_label"])
        means, weights = output[:, :16].unflatten(1, (4, 4)), output[:, 16:].softmax(dim=1)
        x = x - (t - s) * (weights[:, :, None] * means).sum(dim=1)
    return nets["decoder"](x / 0.18215)


def whole_trajectory(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """One call predicts x at four times, the last of them 0: Zheng et al. (2022), arXiv:2211.13449 (DSNO)."""
    return nets["denoiser"](noise(PICTURE))[-1:].clamp(-1.0, 1.0)


def relay(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """A large network in the first half of the steps, a small one in the rest: Yan et al. (2024), arXiv:2408.06646.

    Deterministic steps (DDIM, arXiv:2010.02502, Eq. 12) of networks that predict the noise (Hybrid SD).
    """
    context = nets["text_encoder"](inputs["prompt"])
    x = noise(LATENT)
    for i in range(steps):
        net = nets["denoiser"] if 2 * i < steps else nets["denoiser_small"]
        t = 999 - 1000 * i // steps
        signal, following = _alpha_bar(t), _alpha_bar(999 - 1000 * (i + 1) // steps) if i < steps - 1 else 1.0
        predicted = net(x, t=_time(float(t)), context=context)
        clean = (x - math.sqrt(1 - signal) * predicted) / math.sqrt(signal)
        x = math.sqrt(following) * clean + math.sqrt(1 - following) * predicted
    return nets["decoder"](x / 0.18215)


def degradation_guided(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """x_0 from the latents of the poor picture in one call: Zhang et al. (2024), arXiv:2409.17058 (S3Diff).

    A second network estimates the degradation, which scales the low-rank weights inside the first: they cannot be
    merged. No noise at all.
    """
    image = inputs["image"] * 2 - 1
    x = nets["encoder"](image)
    signal = _alpha_bar(999)
    predicted = nets["denoiser"](x, t=_time(999.0), degradation=nets["estimator"](image))
    return nets["decoder"]((x - math.sqrt(1 - signal) * predicted) / math.sqrt(signal))


def predicted_noise(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """A network chooses the noise of the first step: Yue et al. (2024), arXiv:2412.09013 (InvSR).

    It returns the mean and the logarithm of the variance of a normal; later steps take fresh noise.
    """
    y = nets["encoder"](inputs["image"] * 2 - 1)
    clean = y
    for i in range(steps):
        t = 250 - 250 * i // steps
        fresh = noise(LATENT)
        if i == 0:
            mean, log_variance = nets["noise_predictor"](y, t=_time(float(t))).chunk(2, dim=1)
            fresh = mean + (0.5 * log_variance).exp() * fresh
        signal = _alpha_bar(t)
        x = math.sqrt(signal) * clean + math.sqrt(1 - signal) * fresh
        clean = (x - math.sqrt(1 - signal) * nets["denoiser"](x, t=_time(float(t)))) / math.sqrt(signal)
    return nets["decoder"](clean)


def bridge(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """From one picture to another: Zhou et al. (2023), arXiv:2309.16948 (DDBM), with a Brownian bridge.

    x_0 = D(x_t, t, x_T), then x_s normal with mean s/t x_t + (1 - s/t) x_0 and variance s (t - s) / t.
    """
    x = source = inputs["image"] * 2 - 1
    for t, s in pairwise(_grid(steps)):
        clean = nets["denoiser"](x, t=_time(t), image=source)
        x = s / t * x + (1 - s / t) * clean
        if s > 0:
            x = x + math.sqrt(s * (t - s) / t) * noise(PICTURE)
    return x.clamp(-1.0, 1.0)

"""Generators that no diffusers pipeline runs, written from their papers: networks and a function that samples.

Every function has the signature of ``Loop.sample``: ``nets`` are called by name, ``inputs`` come from the user,
``steps`` counts the calls of the denoiser, and ``noise(shape)`` returns fresh standard normal noise at each call.
Coefficients are Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from tests.zoo import nets as N
from tests.zoo.family import Family, Group, Input, Loop, Output
from tests.zoo.parts import alive

Nets = Mapping[str, Callable[..., Tensor]]
Inputs = Mapping[str, Tensor]
Noise = Callable[[tuple[int, ...]], Tensor]

PICTURE = (1, 3, 16, 16)
LATENT = (1, 4, 8, 8)
VIDEO = (1, 4, 4, 8, 8)
MEL = (1, 1, 8, 32)

LABEL = {"class_label": Input("class", (1,), 10)}
PROMPT = {"prompt": Input("prompt", (1, N.TOKENS), N.VOCABULARY)}

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, RHO = 0.5, 0.002, 80.0, 7.0


def _time(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32)


def _grid(steps: int, start: float = 1.0, end: float = 0.0) -> list[float]:
    return [start + (end - start) * i / steps for i in range(steps + 1)]


def _sigmas(steps: int) -> list[float]:
    """Returns Eq. 5 of Karras et al. (2022), arXiv:2206.00364, without its final zero."""
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return [(high + (low - high) * i / max(steps - 1, 1)) ** RHO for i in range(steps)]


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
    null = torch.full_like(inputs["class_label"], 10)
    for t, s in pairwise(times):
        scaled = x / (SIGMA_DATA * math.sqrt((1 - t) ** 2 + t**2))
        given = {"t": _time(t), "s": _time(s)}
        free = nets["denoiser"](scaled, label=null, **given)
        bound = nets["denoiser"](scaled, label=inputs["class_label"], **given)
        x = x - (t - s) * SIGMA_DATA * (guidance * bound + (1 - guidance) * free)
    return nets["decoder"](x / SIGMA_DATA)


def shortcut(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """x_(t+d) = x_t + d s(x_t, t, d), from noise at t = 0: Algorithm 2 of Frans et al. (2024), arXiv:2410.12557."""
    x = noise(LATENT)
    d = 1.0 / steps
    for i in range(steps):
        x = x + d * nets["denoiser"](x, t=_time(i * d), d=_time(d), label=inputs["class_label"])
    return nets["decoder"](x / 0.18215)


def trajectory(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise, gamma: float = 0.5) -> Tensor:
    """Gamma-sampling of consistency trajectory models: Kim et al. (2023), arXiv:2310.02279, Section 4.

    G(x, t, s) = s/t x + (1 - s/t) g(x, t, s); every jump goes to sqrt(1 - gamma^2) times the next time, and noise of
    strength gamma leads back to it.
    """
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
    for i, sigma in enumerate(_sigmas(steps + 1)[:-1]):
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


def fixed_start(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise, boundary: Tensor) -> Tensor:
    """DDIM steps (arXiv:2010.02502, Eq. 12) from a stored x_T: Ma et al. (2023), arXiv:2305.15357."""
    x = boundary
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
    large = torch.nn.functional.interpolate(inputs["image"] * 2 - 1, scale_factor=2.0, mode="bicubic")
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
        bound, free = (nets["denoiser"](x, t=_time(i / steps), **text) for text in texts)
        x = x + (free + guidance * (bound - free)) / steps
    return nets["decoder"](x / 0.18215)


def growing(nets: Nets, inputs: Inputs, *, steps: int, guidance: float, noise: Noise) -> Tensor:
    """The latents grow in the last step: scale-wise distillation of Starodubcev et al. (2025), arXiv:2503.16397."""
    context = nets["text_encoder"](inputs["prompt"])
    clean = x = noise((1, 4, 4, 4))
    for i in range(steps):
        t = 1.0 - i / steps
        if i > 0:
            if i == steps - 1:
                clean = torch.nn.functional.interpolate(clean, scale_factor=2.0, mode="bicubic")
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
        clean = nets["denoiser"](x, t=_time(float(i - 1)), z=noise((1, N.WIDTH))).tanh()
        signal, before = signals[i], signals[i - 1]
        alpha = signal / before
        x = math.sqrt(before) * (1 - alpha) / (1 - signal) * clean + math.sqrt(alpha) * (1 - before) / (1 - signal) * x
        if i > 1:
            x = x + math.sqrt((1 - before) / (1 - signal) * (1 - alpha)) * noise(PICTURE)
    return x


def _loop(
    name: str,
    networks: Callable[[], Mapping[str, nn.Module]],
    sample: Callable[..., Tensor],
    inputs: Mapping[str, Input],
    output: Output,
    steps: tuple[int, ...],
) -> Loop:
    living = {key: alive(net, seed=40 + i) for i, (key, net) in enumerate(networks().items())}
    return Loop(name, living, sample, inputs, output, steps)


def _family(
    name: str,
    group: Group,
    networks: Callable[[], Mapping[str, nn.Module]],
    sample: Callable[..., Tensor],
    steps: tuple[int, ...],
    inputs: Mapping[str, Input] | None = None,
    *,
    output: Output = "picture",
    guidance: float = 1.0,
    note: str = "",
) -> Family:
    given = inputs or {}
    make = partial(_loop, name, networks, sample, given, output, steps)
    return Family(name, group, "loop", make, steps, {"guidance": guidance}, given, output, note)


def _boundary() -> Tensor:
    return torch.randn(PICTURE, generator=torch.Generator().manual_seed(60))


FAMILIES = (
    _family(
        "meanflow",
        "two times",
        lambda: {"denoiser": N.MeanDiT(4, times=2, classes=10), "decoder": N.Decoder()},
        mean_flow,
        (1, 2, 4),
        LABEL,
        note="mean velocity between two times",
    ),
    _family(
        "imm",
        "two times",
        lambda: {"denoiser": N.JumpDiT(4, times=2, classes=11), "decoder": N.Decoder()},
        moment_matching,
        (1, 2, 4),
        LABEL,
        guidance=1.5,
        note="guided in two passes with a null label",
    ),
    _family(
        "shortcut",
        "two times",
        lambda: {"denoiser": N.StrideDiT(4, times=2, classes=10), "decoder": N.Decoder()},
        shortcut,
        (1, 2, 4),
        LABEL,
        note="time and length of the step, time runs upwards",
    ),
    _family(
        "ctm",
        "two times",
        lambda: {"denoiser": N.JumpUNet(3, 3, times=2, classes=10, scale=10.0)},
        trajectory,
        (1, 2, 4),
        LABEL,
        note="jumps below the next time, noise leads back to it",
    ),
    _family(
        "consistency-edm",
        "consistency",
        lambda: {"denoiser": N.TimeUNet(3, 3, scale=10.0)},
        consistency,
        (1, 2, 4),
        note="re-noises, clips after every call",
    ),
    _family(
        "sid",
        "one-call and adversarial",
        lambda: {"denoiser": N.ClassUNet(3, 3, classes=10, scale=10.0)},
        one_call,
        (1,),
        LABEL,
        note="EDM preconditioning at one noise level",
    ),
    _family(
        "dmd2",
        "one-call and adversarial",
        lambda: {
            "text_encoder": N.TextEncoder(),
            "denoiser": N.TextUNet(4, 4, scale=0.01),
            "decoder": N.Decoder(),
        },
        renoise,
        (1, 2, 4),
        PROMPT,
        note="predicts the noise, re-noises between calls",
    ),
    _family(
        "dd-gan",
        "one-call and adversarial",
        lambda: {"denoiser": N.NoisyUNet(3, 3)},
        denoising_gan,
        (1, 2, 4),
        note="two draws in a step: a vector for the network, and the posterior",
    ),
    _family("slimflow", "flow", lambda: {"denoiser": N.TimeUNet(3, 3, scale=10.0)}, euler_step, (1,)),
    _family(
        "constant-acceleration",
        "flow",
        lambda: {"velocity": N.NoTimeUNet(3, 3, times=0), "denoiser": N.AccelerationUNet(6, 3, scale=10.0)},
        acceleration,
        (1, 2, 4),
        note="one network once, another in every step, which sees the output of the first",
    ),
    _family(
        "two-texts-flow",
        "flow",
        lambda: {
            "text_encoder": N.TextEncoder(),
            "text_encoder_2": N.TextEncoder(pooled=True),
            "denoiser": N.PooledTextDiT(4),
            "decoder": N.Decoder(),
        },
        two_texts,
        (1, 2, 4),
        PROMPT,
        guidance=3.0,
        note="two text encoders, guided in two passes with an empty prompt",
    ),
    _family(
        "without-time",
        "special",
        lambda: {"denoiser": N.NoTimeUNet(3, 3, times=0)},
        without_time,
        (1, 2, 4),
        note="no time input",
    ),
    _family(
        "fixed-start",
        "special",
        lambda: {"denoiser": N.ImageUNet(6, 3, scale=0.01)},
        partial(fixed_start, boundary=_boundary()),
        (1, 2),
        {"image": Input("image", (1, 3, 8, 8))},
        note="super-resolution from a stored x_T: the seed changes nothing",
    ),
    _family(
        "growing-latents",
        "special",
        lambda: {
            "text_encoder": N.TextEncoder(),
            "denoiser": N.TextUNet(4, 4, scale=10.0),
            "decoder": N.Decoder(),
        },
        growing,
        (2, 4),
        PROMPT,
        note="the denoiser is called with two sizes",
    ),
    _family(
        "resshift",
        "image in",
        lambda: {"encoder": N.Encoder(3), "denoiser": N.ImageUNet(6, 3), "decoder": N.Decoder(3)},
        residual_shift,
        (4,),
        {"image": Input("image", (1, 3, 8, 8))},
        note="super-resolution: starts at the small picture, which the network sees too",
    ),
    _family(
        "lotus",
        "image in",
        lambda: {"encoder": N.Encoder(), "denoiser": N.TimeUNet(4, 4, scale=0.01), "decoder": N.Decoder()},
        depth,
        (1,),
        {"image": Input("image", PICTURE)},
        output="depth",
        note="no noise: the seed changes nothing; depth [1, 1, H, W] in [0, 1]",
    ),
    _family(
        "flash-audio",
        "not pictures",
        lambda: {"text_encoder": N.TextEncoder(), "denoiser": N.TextDiT(1, MEL[2:]), "vocoder": N.Vocoder()},
        audio,
        (1, 2, 4),
        PROMPT,
        output="audio",
        note="mel spectrograms and a vocoder; waveform [1, 1, S]",
    ),
    _family(
        "one-step-video",
        "not pictures",
        lambda: {"encoder": N.Encoder(), "denoiser": N.VideoUNet(8, 4, scale=10.0), "decoder": N.Decoder()},
        video,
        (1,),
        {"image": Input("image", PICTURE)},
        output="video",
        note="five-dimensional convolutions; video [1, 3, F, H, W]",
    ),
)

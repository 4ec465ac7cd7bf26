"""Generators that no diffusers pipeline runs: networks, and the functions of ``samplers`` that sample with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from tests.support.zoo import nets as N
from tests.support.zoo import samplers as S
from tests.support.zoo.family import Family, Group, Input, Loop, Output
from tests.support.zoo.parts import alive

LABEL = {"class_label": Input("class", (1,), 10)}
PROMPT = {"prompt": Input("prompt", (1, N.TOKENS), N.VOCABULARY)}
SMALL = {"image": Input("image", (1, 3, 8, 8))}
LARGE = {"image": Input("image", S.PICTURE)}


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


FAMILIES = (
    _family(
        "meanflow",
        "two times",
        lambda: {"denoiser": N.MeanDiT(4, times=2, classes=10), "decoder": N.Decoder()},
        S.mean_flow,
        (1, 2, 4),
        LABEL,
        note="mean velocity between two times",
    ),
    _family(
        "imm",
        "two times",
        lambda: {
            "denoiser": N.NullGuided(N.JumpDiT(4, times=2, classes=11), null=10, scale=1.5),
            "decoder": N.Decoder(),
        },
        S.moment_matching,
        (1, 2, 4),
        LABEL,
        note="guided with a null label, both passes in the network",
    ),
    _family(
        "shortcut",
        "two times",
        lambda: {"denoiser": N.StrideDiT(4, times=2, classes=10), "decoder": N.Decoder()},
        S.shortcut,
        (1, 2, 4),
        LABEL,
        note="time and length of the step, time runs upwards",
    ),
    _family(
        "ctm",
        "two times",
        lambda: {"denoiser": N.JumpUNet(3, 3, times=2, classes=10, scale=10.0)},
        S.trajectory,
        (1, 2, 4),
        LABEL,
        note="jumps below the next time, noise leads back to it",
    ),
    _family(
        "consistency-edm",
        "consistency",
        lambda: {"denoiser": N.TimeUNet(3, 3, scale=10.0)},
        S.consistency,
        (1, 2, 4),
        note="re-noises, clips after every call",
    ),
    _family(
        "sid",
        "one-call and adversarial",
        lambda: {"denoiser": N.ClassUNet(3, 3, classes=10, scale=10.0)},
        S.one_call,
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
        S.renoise,
        (1, 2, 4),
        PROMPT,
        note="predicts the noise, re-noises between calls",
    ),
    _family(
        "dd-gan",
        "one-call and adversarial",
        lambda: {"denoiser": N.NoisyUNet(3, 3)},
        S.denoising_gan,
        (1, 2, 4),
        note="two draws in a step: a vector for the network, and the posterior",
    ),
    _family("slimflow", "flow", lambda: {"denoiser": N.TimeUNet(3, 3, scale=10.0)}, S.euler_step, (1,)),
    _family(
        "constant-acceleration",
        "flow",
        lambda: {"velocity": N.NoTimeUNet(3, 3, times=0), "denoiser": N.AccelerationUNet(6, 3, scale=10.0)},
        S.acceleration,
        (1, 2, 4),
        note="one network once, another in every step, which sees the output of the first",
    ),
    _family(
        "two-texts-flow",
        "flow",
        lambda: {
            "text_encoder": N.TextEncoder(),
            "text_encoder_2": N.TextEncoder(pooled=True),
            "denoiser": N.TextGuided(N.PooledTextDiT(4), scale=3.0),
            "decoder": N.Decoder(),
        },
        S.two_texts,
        (1, 2, 4),
        PROMPT,
        note="two text encoders, guided with an empty prompt, both passes in the network",
    ),
    _family(
        "without-time",
        "special",
        lambda: {"denoiser": N.NoTimeUNet(3, 3, times=0)},
        S.without_time,
        (1, 2, 4),
        note="no time input",
    ),
    _family(
        "fixed-start",
        "special",
        lambda: {"denoiser": N.ImageUNet(6, 3, scale=0.01)},
        S.fixed_start,
        (1, 2),
        SMALL,
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
        S.growing,
        (2, 4),
        PROMPT,
        note="the denoiser is called with two sizes",
    ),
    _family(
        "resshift",
        "image in",
        lambda: {"encoder": N.Encoder(3), "denoiser": N.ImageUNet(6, 3), "decoder": N.Decoder(3)},
        S.residual_shift,
        (4,),
        SMALL,
        note="super-resolution: starts at the small picture, which the network sees too",
    ),
    _family(
        "lotus",
        "image in",
        lambda: {"encoder": N.Encoder(), "denoiser": N.TimeUNet(4, 4, scale=0.01), "decoder": N.Decoder()},
        S.depth,
        (1,),
        LARGE,
        output="depth",
        note="no noise: the seed changes nothing; depth [1, 1, H, W] in [0, 1]",
    ),
    _family(
        "flash-audio",
        "not pictures",
        lambda: {"text_encoder": N.TextEncoder(), "denoiser": N.TextDiT(1, S.MEL[2:]), "vocoder": N.Vocoder()},
        S.audio,
        (1, 2, 4),
        PROMPT,
        output="audio",
        note="mel spectrograms and a vocoder; waveform [1, 1, S]",
    ),
    _family(
        "one-step-video",
        "not pictures",
        lambda: {"encoder": N.Encoder(), "denoiser": N.VideoUNet(8, 4, scale=10.0), "decoder": N.Decoder()},
        S.video,
        (1,),
        LARGE,
        output="video",
        note="five-dimensional convolutions; video [1, 3, F, H, W]",
    ),
    _family(
        "sound-ctm",
        "two times",
        lambda: {
            "text_encoder": N.TextEncoder(),
            "denoiser": N.GuidedJumpDiT(1, S.MEL[2:], times=3),
            "vocoder": N.Vocoder(),
        },
        S.guided_trajectory,
        (1, 2, 4),
        PROMPT,
        output="audio",
        guidance=3.5,
        note="two times, text and the guidance scale as inputs of one network",
    ),
    _family(
        "gmflow",
        "flow",
        lambda: {"denoiser": N.ClassUNet(4, 20, classes=10, scale=10.0), "decoder": N.Decoder()},
        S.gaussian_mixture,
        (1, 2, 4),
        LABEL,
        note="the network returns a mixture for each pixel; softmax and sums between the calls",
    ),
    _family(
        "dsno",
        "special",
        lambda: {"denoiser": N.TrajectoryNet()},
        S.whole_trajectory,
        (1,),
        note="Fourier transform over the four times of one output",
    ),
    _family(
        "hybrid-sd",
        "special",
        lambda: {
            "text_encoder": N.TextEncoder(),
            "denoiser": N.TextUNet(4, 4, scale=0.01),
            "denoiser_small": N.TextDiT(4, scale=0.01),
            "decoder": N.Decoder(),
        },
        S.relay,
        (2, 4),
        PROMPT,
        note="another network in the second half of the steps",
    ),
    _family(
        "s3diff",
        "image in",
        lambda: {
            "encoder": N.Encoder(),
            "estimator": N.Estimator(),
            "denoiser": N.LowRankUNet(4, 4, scale=0.01),
            "decoder": N.Decoder(),
        },
        S.degradation_guided,
        (1,),
        LARGE,
        note="low-rank weights that depend on the picture; no noise: the seed changes nothing",
    ),
    _family(
        "invsr",
        "image in",
        lambda: {
            "encoder": N.Encoder(),
            "noise_predictor": N.TimeUNet(4, 8, scale=0.01),
            "denoiser": N.TimeUNet(4, 4, scale=0.01),
            "decoder": N.Decoder(),
        },
        S.predicted_noise,
        (1, 2, 4),
        LARGE,
        note="a network chooses the first noise",
    ),
    _family(
        "bridge",
        "image in",
        lambda: {"denoiser": N.ImageUNet(6, 3, scale=10.0)},
        S.bridge,
        (2, 4),
        LARGE,
        note="starts at a picture, which every call sees again",
    ),
)

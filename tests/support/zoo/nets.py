"""Small networks in plain PyTorch for generators that no diffusers pipeline runs.

Legend: B batch (always 1), C channels, H rows, W columns, F frames, L tokens, M mel bands, S samples, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32
TOKENS = 8
VOCABULARY = 256


class Time(nn.Module):
    """Embeds a number per sample: [B] -> [B, E]."""

    frequencies_E: Tensor

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        half = WIDTH // 2
        self.register_buffer("frequencies_E", scale * torch.exp(-math.log(100.0) * torch.arange(half) / half))
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, t_B: Tensor) -> Tensor:
        angle_BE = t_B[:, None] * self.frequencies_E
        wave_BE = torch.cat([angle_BE.cos(), angle_BE.sin()], dim=1)
        return self.out(F.silu(self.hidden(wave_BE)))


class Attention(nn.Module):
    """Attention of two heads, to the sequence itself or to a context: [B, L, E] -> [B, L, E]."""

    def __init__(self, width: int = WIDTH, context: int = WIDTH) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLE: Tensor, context_BLE: Tensor | None = None) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (2, -1)).transpose(1, 2)

        key, value = self.key_value(x_BLE if context_BLE is None else context_BLE).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(heads(self.query(x_BLE)), heads(key), heads(value))
        return self.out(mixed.transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """Two convolutions, scaled and shifted by an embedding between them; pictures, or videos with ``dims=3``."""

    def __init__(self, inputs: int, outputs: int, dims: int = 2) -> None:
        super().__init__()
        conv = _CONVOLUTIONS[dims]
        self.norm_in, self.norm_out = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.conv_in, self.conv_out = conv(inputs, outputs, 3, padding=1), conv(outputs, outputs, 3, padding=1)
        self.skip = conv(inputs, outputs, 1)
        self.modulation = nn.Linear(WIDTH, 2 * outputs)

    def forward(self, x: Tensor, embedding_BE: Tensor) -> Tensor:
        hidden = self.conv_in(F.silu(self.norm_in(x)))
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale, shift = (y.reshape(shape) for y in self.modulation(F.silu(embedding_BE)).chunk(2, dim=1))
        hidden = self.norm_out(hidden) * (1 + scale) + shift
        return self.skip(x) + self.conv_out(F.silu(hidden))


_CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class UNet(nn.Module):
    """A UNet of two resolutions, with cross-attention to a context if there is one. Subclasses name its inputs."""

    dims: ClassVar[int] = 2

    def __init__(self, inputs: int, outputs: int, *, times: int = 1, classes: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        conv, stride = _CONVOLUTIONS[self.dims], (1,) * (self.dims - 2) + (2, 2)
        self.times = nn.ModuleList(Time(scale) for _ in range(times))
        self.labels = nn.Embedding(classes, WIDTH) if classes else None
        self.first = conv(inputs, 16, 3, padding=1)
        self.before = Residual(16, 16, self.dims)
        self.shrink = conv(16, WIDTH, 3, stride=stride, padding=1)
        self.middle = Residual(WIDTH, WIDTH, self.dims)
        self.attention = Attention()
        self.after = Residual(WIDTH + 16, 16, self.dims)
        self.norm = nn.GroupNorm(4, 16)
        self.last = conv(16, outputs, 3, padding=1)

    def body(self, x: Tensor, *times_B: Tensor, label_B: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        embedding = x.new_zeros(1, WIDTH)
        for time, t_B in zip(self.times, times_B, strict=True):
            embedding = embedding + time(t_B)
        if self.labels is not None and label_B is not None:
            embedding = embedding + self.labels(label_B)
        high = self.before(self.first(x), embedding)
        low = self.middle(self.shrink(high), embedding)
        tokens = low.flatten(2).transpose(1, 2)
        low = (tokens + self.attention(tokens, context)).transpose(1, 2).reshape(low.shape)
        low = F.interpolate(low, scale_factor=tuple([1.0] * (self.dims - 2) + [2.0, 2.0]), mode="nearest")
        return self.last(F.silu(self.norm(self.after(torch.cat([low, high], dim=1), embedding))))


class TimeUNet(UNet):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x, t)


class NoTimeUNet(UNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class ClassUNet(UNet):
    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.body(x, t, label_B=label)


class JumpUNet(UNet):
    def forward(self, x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
        return self.body(x, t, s, label_B=label)


class TextUNet(UNet):
    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.body(x, t, context=context)


class ImageUNet(UNet):
    """Takes a picture or its latents beside x, made as large as x."""

    def forward(self, x: Tensor, t: Tensor, image: Tensor) -> Tensor:
        larger = F.interpolate(image, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.body(torch.cat([x, larger], dim=1), t)


class AccelerationUNet(UNet):
    def forward(self, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        return self.body(torch.cat([x, velocity], dim=1), t)


class NoisyUNet(UNet):
    """Takes a vector of noise as a second source of chance: the generator of a denoising diffusion GAN."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.mapping = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return self.body(x, t, context=F.silu(self.mapping(z))[:, None])


class VideoUNet(UNet):
    """Takes the latents of the first frame beside every frame: [B, C, F, H, W]."""

    dims = 3

    def forward(self, x: Tensor, t: Tensor, image: Tensor) -> Tensor:
        return self.body(torch.cat([x, image[:, :, None].expand(-1, -1, x.shape[2], -1, -1)], dim=1), t)


class LowRankUNet(UNet):
    """A UNet whose last layer has a low-rank branch that a vector scales: x A diag(degradation) B."""

    def __init__(self, inputs: int, outputs: int, *, scale: float = 1.0) -> None:
        super().__init__(inputs, 8, scale=scale)
        self.dense = nn.Conv2d(8, outputs, 1)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, outputs, 1, bias=False)

    def forward(self, x: Tensor, t: Tensor, degradation: Tensor) -> Tensor:
        y = self.body(x, t)
        return self.dense(y) + self.expand(self.reduce(y) * degradation[:, :, None, None])


class Estimator(nn.Module):
    """How poor a picture is, in four numbers: [B, C, H, W] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.last = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(F.silu(self.first(image)).mean(dim=(2, 3)))


class TrajectoryNet(nn.Module):
    """x at four times from noise: [1, C, H, W] -> [4, C, H, W], mixed by a Fourier convolution over the times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.times = nn.Parameter(torch.zeros(4, 16))
        self.weights = nn.Parameter(torch.zeros(2, 3, 16, 16))  # real and imaginary, for each of three frequencies
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        features = F.silu(self.first(x) + self.times[:, :, None, None])
        spectrum = torch.fft.rfft(features, dim=0, norm="ortho")
        mixed = torch.einsum("fchw,fcd->fdhw", spectrum, torch.complex(self.weights[0], self.weights[1]))
        features = features + torch.fft.irfft(mixed, n=4, dim=0, norm="ortho")
        return self.last(F.silu(self.norm(features)))


class DiTBlock(nn.Module):
    """Attention and MLP behind the gates of adaLN-zero, and cross-attention to a context if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attention, self.cross = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(2 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x_BLE: Tensor, embedding_BE: Tensor, context_BLE: Tensor | None) -> Tensor:
        modulation = self.modulation(F.silu(embedding_BE))[:, None]
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation.chunk(6, dim=-1)
        x_BLE = x_BLE + gate_1 * self.attention(self.norm_1(x_BLE) * (1 + scale_1) + shift_1)
        if context_BLE is not None:
            x_BLE = x_BLE + self.cross(x_BLE, context_BLE)
        return x_BLE + gate_2 * self.mlp(self.norm_2(x_BLE) * (1 + scale_2) + shift_2)


class DiT(nn.Module):
    """A diffusion transformer on patches. Subclasses name its inputs; a mel spectrogram is a picture of one channel."""

    def __init__(
        self,
        channels: int,
        size: tuple[int, ...] = (8, 8),
        *,
        times: int = 1,
        classes: int = 0,
        scale: float = 10.0,
    ) -> None:
        super().__init__()
        rows, columns = size[0] // 2, size[1] // 2
        self.times = nn.ModuleList(Time(scale) for _ in range(times))
        self.labels = nn.Embedding(classes, WIDTH) if classes else None
        self.first = nn.Conv2d(channels, WIDTH, 2, stride=2)
        self.positions = nn.Parameter(torch.zeros(1, rows * columns, WIDTH))
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, 4 * channels)

    def body(
        self,
        x_BCHW: Tensor,
        *times_B: Tensor,
        label_B: Tensor | None = None,
        pooled_BE: Tensor | None = None,
        context_BLE: Tensor | None = None,
    ) -> Tensor:
        embedding = x_BCHW.new_zeros(1, WIDTH) if pooled_BE is None else pooled_BE
        for time, t_B in zip(self.times, times_B, strict=True):
            embedding = embedding + time(t_B)
        if self.labels is not None and label_B is not None:
            embedding = embedding + self.labels(label_B)
        patches = self.first(x_BCHW)
        tokens = patches.flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens, embedding, context_BLE)
        pixels = self.last(self.norm(tokens)).transpose(1, 2)
        return F.pixel_shuffle(pixels.reshape(len(pixels), -1, patches.shape[2], patches.shape[3]), 2)


class MeanDiT(DiT):
    """Mean velocity between two times; sees t and t - r, as in Table 1c of the MeanFlow paper."""

    def forward(self, x: Tensor, r: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.body(x, t, t - r, label_B=label)


class JumpDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
        return self.body(x, t, s, label_B=label)


class StrideDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, d: Tensor, label: Tensor) -> Tensor:
        return self.body(x, t, d, label_B=label)


class TextDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.body(x, t, context_BLE=context)


class GuidedJumpDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, s: Tensor, context: Tensor, w: Tensor) -> Tensor:
        return self.body(x, t, s, w, context_BLE=context)


class PooledTextDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return self.body(x, t, pooled_BE=pooled, context_BLE=context)


class TextEncoder(nn.Module):
    """One layer of attention over token ids: int64 [B, L] -> [B, L, E], or [B, E] if ``pooled``."""

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x_BLE = self.tokens(ids) + self.positions.weight
        x_BLE = self.last(x_BLE + self.attention(self.norm(x_BLE)))
        return x_BLE.mean(dim=1) if self.pooled else x_BLE


class Encoder(nn.Module):
    """Latents with half the rows and columns of a picture in [-1, 1]."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(16, channels, 3, padding=1)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


class Decoder(nn.Module):
    """A picture in [-1, 1] with twice the rows and columns of the latents; frame by frame if they are a video's."""

    def __init__(self, channels: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.last = nn.Conv2d(16, outputs, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        frames = latent if latent.ndim == 4 else latent.transpose(1, 2).flatten(0, 1)
        larger = F.interpolate(F.silu(self.norm(self.first(frames))), scale_factor=2.0, mode="nearest")
        picture = self.last(larger).tanh()
        return picture if latent.ndim == 4 else picture[None].transpose(1, 2)


class Vocoder(nn.Module):
    """A waveform of four samples per mel frame: [B, 1, M, F] -> [B, 1, S]."""

    def __init__(self, bands: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv1d(bands, 16, 7, padding=3)
        self.grow = nn.ModuleList(nn.ConvTranspose1d(c, c // 2, 4, stride=2, padding=1) for c in (16, 8))
        self.last = nn.Conv1d(4, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.first(mel[:, 0])
        for layer in self.grow:
            x = layer(F.leaky_relu(x, 0.1))
        return self.last(F.leaky_relu(x, 0.1)).tanh()


class NullGuided(nn.Module):
    """A class-conditional network with guidance inside: both passes are one batch of two, the null label second."""

    def __init__(self, network: nn.Module, null: int, scale: float) -> None:
        super().__init__()
        self.network, self.null, self.scale = network, null, scale

    def forward(self, x: Tensor, *, label: Tensor, **times: Tensor) -> Tensor:
        """Returns w F_c + (1 - w) F_null."""
        labels = torch.cat([label, torch.full_like(label, self.null)])
        both = self.network(torch.cat([x, x]), label=labels, **{k: t.expand(2) for k, t in times.items()})
        return self.scale * both[:1] + (1 - self.scale) * both[1:]


class TextGuided(nn.Module):
    """A text-conditional network with guidance inside: both passes are one batch of two."""

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Tensor, *, t: Tensor, bound: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> Tensor:
        """Returns F_free + w (F_bound - F_free)."""
        texts = {name: torch.cat([bound[name], free[name]]) for name in bound}
        both = self.network(torch.cat([x, x]), t=t.expand(2), **texts)
        return both[1:] + self.scale * (both[:1] - both[1:])

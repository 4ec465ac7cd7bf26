"""Sound and video out: diffusers pipelines."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    AutoencoderOobleck,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from tests.support.zoo.family import Family
from tests.support.zoo.parts import LENGTH, WIDTH, alive, clip, clip_tokenizer, t5, t5_tokenizer, vae
from tests.support.zoo.unets import PROMPT, lcm, sd_unet


def _animatediff(folder: Path) -> Path:
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
        motion_mid_block_layers_per_block=1,
    )
    AnimateDiffPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        unet=sd_unet(),
        motion_adapter=alive(adapter, seed=30),
        scheduler=lcm(),
    ).save_pretrained(folder)
    return folder


def _ltx(folder: Path) -> Path:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=WIDTH,
    )
    decoder = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    LTXPipeline(
        transformer=alive(transformer, seed=31),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=alive(decoder, seed=32),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def _wan(folder: Path) -> Path:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=1,
        rope_max_seq_len=32,
    )
    decoder = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.5, 2.0, 1.0, 2.5],
    )
    config = UMT5Config(
        vocab_size=128,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
    )
    WanPipeline(
        transformer=alive(transformer, seed=33),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=alive(decoder, seed=34),
        text_encoder=alive(UMT5EncoderModel(config), seed=35, gain=0.7),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def _stable_audio(folder: Path) -> Path:
    transformer = StableAudioDiTModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=WIDTH,
        cross_attention_input_dim=WIDTH,
        global_states_input_dim=2 * WIDTH,
        time_proj_dim=16,
    )
    decoder = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
        audio_channels=2,
        sampling_rate=64,
    )
    decoder = alive(decoder, seed=37)
    decoder.decoder.conv2.weight_g.mul_(0.05)  # a waveform mostly within [-1, 1]
    projection = StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=8)
    StableAudioPipeline(
        transformer=alive(transformer, seed=36),
        scheduler=EDMEulerScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, prediction_type="v_prediction"),
        vae=decoder,
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        projection_model=alive(projection, seed=38),
    ).save_pretrained(folder)
    return folder


FAMILIES = (
    Family(
        "animatediff-lcm",
        "not pictures",
        "diffusers",
        _animatediff,
        (1, 2, 4),
        {"guidance_scale": 1.0, "num_frames": 4, "height": 16, "width": 16},
        PROMPT,
        output="video",
        note="UNet with motion modules on [1, C, F, H, W], decoded frame by frame",
    ),
    Family(
        "ltx-video",
        "not pictures",
        "diffusers",
        _ltx,
        (2, 4),
        {"guidance_scale": 1.0, "num_frames": 9, "height": 32, "width": 32, "max_sequence_length": LENGTH},
        PROMPT,
        output="video",
        note="packed video latents, masked text, causal 3-D autoencoder, times that depend on the size",
    ),
    Family(
        "wan",
        "not pictures",
        "diffusers",
        _wan,
        (1, 2, 4),
        {"guidance_scale": 1.0, "num_frames": 5, "height": 32, "width": 32, "max_sequence_length": LENGTH},
        PROMPT,
        output="video",
        note="five-dimensional latents, each channel with a mean and a scale of its own, causal 3-D autoencoder",
    ),
    Family(
        "stable-audio",
        "not pictures",
        "diffusers",
        _stable_audio,
        (1, 2, 4),
        {"guidance_scale": 1.0, "audio_end_in_s": 1.5},
        PROMPT,
        output="audio",
        note="DiT on one-dimensional latents, seconds as an input, EDM preconditioning, stereo waveform",
    ),
)

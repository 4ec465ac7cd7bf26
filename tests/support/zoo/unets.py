"""Text to picture, and class to picture, with a UNet: diffusers pipelines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)

from tests.support import tiny
from tests.support.zoo.family import Family, Input
from tests.support.zoo.parts import WIDTH, alive, clip, clip_tokenizer, vae

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
PROMPT = {"prompt": Input("prompt")}


def euler(**overrides: object) -> EulerDiscreteScheduler:
    """Returns the scheduler of SD-Turbo and SDXL-Lightning: Euler steps at the trailing end of each interval."""
    return EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", **overrides)


def lcm(**overrides: object) -> LCMScheduler:
    """Returns the scheduler of latent consistency models."""
    return LCMScheduler(**BETAS, **overrides)


def sd_unet(**overrides: object) -> UNet2DConditionModel:
    """Returns a UNet of Stable Diffusion 1 or 2, on 8x8 latents."""
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return alive(UNet2DConditionModel(**(settings | overrides)), seed=4)


def sd_parts(folder: Path) -> dict[str, Any]:
    """Returns what the pipelines of Stable Diffusion share: autoencoder and text encoder, no safety checker."""
    return {
        "vae": vae(),
        "text_encoder": clip(),
        "tokenizer": clip_tokenizer(folder / "tokenizer"),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sd(folder: Path, *, scheduler: SchedulerMixin) -> Path:
    StableDiffusionPipeline(**sd_parts(folder), unet=sd_unet(), scheduler=scheduler).save_pretrained(folder)
    return folder


def sdxl_unet(**overrides: object) -> UNet2DConditionModel:
    """Returns a UNet of SDXL: two text encoders side by side, pooled text and picture sizes beside the time."""
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        norm_num_groups=8,
        **overrides,
    )
    return alive(network, seed=5)


def sdxl(
    folder: Path,
    *,
    scheduler: SchedulerMixin,
    guidance_embedding: bool = False,
    pipeline_class: type[StableDiffusionXLPipeline]
    | type[StableDiffusionXLImg2ImgPipeline] = StableDiffusionXLPipeline,
) -> Path:
    """Writes a pipeline of SDXL."""
    pipeline = pipeline_class(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True, seed=6),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=clip_tokenizer(folder / "tokenizer_2", pad="!"),
        unet=sdxl_unet(time_cond_proj_dim=32 if guidance_embedding else None),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def _shifted(steps: int) -> list[int]:
    return [249 - 250 * i // steps for i in range(steps)]


def _consistency(folder: Path, *, classes: int | None = None) -> Path:
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=8,
        num_class_embeds=classes,
    )
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    ConsistencyModelPipeline(unet=alive(unet, seed=7), scheduler=scheduler).save_pretrained(folder)
    return folder


FAMILIES = (
    Family(
        "lcm",
        "consistency",
        "diffusers",
        tiny.lcm_folder,
        (1, 2, 4),
        {"guidance_scale": 8.5},
        PROMPT,
        note="guidance scale as an embedding, tiny decoder; re-noises between steps",
    ),
    Family(
        "sd-turbo",
        "one-call and adversarial",
        "diffusers",
        tiny.turbo_folder,
        (1, 2, 4),
        {"guidance_scale": 0.0},
        PROMPT,
    ),
    Family(
        "lcm-lora",
        "consistency",
        "diffusers",
        partial(_sd, scheduler=lcm()),
        (1, 2, 4),
        {"guidance_scale": 1.5, "negative_prompt": "blurry"},
        PROMPT,
        note="LCM-LoRA, merged: guided in two passes with a negative prompt",
    ),
    Family(
        "lcm-sdxl",
        "consistency",
        "diffusers",
        partial(sdxl, scheduler=lcm(), guidance_embedding=True),
        (1, 2, 4),
        {"guidance_scale": 8.0},
        PROMPT,
        note="guidance scale as an embedding beside pooled text and sizes",
    ),
    Family(
        "tcd",
        "consistency",
        "diffusers",
        partial(_sd, scheduler=TCDScheduler(**BETAS)),
        (1, 2, 4),
        {"guidance_scale": 0.0, "eta": 0.3},
        PROMPT,
        note="Trajectory consistency (arXiv:2402.19159): jumps to s < t, then noise of strength eta; also Hyper-SD",
    ),
    Family(
        "consistency-model",
        "consistency",
        "diffusers",
        _consistency,
        (1, 2),
        note="unconditional, in pixels, sigma as time, clipped",
    ),
    Family(
        "consistency-model-class",
        "consistency",
        "diffusers",
        partial(_consistency, classes=10),
        (1, 2),
        inputs={"class_labels": Input("class", (1,), 10)},
        note="class-conditional, in pixels, sigma as time, clipped",
    ),
    Family(
        "sdxl-turbo",
        "one-call and adversarial",
        "diffusers",
        partial(sdxl, scheduler=euler()),
        (1, 2, 4),
        {"guidance_scale": 0.0},
        PROMPT,
        note="two text encoders, second tokenizer pads with another token",
    ),
    Family(
        "sdxl-lightning-1",
        "one-call and adversarial",
        "diffusers",
        partial(sdxl, scheduler=euler(prediction_type="sample")),
        (1,),
        {"guidance_scale": 0.0},
        PROMPT,
        note="the one-step checkpoint predicts the sample",
    ),
    Family(
        "sdxl-lightning-4",
        "one-call and adversarial",
        "diffusers",
        partial(sdxl, scheduler=euler()),
        (4,),
        {"guidance_scale": 0.0},
        PROMPT,
        note="the four-step checkpoint predicts the noise",
    ),
    Family(
        "nitrofusion",
        "one-call and adversarial",
        "diffusers",
        partial(sdxl, scheduler=lcm(original_inference_steps=4)),
        (1, 2, 4),
        {"guidance_scale": 0.0, "timesteps": _shifted},
        PROMPT,
        note="pure noise at the times of a quarter of it: the times of the schedule are handed in",
    ),
    Family(
        "instaflow",
        "flow",
        "diffusers",
        partial(
            _sd,
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1, steps_offset=1
            ),
        ),
        (1, 2, 4),
        {"guidance_scale": 0.0},
        PROMPT,
        note="velocity from a UNet; first-order DPM-Solver++ on flow sigmas is one Euler step, from sigma 0.999",
    ),
)

"""Pictures in: editing, filling, controlling, enlarging and reading them with diffusers pipelines."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    LDMSuperResolutionPipeline,
    MarigoldDepthPipeline,
    SchedulerMixin,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    T2IAdapter,
    UNet2DModel,
    VQModel,
)

from tests.support.zoo.family import Family, Input
from tests.support.zoo.parts import WIDTH, alive, clip, clip_tokenizer, vae
from tests.support.zoo.unets import BETAS, PROMPT, euler, lcm, sd_parts, sd_unet, sdxl

IMAGE = Input("image", (1, 3, 16, 16))


def _img2img(folder: Path, *, scheduler: SchedulerMixin) -> Path:
    StableDiffusionImg2ImgPipeline(**sd_parts(folder), unet=sd_unet(), scheduler=scheduler).save_pretrained(folder)
    return folder


def _inpaint(folder: Path) -> Path:
    unet = sd_unet(in_channels=9)
    StableDiffusionInpaintPipeline(**sd_parts(folder), unet=unet, scheduler=lcm()).save_pretrained(folder)
    return folder


def _controlnet(folder: Path) -> Path:
    unet = sd_unet(time_cond_proj_dim=WIDTH)
    controlnet = ControlNetModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
    )
    StableDiffusionControlNetPipeline(
        **sd_parts(folder), unet=unet, controlnet=alive(controlnet, seed=20, gain=1.5), scheduler=lcm()
    ).save_pretrained(folder)
    return folder


def _t2i_adapter(folder: Path) -> Path:
    adapter = T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    StableDiffusionAdapterPipeline(
        **sd_parts(folder), unet=sd_unet(), adapter=alive(adapter, seed=21), scheduler=lcm()
    ).save_pretrained(folder)
    return folder


def _instruct(folder: Path) -> Path:
    unet = sd_unet(in_channels=8)
    StableDiffusionInstructPix2PixPipeline(**sd_parts(folder), unet=unet, scheduler=euler()).save_pretrained(folder)
    return folder


def _upscale(folder: Path) -> Path:
    StableDiffusionUpscalePipeline(
        vae=vae(scaling_factor=0.08333),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        unet=sd_unet(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=DDIMScheduler(
            **BETAS, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
        ),
        max_noise_level=350,
    ).save_pretrained(folder)
    return folder


def _latent_upscale(folder: Path) -> Path:
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        num_vq_embeddings=32,
        sample_size=32,
    )
    unet = UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    LDMSuperResolutionPipeline(
        vqvae=alive(vqvae, seed=22),
        unet=alive(unet, seed=23),
        scheduler=DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False),
    ).save_pretrained(folder)
    return folder


def _marigold(folder: Path, *, scheduler: SchedulerMixin) -> Path:
    MarigoldDepthPipeline(
        unet=sd_unet(in_channels=8),
        vae=vae(),
        scheduler=scheduler,
        text_encoder=clip(),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        prediction_type="depth",
        default_denoising_steps=1,
        default_processing_resolution=0,
    ).save_pretrained(folder)
    return folder


FAMILIES = (
    Family(
        "img2img-lcm",
        "image in",
        "diffusers",
        partial(_img2img, scheduler=lcm()),
        (2, 4),
        {"guidance_scale": 0.0, "strength": 0.5},
        {**PROMPT, "image": IMAGE},
        note="half of the steps, from a noised picture; the latents of the picture are drawn",
    ),
    Family(
        "img2img-turbo",
        "image in",
        "diffusers",
        partial(_img2img, scheduler=euler()),
        (2, 4),
        {"guidance_scale": 0.0, "strength": 0.5},
        {**PROMPT, "image": IMAGE},
        note="half of the steps, from a noised picture; the latents of the picture are drawn",
    ),
    Family(
        "img2img-sdxl-turbo",
        "image in",
        "diffusers",
        partial(sdxl, scheduler=euler(), pipeline_class=StableDiffusionXLImg2ImgPipeline),
        (2, 4),
        {"guidance_scale": 0.0, "strength": 0.5},
        {**PROMPT, "image": IMAGE},
        note="half of the steps, from a noised picture; two text encoders",
    ),
    Family(
        "inpaint",
        "image in",
        "diffusers",
        _inpaint,
        (1, 2, 4),
        {"guidance_scale": 0.0, "strength": 1.0, "height": 16, "width": 16},
        {**PROMPT, "image": IMAGE, "mask_image": Input("mask", (1, 1, 16, 16))},
        note="latents, mask and masked picture side by side: nine channels in",
    ),
    Family(
        "controlnet",
        "image in",
        "diffusers",
        _controlnet,
        (1, 2, 4),
        {"guidance_scale": 8.0, "controlnet_conditioning_scale": 0.8},
        {**PROMPT, "image": IMAGE},
        note="a second network in every step, whose outputs are inputs of the first",
    ),
    Family(
        "t2i-adapter",
        "image in",
        "diffusers",
        _t2i_adapter,
        (1, 2, 4),
        {"guidance_scale": 0.0, "adapter_conditioning_scale": 0.8, "height": 16, "width": 16},
        {**PROMPT, "image": IMAGE},
        note="a second network once, whose outputs are inputs of the first in every step",
    ),
    Family(
        "instruct-pix2pix",
        "image in",
        "diffusers",
        _instruct,
        (1, 2),
        {"guidance_scale": 0.0, "image_guidance_scale": 1.0},
        {**PROMPT, "image": IMAGE},
        note="latents of the picture beside the noise",
    ),
    Family(
        "upscale",
        "image in",
        "diffusers",
        _upscale,
        (1, 2),
        {"guidance_scale": 0.0, "noise_level": 20},
        {**PROMPT, "image": Input("image", (1, 3, 8, 8))},
        note="small picture with noise of its own beside the latents, noise level as a class label",
    ),
    Family(
        "latent-upscale",
        "image in",
        "diffusers",
        _latent_upscale,
        (1, 2),
        {},
        {"image": Input("image", (1, 3, 32, 32))},  # the pipeline cuts images to multiples of 32
        note="small picture beside the latents, no text; the decoder quantizes to a codebook",
    ),
    Family(
        "marigold",
        "image in",
        "diffusers",
        partial(_marigold, scheduler=DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False)),
        (1, 2),
        {},
        {"image": IMAGE},
        output="depth",
        note="latents of the picture beside the noise, mean of the decoder's channels, stretched to [0, 1]",
    ),
    Family(
        "marigold-lcm",
        "image in",
        "diffusers",
        partial(_marigold, scheduler=lcm(prediction_type="v_prediction")),
        (1, 2),
        {},
        {"image": IMAGE},
        output="depth",
    ),
)

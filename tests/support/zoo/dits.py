"""Text to picture, and class to picture, with a transformer: diffusers pipelines."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffusers import (
    AutoencoderDC,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SchedulerMixin,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

from tests.support.zoo.family import Family, Input
from tests.support.zoo.parts import LENGTH, WIDTH, alive, clip, clip_tokenizer, t5, t5_tokenizer, vae
from tests.support.zoo.unets import PROMPT, lcm

SIZE = {"height": 16, "width": 16}


def _sd3(folder: Path) -> Path:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=alive(transformer, seed=10),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        text_encoder_2=clip(projection=True, seed=6),
        tokenizer_2=clip_tokenizer(folder / "tokenizer_2", pad="!"),
        text_encoder_3=t5(2 * WIDTH),
        tokenizer_3=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def _flux(folder: Path, *, guidance_embedding: bool = False) -> Path:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embedding,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = FluxPipeline(
        transformer=alive(transformer, seed=11),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_embedding else 1.0, use_dynamic_shifting=guidance_embedding
        ),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def _pixart(
    folder: Path,
    *,
    scheduler: SchedulerMixin,
    pipeline_class: type[PixArtAlphaPipeline] | type[PixArtSigmaPipeline] = PixArtAlphaPipeline,
) -> Path:
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        cross_attention_dim=32,
        caption_channels=WIDTH,
    )
    pipeline_class(
        transformer=alive(transformer, seed=12),
        scheduler=scheduler,
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def _gemma() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=352,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        max_position_embeddings=512,
    )
    return alive(Gemma2Model(config), seed=13)


def _gemma_tokenizer() -> GemmaTokenizerFast:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    tokens += [chr(c) for c in range(ord("a"), ord("z") + 1)]
    return GemmaTokenizerFast(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=LENGTH)


def _sana_sprint(folder: Path) -> Path:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )
    decoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41407,
    )
    SanaSprintPipeline(
        transformer=alive(transformer, seed=14),
        scheduler=SCMScheduler(),
        vae=alive(decoder, seed=15),
        text_encoder=_gemma(),
        tokenizer=_gemma_tokenizer(),
    ).save_pretrained(folder)
    return folder


def _dit(folder: Path) -> Path:
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_embeds_ada_norm=10,
    )
    DiTPipeline(
        transformer=alive(transformer, seed=16),
        vae=vae(),
        scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    ).save_pretrained(folder)
    return folder


_PIXART = {
    "guidance_scale": 1.0,
    "max_sequence_length": LENGTH,
    "use_resolution_binning": False,
    "clean_caption": False,
}

FAMILIES = (
    Family(
        "sd3",
        "transformers",
        "diffusers",
        _sd3,
        (1, 2, 4),
        {"guidance_scale": 0.0, "max_sequence_length": LENGTH},
        PROMPT,
        note="CLIP, CLIP and T5; joint attention; shifted flow times",
    ),
    Family(
        "sd3-without-t5",
        "transformers",
        "diffusers",
        _sd3,
        (1, 2, 4),
        {"guidance_scale": 0.0, "max_sequence_length": LENGTH},
        PROMPT,
        note="zeros where T5 would be; from_pretrained is told to leave it out",
        load_kwargs={"text_encoder_3": None, "tokenizer_3": None},
    ),
    Family(
        "flux-schnell",
        "transformers",
        "diffusers",
        _flux,
        (1, 2, 4),
        {"guidance_scale": 0.0, "max_sequence_length": LENGTH, **SIZE},
        PROMPT,
        note="packed latents, position ids of pictures and texts, pooled CLIP and T5",
    ),
    Family(
        "flux-dev",
        "transformers",
        "diffusers",
        partial(_flux, guidance_embedding=True),
        (2, 4),
        {"guidance_scale": 3.5, "max_sequence_length": LENGTH, **SIZE},
        PROMPT,
        note="Hyper-FLUX: guidance scale as a network input, shift that depends on the size",
    ),
    Family(
        "pixart-lcm",
        "transformers",
        "diffusers",
        partial(_pixart, scheduler=lcm()),
        (1, 2, 4),
        _PIXART,
        PROMPT,
        note="PixArt-alpha: masked text, four of eight output channels are a variance that nobody uses",
    ),
    Family(
        "pixart-dmd",
        "transformers",
        "diffusers",
        partial(_pixart, scheduler=DDPMScheduler()),
        (1,),
        {**_PIXART, "timesteps": [400]},
        PROMPT,
        note="distribution matching: one call at time 400",
    ),
    Family(
        "pixart-sigma",
        "transformers",
        "diffusers",
        partial(_pixart, scheduler=lcm(), pipeline_class=PixArtSigmaPipeline),
        (1, 2, 4),
        _PIXART,
        PROMPT,
    ),
    Family(
        "sana-sprint",
        "transformers",
        "diffusers",
        _sana_sprint,
        (1, 2, 4),
        {
            "guidance_scale": 4.5,
            "intermediate_timesteps": lambda steps: 1.3 if steps == 2 else None,
            "max_sequence_length": LENGTH,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
            "clean_caption": False,
            "height": 32,
            "width": 32,
        },
        PROMPT,
        note="trigonometric flow, linear attention, guidance scale as an input, Gemma 2, deep-compression decoder",
    ),
    Family(
        "dit",
        "transformers",
        "diffusers",
        _dit,
        (2, 4),
        {"guidance_scale": 1.0},
        {"class_labels": Input("class", (1,), 10)},
        note="class label in adaLN-zero, DDIM steps",
    ),
)

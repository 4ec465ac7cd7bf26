"""Makes training states of the committed weights, so that a longer run can start from them and not from nothing.

The teacher's denoiser is the student's without its guidance input: a teacher to go on with, not the teacher that it
came from. The student's state is the student as it is.
"""

from __future__ import annotations

import json
import shutil
import sys

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel

from fewstep.errors import SourceError
from fewstep.stickers import WEIGHTS
from fewstep.stickers.teacher import make_text_encoder, make_unet
from fewstep.stickers.training import WORK, MuonAdamW, save_state
from fewstep.stickers.variant import variant


def restore() -> None:
    """Writes ``autoencoder.pt``, ``text.pt``, ``teacher.pt`` and ``student.pt`` (at step 0) to the work folder.

    Raises:
        SourceError: there are states already, which are worth more; or the variant has other latents.
    """
    if WORK.exists() and any(WORK.glob("*.pt")):
        raise SourceError(f"{WORK} holds training states", hint="continue them, or set STICKERS_WORK to another folder")
    autoencoder = AutoencoderTiny.from_pretrained(WEIGHTS / "vae")
    channels = autoencoder.config["latent_channels"]
    if (scale := 2 ** (len(autoencoder.config["encoder_block_out_channels"]) - 1), channels) != (
        variant().factor,
        variant().latent_channels,
    ):
        raise SourceError(
            f"the committed autoencoder has factor {scale} and {channels} channels, not those of this variant",
            hint="restore a variant of the committed weights' latents, or start from nothing",
        )
    factor = float(autoencoder.config["scaling_factor"])
    shutil.copytree(WEIGHTS / "tokenizer", WORK / "tokenizer", dirs_exist_ok=True)
    save_state(WORK / "autoencoder.pt", {"model": autoencoder.state_dict()})

    text_encoder, unet = make_text_encoder(), make_unet().to(memory_format=torch.channels_last)
    text_encoder.load_state_dict(CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder").float().state_dict())
    student = UNet2DConditionModel.from_pretrained(WEIGHTS / "unet").float().state_dict()
    unet.load_state_dict({name: tensor for name, tensor in student.items() if "cond_proj" not in name})
    save_state(WORK / "text.pt", {"text_encoder": text_encoder.state_dict()})

    both = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).state_dict()
    states = {"model": both, "ema": both, "optimizer": MuonAdamW([(unet, 1.0), (text_encoder, 1.0)], 0.0).state_dict()}
    save_state(WORK / "teacher.pt", {**states, "step": 0, "latent_factor": factor})
    save_state(WORK / "student.pt", {"model": student, "ema": student, "step": 0, "teacher_step": 0})
    (WORK / "teacher.json").write_text(json.dumps({"step": 0}))
    print(f"wrote the states to {WORK}; go on with python -m fewstep.stickers.teacher, or .refine", file=sys.stderr)


if __name__ == "__main__":
    restore()

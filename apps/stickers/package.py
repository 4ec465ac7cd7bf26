"""Assembles the diffusers folder of the built-in generator from the states of the training runs."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, LatentConsistencyModelPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep.errors import SourceError
from fewstep.stickers.autoencoder import make_autoencoder
from fewstep.stickers.distill import Teacher, load_teacher, make_student, make_student_scheduler
from fewstep.stickers.teacher import make_text_encoder
from fewstep.stickers.training import WORK, load_state
from fewstep.stickers.vocabulary import MAX_TOKENS

FOLDER = Path(__file__).resolve().parent / "weights"
SIZE_LIMIT_BYTES = 40_000_000


def load_final_autoencoder(latent_factor: float) -> AutoencoderTiny:
    """Returns the autoencoder with its last decoder and, as ``scaling_factor``, the factor of the teacher's latents."""
    state = load_state(WORK / "decoder.pt") or load_state(WORK / "autoencoder.pt")
    if state is None:
        raise SourceError(f"{WORK / 'autoencoder.pt'} is missing", hint="train the autoencoder: make stickers-train")
    model = make_autoencoder()
    model.load_state_dict(state["model"])
    model.register_to_config(scaling_factor=latent_factor)
    model.scaling_factor = latent_factor
    return model.eval().requires_grad_(False)


def load_student(teacher: Teacher) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Returns the averaged weights of text encoder and student: of `refine` where it ran, else of `distill`."""
    student = make_student(teacher.unet)
    if (refined := load_state(WORK / "refined.pt")) is not None:
        both = torch.nn.ModuleDict({"text_encoder": make_text_encoder(), "unet": student})
        both.load_state_dict(refined["ema"])
        both.eval().requires_grad_(False)
        return both["text_encoder"], both["unet"]
    state = load_state(WORK / "student.pt")
    if state is None:
        raise SourceError(f"{WORK / 'student.pt'} is missing", hint="run python -m fewstep.stickers.distill first")
    student.load_state_dict(state["ema"])
    return teacher.text_encoder, student.eval().requires_grad_(False)


def assemble() -> LatentConsistencyModelPipeline:
    """Returns the pipeline of the trained parts, in float32."""
    teacher = load_teacher()
    text_encoder, student = load_student(teacher)
    return LatentConsistencyModelPipeline(
        vae=load_final_autoencoder(teacher.latent_factor),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(WORK / "tokenizer", model_max_length=MAX_TOKENS),
        unet=student,
        scheduler=make_student_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def _settle(folder: Path) -> None:
    """Makes the folder load as it is, without options or warnings, whatever reads it."""
    # diffusers loads a float16 file into a float32 network by default, transformers does not unless the config says so.
    _edit(folder / "text_encoder/config.json", dtype="float32")
    # diffusers writes this key and then warns about it; it derives it from decoder_block_out_channels.
    _edit(folder / "vae/config.json", block_out_channels=None)
    # Readers without transformers (CLIP's layout); transformers 5 itself writes and reads tokenizer.json.
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(WORK / "tokenizer" / name, folder / "tokenizer" / name)


def _edit(path: Path, **entries: str | None) -> None:
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in entries or value}, indent=2))


def package(folder: Path) -> int:
    """Writes the folder in float16 and returns its size in bytes; an older one is replaced at the end.

    Raises:
        SourceError: a training state is missing, or the folder is larger than what the repository may carry.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".weights-") as temporary:
        made = Path(temporary) / "weights"
        assemble().to(dtype=torch.float16).save_pretrained(made)
        _settle(made)
        size_bytes = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        if size_bytes > SIZE_LIMIT_BYTES:
            raise SourceError(f"the folder has {size_bytes} bytes, expected at most {SIZE_LIMIT_BYTES}")
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return size_bytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    print(json.dumps({"folder": str(options.out), "size_bytes": package(options.out)}))

"""Whole diffusers folders at real size, with random weights: what `fewstep build` is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.scale.checkpoint import write_checkpoint
from benchmarks.scale.networks import CASES

_LENGTH = 77
_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Pipeline, scheduler, and the name that it gives to each component of a case.
_PIPELINES: dict[str, tuple[str, str, dict[str, str]]] = {
    "sd15": (
        "StableDiffusionPipeline",
        "LCMScheduler",
        {"text_encoder": "text_encoder", "unet": "denoiser", "vae": "decoder"},
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        "LCMScheduler",
        {
            "text_encoder": "text_encoder",
            "text_encoder_2": "text_encoder_2",
            "unet": "denoiser",
            "vae": "decoder",
        },
    ),
}


def write_folder(case: str, folder: Path) -> Path:
    """Returns the diffusers folder of a case, written unless it is there."""
    pipeline, scheduler, names = _PIPELINES[case]
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.36.0"}
    for name, component in names.items():
        network = CASES[case][component]
        write_checkpoint(network, folder / name)
        index[name] = [network.library, network.cls]
        if name.startswith("text_encoder"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            _write_tokenizer(folder / tokenizer)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir(exist_ok=True)
    config = {"_class_name": scheduler, **_SCHEDULER}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index["scheduler"] = ["diffusers", scheduler]
    if pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Writes a byte-level CLIP tokenizer without merges, with the special tokens where CLIP has them."""
    from transformers import CLIPTokenizer

    folder.mkdir(exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = {token: i for i, token in enumerate([*alphabet, *(c + "</w>" for c in alphabet)])}
    tokens |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=_LENGTH).save_pretrained(folder)

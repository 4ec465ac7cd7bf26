"""What goes into a bundle beside the networks: tokenizers, and the files of the layout that diffusers users load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.contract import TEXT
from fewstep.export.generator import Generator
from fewstep.export.recorded import Run, Text
from fewstep.export.sampling import refuse
from fewstep.manifest import TokenizerSpec


def read_tokenizers(generator: Generator, recorded: Run, prompt: str) -> dict[str, TokenizerSpec]:
    """Returns the tokenizers whose ids go into a network, with what the pipeline does to the text first."""
    found = {}
    for name, tokenizer in generator.tokenizers.items():
        text = next((t for t in recorded.texts if t.tokenizer == name), None)
        if text is None:
            continue
        prefix, suffix, clean = _around(text, prompt)
        spec = next((i.name for i in generator.inputs if i.kind == TEXT), "prompt")
        found[name] = TokenizerSpec(
            folder=name,
            length=text.ids.shape[1],
            pad_id=int(tokenizer.pad_token_id),
            padding_side=str(getattr(tokenizer, "padding_side", "right")),
            prefix=prefix,
            suffix=suffix,
            clean=clean,
            input=spec,
        )
    return found


def _around(text: Text, prompt: str) -> tuple[str, str, bool]:
    for clean, version in ((False, prompt), (True, prompt.lower().strip())):
        prefix, found, suffix = text.text.partition(version)
        if found:
            return prefix, suffix, clean
    raise refuse(f"the pipeline changes the prompt {prompt!r} to {text.text!r} before its tokenizer")


def write_tokenizers(generator: Generator, tokenizers: Mapping[str, TokenizerSpec], folder: Path) -> None:
    """Writes each tokenizer as transformers stores it, with ``vocab.json`` and ``merges.txt`` for BPE."""
    for name, spec in tokenizers.items():
        tokenizer = generator.tokenizers[name]
        target = folder / spec.folder
        tokenizer.save_pretrained(target)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:  # a slow tokenizer of transformers 4
            from transformers import AutoTokenizer

            backend = AutoTokenizer.from_pretrained(target, use_fast=True).backend_tokenizer
        backend.save(str(target / "tokenizer.json"))
        backend.model.save(str(target))


def diffusers_files(generator: Generator) -> dict[str, str]:
    """Returns the configuration files of the folder layout that ONNX Runtime users of diffusers models load."""
    if generator.is_loop:
        return {}
    pipeline = generator.pipeline
    index = {k: v for k, v in dict(pipeline.config).items() if not k.startswith("_") or k.startswith("_class")}
    index |= {"_class_name": type(pipeline).__name__, "_diffusers_version": index.get("_diffusers_version", "0.0.0")}
    attributes = {part.attribute for part in generator.parts.values()}
    entries: dict[str, Any] = {}
    for name, value in index.items():
        if name == "vae":
            entries["vae_decoder"] = ["diffusers", "OnnxRuntimeModel"]
        elif isinstance(value, (list, tuple)) and name in attributes:
            entries[name] = ["diffusers", "OnnxRuntimeModel"]
        else:
            entries[name] = list(value) if isinstance(value, tuple) else value
    files = {"model_index.json": json.dumps(entries, indent=2, default=str)}
    for component, part in generator.parts.items():
        config: Any = generator.module(component).config
        text = (
            config.to_json_string()
            if hasattr(config, "to_json_string")
            else json.dumps(dict(config), indent=2, default=str)
        )
        files[f"{part.folder}/config.json"] = text
    files["scheduler/scheduler_config.json"] = pipeline.scheduler.to_json_string()
    return files

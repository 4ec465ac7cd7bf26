"""What goes into a bundle beside the networks: tokenizers, and the files of the layout that diffusers users load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.bundle.manifest import TokenizerSpec
from fewstep.disk import scratch
from fewstep.export.generator import Generator


def write_tokenizers(generator: Generator, tokenizers: Mapping[str, TokenizerSpec], folder: Path) -> None:
    """Writes each tokenizer as transformers stores it, with ``vocab.json`` and ``merges.txt`` for BPE."""
    for name, spec in tokenizers.items():
        tokenizer = generator.tokenizers[name]
        target = folder / spec.folder
        tokenizer.save_pretrained(target)
        backend = _backend(tokenizer)
        backend.save(str(target / "tokenizer.json"))
        backend.model.save(str(target))


def tokenizer_json(tokenizer: Any) -> str:
    """Returns the text of ``tokenizer.json``, as `write_tokenizers` writes it."""
    return str(_backend(tokenizer).to_str())


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer of transformers 4
        from transformers import AutoTokenizer

        with scratch() as folder:
            tokenizer.save_pretrained(folder)
            backend = AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer
    return backend


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

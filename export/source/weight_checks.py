"""Checks of weight files before a library reads them."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import SourceError
from fewstep.export.source.safetensors_index import read_header

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def check_weights_file(path: Path, what: str) -> None:
    """Raises SourceError unless ``path`` is a whole safetensors file; ``what`` says what it was given as."""
    if not path.is_file():
        raise SourceError(f"{what} {path} is not a file, expected a safetensors file", hint="check the path")
    if path.suffix in PICKLES:
        raise SourceError(
            f"{what} {path} is a pickle, expected safetensors: unpickling can run code",
            hint="convert it on a machine you can spare",
        )
    read_header(path)


def check_weights_folder(folder: Path) -> None:
    """Raises SourceError if a component's folder has no weights, or only pickles or damaged ones."""
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles and not weights:
        raise SourceError(
            f"{folder} has weights only as a pickle ({pickles[0].name}), expected safetensors: unpickling can run code",
            hint="convert it on a machine you can spare: load it in diffusers, then save_pretrained",
        )
    if not weights and (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no weights, expected a safetensors file", hint="download the component again")
    for path in weights:
        read_header(path)


def check_tokenizer_folder(folder: Path) -> None:
    """Raises SourceError if a tokenizer is there as a SentencePiece model alone, and nothing here reads those.

    transformers would go on and ask for tiktoken, which does not read them.
    """
    models = sorted(p.name for p in folder.glob("*.model") if p.name != "tiktoken.model")
    if models and not (folder / "tokenizer.json").is_file() and importlib.util.find_spec("sentencepiece") is None:
        raise SourceError(
            f"{folder} has {models[0]} and no tokenizer.json: reading it takes the package sentencepiece, which is "
            "not installed",
            hint="pip install 'fewstep[sentencepiece]'",
        )


def check_complete(folder: Path, index: Mapping[str, Any]) -> None:
    """Raises SourceError unless ``model_index.json`` names all that its pipeline cannot do without."""
    import diffusers

    class_name = str(index.get("_class_name"))
    pipeline = getattr(diffusers, class_name, None)
    if pipeline is None:
        return  # diffusers says so itself
    parameters = [p for p in inspect.signature(pipeline.__init__).parameters.values() if p.name != "self"]
    wanted = [p.name for p in parameters if p.default is p.empty and p.name not in pipeline._optional_components]
    missing = [name for name in wanted if not index.get(name) or index[name] == [None, None]]
    if missing:
        raise SourceError(
            f"{folder}: {class_name} has no {missing[0]}, expected all of: {', '.join(wanted)}",
            hint=f"{missing[0]} must be in model_index.json, with its folder",
        )

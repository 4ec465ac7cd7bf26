"""Loads a generator from a diffusers folder, a hub id, ``module:function`` or the name of the built-in one.

Nothing is unpickled: weights are safetensors or they are refused.
"""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.errors import SourceError
from fewstep.export.generator import Generator
from fewstep.export.stored import read_header
from fewstep.hashing import folder_sha256
from fewstep.manifest import SourceInfo

BUILT_IN = {"stickers": "fewstep.stickers:generator"}

_HUB_ID = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?$")
_FUNCTION = re.compile(r"^(?P<module>[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)$")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_SOURCE_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
# Filters of pictures that a bundle neither contains nor needs.
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


def load(source: str, *, guidance: float | None = None) -> Generator:
    """Returns the generator that ``source`` names, with ``guidance`` as its scale if one is given.

    Raises:
        SourceError: nothing there, a component missing or damaged, an unknown class, or weights only as pickles.
    """
    generator = _load(source)
    return generator if guidance is None else replace(generator, guidance=guidance)


def _load(source: str) -> Generator:
    if source in BUILT_IN:
        return _from_function(BUILT_IN[source])
    folder = Path(source)
    if folder.is_dir():
        return from_folder(folder, uri=source)
    if _FUNCTION.match(source):
        return _from_function(source)
    if _HUB_ID.match(source) and not folder.exists():
        return from_folder(_download(source), uri=source)
    raise SourceError(
        f"source {source!r} is not a folder, a hub id (owner/name), module:function or a built-in generator",
        hint=f"built-in generators: {', '.join(BUILT_IN)}",
    )


def from_folder(folder: Path, *, uri: str | None = None) -> Generator:
    """Returns the generator of a diffusers folder, in fp32."""
    check_folder(folder)
    import torch
    from diffusers import DiffusionPipeline

    _quiet()
    overrides: dict[str, Any] = {name: None for name in _LEFT_OUT if name in _model_index(folder)}
    if "safety_checker" in overrides:
        overrides["requires_safety_checker"] = False
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, **overrides
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        # diffusers raises any of these for a folder that is not what its model_index.json says.
        raise SourceError(
            f"{folder}: diffusers cannot load it: {error}", hint="does it load in diffusers alone?"
        ) from error
    pipeline.to(torch.float32)  # by itself, transformers keeps the precision of the file
    pipeline.set_progress_bar_config(disable=True)
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix in _SOURCE_SUFFIXES]
    source = SourceInfo(uri or str(folder), "diffusers", folder_sha256(folder, files))
    return Generator.from_pipeline(pipeline, source, name=folder.resolve().name)


def _quiet() -> None:
    """Leaves errors to be heard of diffusers and transformers; their advice is for their own users."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def check_folder(folder: Path) -> None:
    """Raises SourceError with the first thing that is wrong with a diffusers folder, before anything is loaded."""
    import diffusers

    for name, entry in _model_index(folder).items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        if name in _LEFT_OUT:
            continue
        library, class_name = entry
        if library == "diffusers" and not hasattr(diffusers, class_name):
            raise SourceError(
                f"{folder}/model_index.json: unknown class {class_name!r} for {name}, "
                f"expected one of diffusers {diffusers.__version__}",
                hint="correct the name, or install the diffusers version that has it",
            )
        if not (folder / name).is_dir():
            raise SourceError(
                f"{folder}: component {name} ({class_name}) is missing, expected folder {name}/",
                hint="copy the whole checkpoint; model_index.json lists its parts",
            )
        _check_weights(folder / name)


def _check_weights(folder: Path) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles and not weights:
        raise SourceError(
            f"{folder} has weights only as a pickle ({pickles[0].name}), expected safetensors: unpickling can run code",
            hint="convert it on a machine you can spare: load it in diffusers, then save_pretrained",
        )
    if not weights and (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no weights, expected a safetensors file", hint="download the component again")
    for path in weights:
        read_header(path)


def _model_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(
            f"{folder} has no model_index.json, expected a diffusers folder",
            hint="save the pipeline with save_pretrained, or give module:function",
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not JSON: {error}", hint="download it again") from error
    return index


def _from_function(reference: str) -> Generator:
    match = _FUNCTION.match(reference)
    assert match is not None
    try:
        function = getattr(importlib.import_module(match["module"]), match["function"])
    except (ImportError, AttributeError) as error:
        raise SourceError(f"cannot import {reference}: {error}", hint="is its folder on PYTHONPATH?") from error
    generator = function()
    if not isinstance(generator, Generator):
        raise SourceError(
            f"{reference} returned {type(generator).__name__}, expected a fewstep.export.Generator",
            hint="make one with fewstep.export.Generator.from_pipeline",
        )
    return generator


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    match = _HUB_ID.match(hub_id)
    assert match is not None
    patterns = [f"*{suffix}" for suffix in _SOURCE_SUFFIXES]
    try:
        return Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise SourceError(
            f"cannot download {hub_id} from the hub: {type(error).__name__}",
            hint="check the name and the network, or give a local folder; pin a revision as owner/name@revision",
        ) from error

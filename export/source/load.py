"""Loads a generator from a folder, a single file, the hub, ``module:function`` or the name of the built-in one.

Nothing is unpickled: weights are safetensors or they are refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.bundle.source import FUNCTION, SourceInfo, SourceSpec
from fewstep.errors import SourceError
from fewstep.export.contract.guidance_embedding import decided
from fewstep.export.generator import Generator
from fewstep.export.source.config_checks import check_config, check_files
from fewstep.export.source.hub import download, is_hub_id
from fewstep.export.source.model_index import read_model_index
from fewstep.export.source.networks import (
    FILTERS,
    IMAGE_ENCODER,
    SAFETY_CHECKER,
    load_networks,
    network_classes,
    networks_without_values,
)
from fewstep.export.source.offloaded_networks import StoredNetworks
from fewstep.export.source.overrides import lay_over
from fewstep.export.source.safetensors_index import variant_of_all
from fewstep.export.source.single_file import load_single_file
from fewstep.export.source.weight_checks import (
    PICKLES,
    check_complete,
    check_tokenizer_folder,
    check_weights_file,
    check_weights_folder,
)
from fewstep.hashing import file_sha256, folder_sha256, value_sha256

BUILT_IN = {"stickers": "fewstep.stickers:generator"}
_BUILT_IN = "built-in"
# Kinds of sources that a bundle may name and have loaded: they are data, or ours.
_RECORDED = ("diffusers", "single-file", "hub", _BUILT_IN)

STORED_BYTES = 1 << 30
_FUNCTION = re.compile(r"^(?P<module>[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)$")
SUFFIXES = (".json", ".safetensors", ".txt", ".model")


def load(source: str | SourceSpec | Generator, *, guidance: float | None = None, eager: bool = False) -> Generator:
    """Returns the generator that ``source`` names or is, with ``guidance`` as its scale if one is given.

    Weights of folders of `STORED_BYTES` and more stay in their files until a network runs, unless adapters must be
    merged into them or ``eager`` asks for them.

    Raises:
        SourceError: nothing there, a component missing or damaged, an unknown class, weights only as pickles, or an
            adapter that does not fit.
    """
    if isinstance(source, Generator):
        generator = source
    else:
        spec = SourceSpec.of(source)
        if spec.keep_safety_checker:
            raise SourceError(
                "a safety checker cannot be compiled yet: it looks at the image in 8 bits, as its feature extractor "
                "resizes it, and may replace the result, which the components of a bundle do not express",
                hint="leave --keep-safety-checker out; the bundle says that the checker is left out",
            )
        whole = eager or bool(spec.loras or spec.decoder or spec.replacements)
        generator = lay_over(_load(spec, eager=whole), spec)
    return decided(generator) if guidance is None else replace(generator, guidance=guidance)


def missing(source: SourceInfo) -> str | None:
    """Returns what of a source is not on this machine, or None if all is there."""
    spec = source.spec()
    nameless = source.kind == "hub" and not is_hub_id(spec.uri)
    if source.kind not in _RECORDED or nameless or (source.kind == _BUILT_IN and source.uri not in BUILT_IN):
        return f"a source of kind {source.kind!r} called {source.uri!r}"
    parts = [("source", spec.uri)] if source.kind in ("diffusers", "single-file") else []
    parts += [("configuration", spec.config)] if spec.config else []
    parts += [("decoder", spec.decoder)] if spec.decoder else []
    parts += [(f"component {r.component},", r.path) for r in spec.replacements]
    parts += [("LoRA", lora.path) for lora in spec.loras]
    gone = next((f"the {what} {path}" for what, path in parts if not Path(path).exists()), None)
    if gone is None and source.kind == "hub":
        try:
            download(spec.uri, SUFFIXES, local_only=True)
        except SourceError:
            return f"the source {spec.uri}"
    return gone


def _load(spec: SourceSpec, *, eager: bool) -> Generator:
    uri, path = spec.uri, Path(spec.uri)
    if spec.kind is not None:
        return _load_recorded(spec, eager=eager)
    if path.suffix == ".safetensors" or (path.suffix in PICKLES and path.is_file()):
        return from_file(path, spec)
    if spec.config is not None:
        raise SourceError(
            f"--config describes a single-file checkpoint, and source {uri!r} is not a .safetensors file",
            hint="leave --config out, or give the checkpoint's file",
        )
    if uri in BUILT_IN and spec.variant is None:
        return _from_function(BUILT_IN[uri])
    if path.is_dir():
        return from_folder(path, spec, eager=eager)
    if spec.variant is not None and not (is_hub_id(uri) and not _FUNCTION.match(uri)):
        raise SourceError(
            f"--variant says which files of a folder to take, and source {uri!r} is none", hint="leave --variant out"
        )
    if _FUNCTION.match(uri):
        return _from_function(uri)
    if is_hub_id(uri) and not path.exists():
        return _from_hub(spec, eager=eager)
    raise SourceError(
        f"source {uri!r} is not a folder, a .safetensors file, a hub id (owner/name), module:function or a built-in "
        "generator",
        hint=f"built-in generators: {', '.join(BUILT_IN)}",
    )


def _load_recorded(spec: SourceSpec, *, eager: bool) -> Generator:
    """Returns the generator that a manifest names, by the kind that it states and not by what its name looks like.

    Nothing is imported but the built-in generator, and nothing is downloaded: a manifest may be a stranger's.
    """
    if spec.kind == _BUILT_IN and spec.uri in BUILT_IN:
        return _from_function(BUILT_IN[spec.uri])
    if spec.kind == "diffusers":
        return from_folder(Path(spec.uri), spec, eager=eager)
    if spec.kind == "single-file":
        return from_file(Path(spec.uri), spec)
    if spec.kind == "hub" and is_hub_id(spec.uri):
        return _from_hub(spec, eager=eager, local_only=True)
    raise SourceError(
        f"the bundle says that it was built from {spec.uri!r}, a source of kind {spec.kind!r}, which is not loaded "
        "for a bundle's sake",
        hint=f"if you trust it, name it yourself: --against {spec.uri}",
    )


def from_folder(folder: Path, spec: SourceSpec | None = None, *, eager: bool = False) -> Generator:
    """Returns the generator of a diffusers folder, in fp32; see `load` for ``eager``.

    ``spec`` says which variant of its files, and how the pipeline is called; None takes what is there.
    """
    import diffusers

    spec = spec or SourceSpec(str(folder))
    check_folder(folder)
    _quiet()
    index = read_model_index(folder)
    classes = network_classes(folder, index, FILTERS)
    variant = variant_of_all([folder / name for name in classes], spec.variant)
    size = sum(p.stat().st_size for p in _files(folder, (".safetensors",)))
    stored = StoredNetworks(folder, variant=variant) if not eager and size >= STORED_BYTES else None
    make = load_networks if stored is None else networks_without_values
    networks, unused = make(folder, classes, variant)
    # The class itself knows which of its components may be None.
    pipeline_class: Any = getattr(diffusers, str(index.get("_class_name")), diffusers.DiffusionPipeline)
    try:
        pipeline = pipeline_class.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, **networks, **_left_out(folder)
        )
    except Exception as error:  # diffusers and what it uses raise anything for a folder that is not what it says
        said = str(error).strip() or type(error).__name__
        raise SourceError(
            f"{folder}: diffusers cannot load it: {said}", hint="does it load in diffusers alone?"
        ) from error
    source = SourceInfo(
        spec.uri,
        "diffusers",
        _sha256_of(folder, spec),
        variant=spec.variant,
        left_out=tuple(name for name in (SAFETY_CHECKER, IMAGE_ENCODER) if _names_class(index.get(name))),
        unused=unused,
    )
    return _generator(pipeline, source, folder.resolve().name, spec, stored)


def _sha256_of(folder: Path, spec: SourceSpec) -> str:
    files = folder_sha256(folder, _files(folder, SUFFIXES))
    return files if spec.variant is None else value_sha256({"files": files, "variant": spec.variant})


def _names_class(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def from_file(path: Path, spec: SourceSpec) -> Generator:
    """Returns the generator of a single-file checkpoint, in fp32.

    Its ``config`` is a diffusers folder of the same base model: what a checkpoint does not hold. Its weights are not
    read.
    """
    config = spec.config
    check_weights_file(path, "checkpoint")
    if config is None:
        raise SourceError(
            f"{path} is a single-file checkpoint: it holds weights alone, expected --config FOLDER beside it",
            hint="FOLDER is a diffusers folder of the same base model; its model_index.json, tokenizer/, scheduler/ "
            "and the components' config.json are needed, its weights are not",
        )
    folder = Path(config)
    class_name = str(read_model_index(folder).get("_class_name"))
    _quiet()
    pipeline = load_single_file(path, class_name, folder, _left_out(folder))
    described = folder_sha256(folder, _files(folder, tuple(set(SUFFIXES) - {".safetensors"})))
    sha256 = value_sha256({"checkpoint": file_sha256(path), "config": described})
    left_out = tuple(n for n in (SAFETY_CHECKER, IMAGE_ENCODER) if _names_class(read_model_index(folder).get(n)))
    source = SourceInfo(str(path), "single-file", sha256, config=config, left_out=left_out)
    return _generator(pipeline, source, path.stem, spec)


def _from_hub(spec: SourceSpec, *, eager: bool, local_only: bool = False) -> Generator:
    snapshot = download(spec.uri, SUFFIXES, local_only=local_only)
    generator = from_folder(snapshot.folder, spec, eager=eager)
    source = replace(generator.source, kind="hub", revision=snapshot.revision)
    return replace(generator, source=source, name=snapshot.repository.partition("/")[2])


def _left_out(folder: Path) -> dict[str, Any]:
    """Returns the arguments that keep diffusers from loading what a bundle does not need."""
    arguments: dict[str, Any] = {name: None for name in FILTERS if name in read_model_index(folder)}
    return {**arguments, "requires_safety_checker": False} if "safety_checker" in arguments else arguments


def _files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p.suffix in suffixes]


def _generator(
    pipeline: Any, source: SourceInfo, name: str, spec: SourceSpec, stored: StoredNetworks | None = None
) -> Generator:
    import torch

    if stored is None:
        pipeline.to(torch.float32)  # by itself, transformers keeps the precision of the file
    pipeline.set_progress_bar_config(disable=True)
    return Generator.from_pipeline(pipeline, source, name=name, options=spec.options, inputs=spec.inputs, stored=stored)


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

    index = read_model_index(folder)
    check_files(folder)
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        if name in FILTERS:
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
        check_config(folder / name)
        check_weights_folder(folder / name)
        check_tokenizer_folder(folder / name)
    check_complete(folder, index)


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
    if reference in BUILT_IN.values():
        return generator
    return replace(generator, source=replace(generator.source, uri=reference, kind=FUNCTION))

"""Loads the networks of a diffusers folder with nothing made up: every tensor is from its files, or it is an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import SourceError
from fewstep.export.source.lazy_weights import component_class, meta_module, refuse_missing, stored_weights, unused_keys
from fewstep.export.source.model_index import read_model_index
from fewstep.export.source.safetensors_index import variant_of, variant_of_all

# What diffusers and transformers raise for files that are not what their configurations say: anything.
LOAD_ERRORS = Exception
# What is loaded from files by the names of pipelines' components and is no part of what is compiled by default.
SAFETY_CHECKER, IMAGE_ENCODER = "safety_checker", "image_encoder"
FILTERS = (SAFETY_CHECKER, "feature_extractor", IMAGE_ENCODER)


def network_classes(folder: Path, index: Mapping[str, Any], left_out: Iterable[str]) -> dict[str, Any]:
    """Returns the class of every network of a diffusers folder by component; None where only its config names one."""
    import diffusers
    import transformers

    found = {}
    for name, entry in index.items():
        if name in left_out or not isinstance(entry, (list, tuple)) or len(entry) != 2:
            continue
        if not (folder / name).is_dir() or not any((folder / name).glob("*.safetensors")):
            continue
        library, class_name = entry
        own = getattr(diffusers.pipelines, str(library), None)  # classes that one pipeline brings along
        libraries = {"diffusers": diffusers, "transformers": transformers}
        cls = getattr(libraries.get(library, own), str(class_name), None)
        found[name] = cls if isinstance(cls, type) and issubclass(cls, torch.nn.Module) else None
    return found


def variant_of_folder(folder: Path, asked: str | None) -> str | None:
    """Returns the variant that a user of diffusers names for a diffusers folder: see `variant_of_all`."""
    classes = network_classes(folder, read_model_index(folder), FILTERS)
    return variant_of_all([folder / name for name in classes], asked)


def load_network(folder: Path, cls: Any, variant: str | None) -> tuple[Any, tuple[str, ...]]:
    """Returns a network with the values of its files, and the names of tensors that it has no place for.

    Args:
        folder: the component's.
        cls: its class, of diffusers or transformers; None takes the one that its configuration names.
        variant: see `fewstep.export.source.safetensors_index.variant_of`.

    Raises:
        SourceError: its files lack a tensor, or one has another shape than the configuration says.
    """
    cls = cls or component_class(folder)
    chosen = variant_of(folder, variant)
    try:
        module, info = cls.from_pretrained(
            str(folder), variant=chosen, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except LOAD_ERRORS as error:
        raise SourceError(
            f"{folder}: {cls.__name__} cannot be loaded: {_first_lines(error)}", hint="does it load in diffusers alone?"
        ) from error
    missing = [name for name in info["missing_keys"] if not _is_tied(module, name, info["missing_keys"])]
    refuse_missing(folder, cls.__name__, missing)
    if info.get("mismatched_keys"):
        name, stored, wanted = (*tuple(next(iter(info["mismatched_keys"]))), None, None)[:3]
        raise SourceError(
            f"{folder}: {name} has shape {list(stored or ())}, {cls.__name__} expects {list(wanted or ())}",
            hint="config.json and the weights are of different networks",
        )
    return module, unused_keys(module, info["unexpected_keys"])


def load_networks(
    folder: Path, classes: Mapping[str, Any], variant: str | None
) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Returns every network of a folder with its values, and tensors of the files that have no place, by component."""
    networks: dict[str, Any] = {}
    unused: dict[str, tuple[str, ...]] = {}
    for name, cls in classes.items():
        networks[name], unused[name] = load_network(folder / name, cls, variant)
    return networks, {name: keys for name, keys in unused.items() if keys}


def networks_without_values(
    folder: Path, classes: Mapping[str, Any], variant: str | None
) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Returns the same modules without values, after a look at the headers of their files."""
    networks = {name: meta_module(folder / name, cls) for name, cls in classes.items()}
    unused = {n: stored_weights(module, folder / n, variant).unused for n, module in networks.items()}
    return networks, {name: keys for name, keys in unused.items() if keys}


def _is_tied(module: torch.nn.Module, name: str, missing: Iterable[str]) -> bool:
    """Returns whether a parameter that files lack is one that they have under another name."""
    names = dict(module.named_parameters(remove_duplicate=False))
    return any(other is names.get(name) and key not in missing for key, other in names.items())


def _first_lines(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split("\n")[:3])

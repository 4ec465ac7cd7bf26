"""Where the weights of a stored component are: a module without values, and its values read one at a time.

The module is made from its configuration with parameters on the meta device. Its names are those of the installed
diffusers or transformers; the keys of the files may be those of an older release.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights

from fewstep.errors import SourceError
from fewstep.export.source.safetensors_index import StoredTensor, read_folder

# Attention blocks of autoencoders, as diffusers named their layers before 0.14.
_OLD_ATTENTION = {
    r"\.query\.(weight|bias)$": r".to_q.\1",
    r"\.key\.(weight|bias)$": r".to_k.\1",
    r"\.value\.(weight|bias)$": r".to_v.\1",
    r"\.proj_attn\.(weight|bias)$": r".to_out.0.\1",
}


class StoredWeights(Mapping[str, torch.Tensor]):
    """The values of a module by name, in the precision of their file, each read when it is asked for.

    Buffers that no file holds are those of the module.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        computed: Mapping[str, torch.Tensor],
        unused: tuple[str, ...] = (),
    ) -> None:
        self.stored = dict(stored)
        self.computed = dict(computed)
        self.unused = unused
        """Keys of the files that the module has no place for."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.stored[name].read() if name in self.stored else self.computed[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.stored
        yield from self.computed

    def __len__(self) -> int:
        return len(self.stored) + len(self.computed)

    def under(self, prefix: str) -> StoredWeights:
        """Returns the same values for a module that holds this one as ``prefix``."""
        return StoredWeights(
            {f"{prefix}.{name}": tensor for name, tensor in self.stored.items()},
            {f"{prefix}.{name}": tensor for name, tensor in self.computed.items()},
        )


def component_class(folder: Path) -> type[torch.nn.Module]:
    """Returns the class that a component's ``config.json`` names.

    Raises:
        SourceError: there is no such file, or no such class.
    """
    config = _config(folder)
    name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    library = diffusers if "_class_name" in config else transformers
    cls = getattr(library, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise SourceError(
            f"{folder / 'config.json'} names the class {name!r}, expected a network of {library.__name__}",
            hint=f"install the {library.__name__} version that has it",
        )
    return cls


def meta_module(folder: Path, cls: type[torch.nn.Module] | None = None) -> torch.nn.Module:
    """Returns a component in fp32 with parameters on the meta device and real buffers, ready for inference.

    Args:
        folder: the component's folder.
        cls: its class; None takes the one that its configuration names.

    Raises:
        SourceError: the configuration is missing or does not fit the class.
    """
    cls = cls or component_class(folder)
    config = _config(folder)
    try:
        with init_empty_weights(include_buffers=False):
            module = _from_config(cls, folder, config)
    except Exception as error:  # the class raises anything for a configuration that it does not like
        raise SourceError(
            f"{folder / 'config.json'} does not fit {cls.__name__}: {error}", hint="does it load in diffusers alone?"
        ) from error
    if isinstance(module, transformers.PreTrainedModel):
        module.tie_weights()
    return module.float().eval().requires_grad_(False)


def stored_weights(module: torch.nn.Module, folder: Path, variant: str | None = None) -> StoredWeights:
    """Returns where the values of a module are in its folder, by the names of its parameters and buffers.

    Raises:
        SourceError: a tensor is missing, or a shape differs.
    """
    return match_weights(module, read_folder(folder, variant), folder)


def match_weights(module: torch.nn.Module, tensors: Mapping[str, StoredTensor], where: Path) -> StoredWeights:
    """Returns which of the tensors of ``where`` are the values of a module; see `stored_weights`."""
    wanted = _names(module)
    found: dict[str, StoredTensor] = {}
    left_over = []
    for key, tensor in tensors.items():
        name = next((name for name in _candidates(key, module) if name in wanted), None)
        if name is None:
            left_over.append(key)
        else:
            found[name] = tensor
    for name, original in _ties(module).items():
        if original in found:
            found.setdefault(name, found[original])
        elif name in found:
            found[original] = found[name]
    computed = {name: buffer for name, buffer in module.named_buffers() if name not in found and not buffer.is_meta}
    persistent = set(module.state_dict())
    missing = [n for n in wanted if n not in found and (n in persistent or n not in computed)]
    refuse_missing(where, type(module).__name__, missing)
    for name, tensor in found.items():
        if tensor.shape != tuple(wanted[name].shape):
            raise SourceError(
                f"{tensor.path}: {tensor.key} has shape {list(tensor.shape)}, "
                f"{type(module).__name__} expects {list(wanted[name].shape)}",
                hint="config.json and the weights are of different networks",
            )
    return StoredWeights(found, computed, unused_keys(module, left_over))


def load_module(folder: Path, cls: type[torch.nn.Module] | None = None, variant: str | None = None) -> torch.nn.Module:
    """Returns a component in fp32 with its values, for reference runs; values stored in fp32 stay mapped.

    Raises:
        SourceError: see `meta_module` and `stored_weights`.
    """
    module = meta_module(folder, cls)
    weights = stored_weights(module, folder, variant)
    types = _names(module)
    values: dict[StoredTensor, torch.Tensor] = {}
    for name, tensor in weights.stored.items():
        if tensor not in values:
            values[tensor] = tensor.read().to(types[name].dtype)
    state = {name: values[tensor] for name, tensor in weights.stored.items()}
    module.load_state_dict(state, strict=False, assign=True)
    return module.requires_grad_(False)


def _names(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns parameters and buffers by name, those that are tied under each of their names."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _ties(module: torch.nn.Module) -> dict[str, str]:
    """Returns for every name of a tied parameter the name under which files usually hold it."""
    ties: dict[str, str] = dict(getattr(module, "all_tied_weights_keys", None) or {})
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if name != original and original not in ties:
            ties.setdefault(name, original)
    return ties


def _candidates(key: str, module: torch.nn.Module) -> Iterator[str]:
    """Yields the names that a key of a file may mean: itself, without or with a prefix, or in today's words.

    transformers 5 dropped the ``text_model.`` of CLIPTextModel's own names and reads and writes files as before.
    """
    yield key
    for prefix in dict.fromkeys(("text_model", getattr(module, "base_model_prefix", ""))):
        if prefix:
            yield key.removeprefix(f"{prefix}.")
            yield f"{prefix}.{key}"
    for old, new in _OLD_ATTENTION.items():
        if re.search(old, key):
            yield re.sub(old, new, key)


def refuse_missing(where: Path, class_name: str, names: Iterable[str]) -> None:
    """Raises SourceError for names of tensors that the files of a network lack, if there are any."""
    missing = sorted(names)
    if missing:
        raise SourceError(
            f"{where} lacks {_some(missing)}, which {class_name} needs",
            hint="the checkpoint is incomplete, or config.json is that of another network: download it again",
        )


def unused_keys(module: torch.nn.Module, keys: Iterable[str]) -> tuple[str, ...]:
    """Returns keys that nothing takes, but those that the class itself ignores and tables of positions.

    Older releases of transformers stored ``position_ids``, today's compute them.
    """
    ignored = [*(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()), r"(^|\.)position_ids$"]
    return tuple(sorted(key for key in keys if not any(re.search(pattern, key) for pattern in ignored)))


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{folder} has no config.json", hint="download the component again") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not JSON: {error}", hint="download it again") from error
    return config


def _from_config(cls: Any, folder: Path, config: Mapping[str, Any]) -> torch.nn.Module:
    if issubclass(cls, transformers.PreTrainedModel):
        module: torch.nn.Module = cls(cls.config_class.from_pretrained(folder, local_files_only=True))
    else:
        module = cls.from_config(dict(config))
    return module

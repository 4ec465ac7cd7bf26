"""Loads a checkpoint that is one safetensors file, in the layout of the original repositories."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from fewstep.disk import scratch
from fewstep.errors import SourceError
from fewstep.export.source.lazy_weights import StoredWeights, match_weights
from fewstep.export.source.safetensors_index import StoredTensor, read_header
from fewstep.export.source.weight_checks import check_weights_file

# diffusers raises anything for a file that is not what its configuration says.
_FAILURES = Exception


def load_single_file(path: Path, class_name: str, config: Path, left_out: dict[str, Any]) -> Any:
    """Returns the diffusers pipeline of a single-file checkpoint.

    Args:
        path: the checkpoint.
        class_name: the pipeline's class, as the configuration's ``model_index.json`` has it.
        config: diffusers folder with the configurations, the tokenizer and the scheduler; its weights are not read.
        left_out: components by name that are to be None, and what else the constructor takes.

    Raises:
        SourceError: the file does not hold the weights that the configuration asks for.
    """
    import diffusers

    pipeline_class: Any = getattr(diffusers, class_name, None)
    if not hasattr(pipeline_class, "from_single_file"):
        raise SourceError(
            f"{config}/model_index.json: diffusers {diffusers.__version__} loads no {class_name!r} from a single file",
            hint="convert the checkpoint to a diffusers folder and give that",
        )
    try:
        pipeline = pipeline_class.from_single_file(str(path), config=str(config), local_files_only=True, **left_out)
    except _FAILURES as error:
        raise SourceError(
            f"{path}: diffusers cannot load it as {config} describes it: {_first_line(error)}",
            hint="is --config the folder of the same base model, and does the file hold the whole pipeline?",
        ) from error
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            check_complete(path, name, module)
    return pipeline


def load_component(path: Path, name: str, module: Any) -> torch.nn.Module:
    """Returns a module like ``module`` with the weights of a file, in the names of diffusers or of the original.

    Raises:
        SourceError: the file does not hold exactly these weights.
    """
    check_weights_file(path, f"component {name}:")
    tensors = read_header(path)
    matched = _matched(module, tensors, path)
    if matched is not None and not matched.unused:
        replaced: torch.nn.Module = copy.deepcopy(module)
        dtype = next(module.parameters()).dtype
        state = {n: t if not t.dtype.is_floating_point else t.to(dtype) for n, t in matched.items()}
        replaced.load_state_dict(state, strict=False)
        return replaced
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    weights = {key: tensor.shape for key, tensor in tensors.items()}
    # Of a file that has all names and more, diffusers would drop the rest without a word.
    if matched is not None or not hasattr(module, "from_single_file"):
        raise _other_weights(path, name, module, weights, expected)
    with scratch() as folder:
        module.save_config(folder)
        try:
            replaced = type(module).from_single_file(str(path), config=str(folder), local_files_only=True)
        except _FAILURES as error:
            raise _other_weights(path, name, module, weights, expected) from error
    check_complete(path, name, replaced)
    return replaced.to(next(module.parameters()).dtype)


def check_complete(path: Path, name: str, module: torch.nn.Module) -> None:
    """Raises SourceError if a file left a tensor of a module without values."""
    empty = [key for key, tensor in module.state_dict().items() if tensor.is_meta]
    if empty:
        raise SourceError(
            f"{path} lacks {len(empty)} weights of {name}, first {empty[0]}",
            hint="the file is not of this base model, or holds only a part of it",
        )


def _matched(module: torch.nn.Module, tensors: dict[str, StoredTensor], path: Path) -> StoredWeights | None:
    """Returns the tensors of a file that are the values of a module, None if it lacks one in diffusers' names."""
    try:
        return match_weights(module, tensors, path)
    except SourceError:
        return None


def _other_weights(
    path: Path,
    name: str,
    module: torch.nn.Module,
    weights: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
) -> SourceError:
    lacks = sorted(set(expected) - set(weights))
    other = sorted(set(weights) - set(expected))
    shaped = sorted(k for k in set(expected) & set(weights) if weights[k] != expected[k])
    parts = [f"lacks {len(lacks)} tensors, first {lacks[0]}"] if lacks else []
    parts += [f"has {len(other)} others, first {other[0]}"] if other else []
    if shaped:
        first = shaped[0]
        parts.append(f"has {first} {list(weights[first])}, expected {list(expected[first])}")
    return SourceError(
        f"component {name}: {path} does not hold the weights of {type(module).__name__}: it {'; it '.join(parts)}",
        hint="take the file for this base model",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

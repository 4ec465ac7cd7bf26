"""The files that Apple's StableDiffusion package for Swift reads beside its networks. See docs/coreml.md."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

# What the package's tokenizers read, and what it calls the second tokenizer's.
_FILES = ("vocab.json", "merges.txt")


def write_resources(folder: Path, tokenizers: Sequence[Path]) -> None:
    """Copies the files of BPE tokenizers into a ``coreml`` folder: plain for the first, numbered for the others."""
    for i, tokenizer in enumerate(tokenizers):
        if not all((tokenizer / name).is_file() for name in _FILES):
            continue  # a tokenizer of another kind, which Apple's package takes from elsewhere
        for name in _FILES:
            stem, suffix = name.split(".")
            shutil.copyfile(tokenizer / name, folder / (name if i == 0 else f"{stem}_{i + 1}.{suffix}"))

"""Token ids of a prompt, without transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from fewstep.errors import BundleError
from fewstep.manifest import TokenizerSpec

FILE = "tokenizer.json"


class Tokenizer:
    """A tokenizer of the bundle: text to a fixed number of ids."""

    def __init__(self, folder: Path, spec: TokenizerSpec) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / FILE))
        except Exception as error:  # tokenizers raises a bare Exception
            raise BundleError(f"{folder / FILE} is not a tokenizer: {error}", hint="build the bundle again") from error
        self._tokenizer.enable_truncation(spec.length)
        self._tokenizer.enable_padding(length=spec.length, pad_id=spec.pad_id)

    def __call__(self, text: str) -> npt.NDArray[np.int64]:
        """Returns int64 [1, length]: truncated or padded, with the special tokens of the checkpoint."""
        return np.array([self._tokenizer.encode(text).ids], dtype=np.int64)

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
        self._tokenizer.enable_padding(length=spec.length, pad_id=spec.pad_id, direction=spec.padding_side)
        self._spec = spec

    def __call__(self, text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns ids and mask (1 for each id that is not padding), int64 [1, length] each.

        Truncated or padded, with the special tokens of the checkpoint and what its pipeline puts around a text.
        """
        spec = self._spec
        text = text.lower().strip() if spec.clean else text
        encoded = self._tokenizer.encode(f"{spec.prefix}{text}{spec.suffix}")
        return np.array([encoded.ids], dtype=np.int64), np.array([encoded.attention_mask], dtype=np.int64)

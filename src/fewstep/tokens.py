"""Token ids of a prompt, without transformers."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from fewstep.errors import BundleError
from fewstep.manifest import TokenizerSpec
from fewstep.text_operations import apply_operations

FILE = "tokenizer.json"


class Tokenizer:
    """A tokenizer of the bundle: text to a fixed number of ids."""

    def __init__(self, folder: Path, spec: TokenizerSpec) -> None:
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / FILE))
        except Exception as error:  # tokenizers raises a bare Exception
            raise BundleError(f"{folder / FILE} is not a tokenizer: {error}", hint="build the bundle again") from error
        self._set(tokenizer, spec)

    @classmethod
    def of(cls, json: str, spec: TokenizerSpec) -> Tokenizer:
        """Returns the tokenizer of the text of a ``tokenizer.json``."""
        made = cls.__new__(cls)
        made._set(tokenizers.Tokenizer.from_str(json), spec)
        return made

    def _set(self, tokenizer: tokenizers.Tokenizer, spec: TokenizerSpec) -> None:
        tokenizer.enable_truncation(spec.length)
        tokenizer.enable_padding(length=spec.length, pad_id=spec.pad_id, direction=spec.padding_side)
        self._tokenizer, self._spec = tokenizer, spec

    def __call__(self, text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns ids and mask (1 for each id that is not padding), int64 [1, length] each.

        Truncated or padded, with the special tokens of the checkpoint and what its pipeline makes of a text first.
        """
        encoded = self._tokenizer.encode(self.text(text))
        return np.array([encoded.ids], dtype=np.int64), np.array([encoded.attention_mask], dtype=np.int64)

    def text(self, prompt: str) -> str:
        """Returns what the pipeline makes of a prompt before it is cut into tokens."""
        spec = self._spec
        text = apply_operations(spec.operations, prompt)
        if spec.expansions:
            found = set(self._whole.encode(text, add_special_tokens=False).ids)
            for token, replacement in spec.expansions.items():
                if self._whole.token_to_id(token) in found:
                    text = text.replace(token, replacement)
        return f"{spec.prefix}{text}{spec.suffix}"

    @functools.cached_property
    def _whole(self) -> tokenizers.Tokenizer:
        """The tokenizer without truncation and padding."""
        whole = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        whole.no_truncation()
        whole.no_padding()
        return whole

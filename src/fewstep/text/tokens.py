"""Token ids of a prompt, without transformers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from fewstep.bundle.manifest import TokenizerSpec
from fewstep.errors import BundleError
from fewstep.strict import parse_json, read_file
from fewstep.text.operations import apply_operations
from fewstep.text.patterns import tokenizer_problem

FILE = "tokenizer.json"
_REBUILD = "build the bundle again"
# Twice the largest vocabulary that is known.
_MOST_BYTES = 64 << 20


class Tokenizer:
    """A tokenizer of the bundle: text to a fixed number of ids."""

    def __init__(self, folder: Path, spec: TokenizerSpec) -> None:
        path = folder / FILE
        try:
            content = read_file(path, _MOST_BYTES, error=BundleError, hint=_REBUILD)
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}", hint=_REBUILD) from error
        problem = tokenizer_problem(parse_json(content, str(path), error=BundleError, hint=_REBUILD))
        if problem is not None:
            raise BundleError(f"{path} {problem}", hint=_REBUILD)
        self._set(content.decode(), spec, str(path))

    @classmethod
    def of(cls, json: str, spec: TokenizerSpec) -> Tokenizer:
        """Returns the tokenizer of the text of a ``tokenizer.json``."""
        made = cls.__new__(cls)
        made._set(json, spec, FILE)
        return made

    def _set(self, json: str, spec: TokenizerSpec, where: str) -> None:
        with _refusing(where):
            tokenizer = tokenizers.Tokenizer.from_str(json)
            tokenizer.enable_truncation(spec.length)
            tokenizer.enable_padding(length=spec.length, pad_id=spec.pad_id, direction=spec.padding_side)
        self._tokenizer, self._spec, self._where = tokenizer, spec, where

    def __call__(self, text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns ids and mask (1 for each id that is not padding), int64 [1, length] each.

        Truncated or padded, with the special tokens of the checkpoint and what its pipeline makes of a text first.
        """
        with _refusing(self._where):
            encoded = self._tokenizer.encode(self.text(text))
        if len(encoded.ids) != self._spec.length:
            raise BundleError(
                f"{self._where} gives {len(encoded.ids)} tokens, the manifest says {self._spec.length}", hint=_REBUILD
            )
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


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turns what tokenizers raises, a bare Exception or a panic of Rust's, into an error of ours."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise BundleError(f"{where} is not a tokenizer: {error}", hint=_REBUILD) from error

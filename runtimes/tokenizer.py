"""Token ids of a prompt, without transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from fewstep.errors import BundleError
from fewstep.manifest import TokenizerSpec
from fewstep.patterns import tokenizer_problem
from fewstep.strict import parse_json, read_file

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
        with _refusing(path):
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
            self._tokenizer.enable_truncation(spec.length)
            self._tokenizer.enable_padding(length=spec.length, pad_id=spec.pad_id, direction=spec.padding_side)
        self._path, self._spec = path, spec

    def __call__(self, text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns ids and mask (1 for each id that is not padding), int64 [1, length] each.

        Truncated or padded, with the special tokens of the checkpoint and what its pipeline puts around a text.
        """
        spec = self._spec
        text = text.lower().strip() if spec.clean else text
        with _refusing(self._path):
            encoded = self._tokenizer.encode(f"{spec.prefix}{text}{spec.suffix}")
        if len(encoded.ids) != spec.length:
            raise BundleError(
                f"{self._path} gives {len(encoded.ids)} tokens, the manifest says {spec.length}", hint=_REBUILD
            )
        return np.array([encoded.ids], dtype=np.int64), np.array([encoded.attention_mask], dtype=np.int64)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turns what tokenizers raises, a bare Exception or a panic of Rust's, into an error of ours."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise BundleError(f"{path} is not a tokenizer: {error}", hint=_REBUILD) from error

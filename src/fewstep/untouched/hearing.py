"""Hears what a pipeline's tokenizers give its networks for a text, without running the networks for every text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from fewstep.untouched.calling import call_pipeline, loop_tokens
from fewstep.untouched.loading import Subject
from fewstep.untouched.randomness import Draws, in_pipelines
from fewstep.untouched.request import Read, Request, UserCall

Array = npt.NDArray[Any]

# Networks of the loop: when one is called, all texts have been read.
_OF_THE_LOOP = ("unet", "transformer")
# Tokens that were added to a tokenizer, beyond which no more are tried.
_ADDED = 32
_METHODS = ("forward", "encode", "decode")


class _Enough(BaseException):
    """Ends a call of the pipeline when its loop begins; no pipeline catches it."""


class _Zeros(Draws):
    """Noise that costs nothing: no network looks at it."""

    def __call__(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns zeros."""
        return torch.zeros(tuple(shape))


class _Hearing:
    """What the tokenizers returned in one call of the pipeline, and which of it went on to a network."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any, Any]] = []
        self._used: list[int] = []

    def given(self, values: Sequence[Any]) -> None:
        """Notes which tokenizer's ids a network is given."""
        for value in values:
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                index = self._index(value)
                if index is not None and index not in self._used:
                    self._used.append(index)

    def _index(self, value: torch.Tensor) -> int | None:
        """Returns which call returned these ids: the very tensor, else the last that is equal."""
        ids = [(i, ids) for i, (_, ids, _) in enumerate(self.heard) if isinstance(ids, torch.Tensor)]
        same = [i for i, found in ids if found.data_ptr() == value.data_ptr()]
        return next(reversed(same or [i for i, found in ids if found.equal(value)]), None)

    def reads(self) -> tuple[Read, ...]:
        """Returns what went on to networks, a read for each row; of a tokenizer of which nothing did, its first."""
        names = {self.heard[i][0] for i in self._used}
        firsts = {name: i for i, (name, _, _) in reversed(list(enumerate(self.heard))) if name not in names}
        found = []
        for i in sorted([*self._used, *firsts.values()]):
            name, ids, mask = self.heard[i]
            ids_BL = np.atleast_2d(np.asarray(ids, dtype=np.int64))
            masks = [None] * len(ids_BL) if mask is None else list(np.atleast_2d(np.asarray(mask, dtype=np.int64)))
            found += [Read(name, row, of_row) for row, of_row in zip(ids_BL, masks, strict=True)]
        return tuple(found)


def texts_of(subject: Subject, request: Request) -> tuple[str, ...]:
    """Returns the texts of a request, and some with what was added to the tokenizers: a textual inversion's tokens."""
    if request.text_input is None:
        return ()
    added: dict[str, None] = {}
    for tokenizer in subject.tokenizers.values():
        special = set(tokenizer.all_special_tokens)
        added |= dict.fromkeys(token for token in tokenizer.get_added_vocab() if token not in special)
    some = list(added)[:_ADDED]
    return (*request.texts, *(f"A {token}, and again:{token}." for token in some))


@torch.no_grad()
def reads(subject: Subject, request: Request, texts: Sequence[str]) -> list[tuple[Read, ...]]:
    """Returns what the tokenizers give for each text."""
    if request.text_input is None:
        return []
    if subject.is_loop:
        return [_loop_reads(subject, request.text_input, text) for text in texts]
    kept: dict[tuple[str, str, int], Any] = {}
    _hear(subject, request, request.calls[0].prompt, kept)  # with the networks that read texts, once
    return [_hear(subject, request, text, kept).reads() for text in texts]


def _loop_reads(subject: Subject, name: str, text: str) -> tuple[Read, ...]:
    found = loop_tokens(subject.tokenizers[name], text)
    return (Read(name, np.asarray(found["input_ids"])[0], np.asarray(found["attention_mask"])[0]),)


def _hear(subject: Subject, request: Request, text: str, kept: dict[tuple[str, str, int], Any]) -> _Hearing:
    """Hears one text. Networks give what they gave for the first text, whatever they are given."""
    hearing, first = _Hearing(), request.calls[0]
    call = UserCall(first.name, text, first.steps, first.seed, first.guidance, first.negative)
    with ExitStack() as stack:
        stack.enter_context(in_pipelines(_Zeros(0), getattr(subject.pipeline, "scheduler", None)))
        for name, tokenizer in subject.tokenizers.items():
            stack.enter_context(_listening(name, tokenizer, hearing))
        for name, module in subject.pipeline.components.items():
            if isinstance(module, torch.nn.Module):
                stack.enter_context(_standing_in(name, module, hearing, kept))
        try:
            call_pipeline(subject, request, call)
        except _Enough:
            pass
        except Exception:
            # A stand-in of another length than the text's own may not fit; what was heard until then counts.
            if not hearing.heard:
                raise
    return hearing


@contextmanager
def _listening(name: str, tokenizer: Any, hearing: _Hearing) -> Iterator[None]:
    """Hears the calls of one tokenizer; Python looks ``__call__`` up in the class, so that is where to listen."""
    original = type(tokenizer).__call__

    def listen(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if self is tokenizer and isinstance(result.get("input_ids"), (torch.Tensor, list)):
            hearing.heard.append((name, result["input_ids"], result.get("attention_mask")))
        return result

    with mock.patch.object(type(tokenizer), "__call__", listen):
        yield


@contextmanager
def _standing_in(
    name: str, module: torch.nn.Module, hearing: _Hearing, kept: dict[tuple[str, str, int], Any]
) -> Iterator[None]:
    """Has a network give what it gave in the first call, and a network of the loop end the call."""
    counts: dict[str, int] = {}

    def stand_in(method: str, original: Any) -> Any:
        def answer(*args: Any, **kwargs: Any) -> Any:
            hearing.given([*args, *kwargs.values()])
            if name.startswith(_OF_THE_LOOP):
                raise _Enough
            number = counts[method] = counts.get(method, -1) + 1
            key = (name, method, number)
            if key not in kept:
                kept[key] = original(*args, **kwargs)
            return kept[key]

        return answer

    with ExitStack() as stack:
        for method in _METHODS:
            if hasattr(module, method):
                original = getattr(module, method)
                stack.enter_context(mock.patch.object(module, method, stand_in(method, original)))
        yield

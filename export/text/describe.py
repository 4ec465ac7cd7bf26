"""Reads off a generator what a bundle must do to a text: operations before the tokenizer, and the tokenizer's calls.

Nothing of it is assumed. What the pipeline makes of odd texts is heard (`fewstep.export.text.record`), the shortest
list of operations that does the same is looked for, and the bundle's own tokenizer must give the ids and masks of the
pipeline's for every text. What cannot be said so is refused, before anything is compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import torch

from fewstep.bundle.contract import TEXT
from fewstep.bundle.manifest import TokenizerSpec
from fewstep.errors import ExportError
from fewstep.export.contract.diffusers_layout import tokenizer_json
from fewstep.export.generator import Generator
from fewstep.export.record.run_record import Run, Text
from fewstep.export.text.record import Given, Heard, TextPath, used_texts
from fewstep.text.cleaners import ABSENT, cleaners
from fewstep.text.operations import OPERATIONS, apply_operations, sequences
from fewstep.text.probe_texts import PROBES, odd_texts, path_texts
from fewstep.text.tokens import Tokenizer

# How much of a text and of a row of ids a message shows.
_SHOWN, _NUMBERS = 120, 24


def read_tokenizers(
    generator: Generator, recorded: Run, steps: int, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, TokenizerSpec]:
    """Returns the tokenizers whose ids reach the loop, with what the pipeline does to a text first.

    Raises:
        ExportError: a bundle cannot do to every text what the pipeline does, or what it computes follows the length
            of a text, or something of the text that is not heard.
    """
    names = [spec.name for spec in generator.inputs if spec.kind == TEXT]
    if not names:
        return {}
    path = TextPath(generator, recorded, steps, inputs)
    heard = [path.hear(text) for text in path_texts()]
    if heard[0].error is not None:
        raise ExportError(
            f"{_title(generator)} does not take the text {PROBES[0]!r}: {heard[0].error}",
            hint="the pipeline itself says so: change the options",
        )
    used = _one_call_each(used_texts(recorded))
    _refuse_lengths(used, heard)
    _refuse_unheard(heard)
    found = {}
    for name, (number, _) in used.items():
        tokenizer = generator.tokenizers[name]
        spec = TokenizerSpec(
            folder=name,
            length=heard[0].of(name)[number].ids.shape[1],
            pad_id=int(tokenizer.pad_token_id),
            padding_side=str(getattr(tokenizer, "padding_side", "right")),
            input=names[0],
        )
        found[name] = _read(generator, path, name, number, heard, spec)
    return found


def _one_call_each(used: Sequence[tuple[int, Text]]) -> dict[str, tuple[int, Text]]:
    """Returns the call of each tokenizer that reaches the loop, with its number among the tokenizer's.

    Raises:
        ExportError: several of one tokenizer do, with different ids.
    """
    found: dict[str, tuple[int, Text]] = {}
    for number, text in used:
        _, first = found.setdefault(text.tokenizer, (number, text))
        if first.ids.shape != text.ids.shape or not torch.equal(first.ids, text.ids):
            raise ExportError(
                f"{text.tokenizer} is called for {shortened(first.text)} and for {shortened(text.text)} in one run, "
                "and the loop is given both, expected one text for each tokenizer",
                hint="texts of several meanings cannot be expressed yet",
            )
    return found


def _refuse_lengths(used: Mapping[str, tuple[int, Text]], heard: Sequence[Heard]) -> None:
    """Raises ExportError if the number of tokens, or the shape of what a component is given, follows the text."""
    hint = (
        "what follows the length of the prompt cannot be compiled yet: build a pipeline that pads every prompt to one "
        "length, or give the option that makes it do so"
    )
    first = heard[0]
    for other in heard[1:]:
        for name, (number, _) in used.items():
            texts, others = first.of(name), other.of(name)
            if other.error is None and len(texts) != len(others):
                raise ExportError(
                    f"{name} is called {len(texts)} times for {shortened(first.text)} and {len(others)} times for "
                    f"{shortened(other.text)}, expected the same for every text",
                    hint=hint,
                )
            if number < len(others) and others[number].ids.shape != texts[number].ids.shape:
                raise ExportError(
                    f"{name} gives {texts[number].ids.shape[1]} tokens for {shortened(first.text)} and "
                    f"{others[number].ids.shape[1]} for {shortened(other.text)}, expected as many for every text",
                    hint=hint,
                )
        for a, b in zip(first.given, other.given, strict=False):
            for tensor in a.tensors.keys() & b.tensors.keys():
                shapes = [list(given.tensors[tensor].shape) for given in (a, b)]
                if shapes[0] != shapes[1]:
                    raise ExportError(
                        f"{a.component}: input {tensor} is {shapes[0]} for {shortened(first.text)} and {shapes[1]} for "
                        f"{shortened(other.text)}, expected the same shape for every text",
                        hint=hint,
                    )


def _refuse_unheard(heard: Sequence[Heard]) -> None:
    """Raises ExportError if a component is given what follows the text but comes from no tokenizer that is heard."""
    first = heard[0]
    for other in heard[1:]:
        if other.error is not None:
            continue
        if [g.component for g in first.given] != [g.component for g in other.given]:
            raise ExportError(
                f"the pipeline calls {_listed(first.given)} for {shortened(first.text)} and {_listed(other.given)} for "
                f"{shortened(other.text)}, expected the same networks for every text",
                hint="what is called must not follow the text",
            )
        for a, b in zip(first.given, other.given, strict=True):
            what = _unheard(a, b)
            if what is not None:
                raise ExportError(
                    f"{a.component} is given another {what} for {shortened(other.text)} than for "
                    f"{shortened(first.text)}, but none of the pipeline's tokenizers makes it: a bundle would keep "
                    "that of its first prompt",
                    hint="tokenizers are components of the pipeline that have model_max_length, called as such; "
                    "processors and other ways to read a text cannot be expressed yet",
                )


def _unheard(a: Given, b: Given) -> str | None:
    for name in sorted(a.constant | b.constant):
        one, other = a.tensors.get(name), b.tensors.get(name)
        if one is None or other is None or not torch.equal(one, other):
            return name
    return "value among its arguments" if a.plain != b.plain else None


def _read(
    generator: Generator, path: TextPath, name: str, number: int, heard: Sequence[Heard], spec: TokenizerSpec
) -> TokenizerSpec:
    """Returns a tokenizer's entry with the operations, expansions and surroundings that all texts bear out."""
    json = tokenizer_json(generator.tokenizers[name])
    expansions = _expansions(name, generator.tokenizers[name])
    further = [path.hear(text) for token in expansions for text in _texts_with(token, expansions)]
    pairs, extra = _pairs(heard, name, number), _pairs(further, name, number)
    said = _said(spec, pairs)
    if said is None:
        raise _inexpressible(generator, path, name, number, pairs)
    for found in (said, replace(said, expansions=expansions)):
        tokenizer = Tokenizer.of(json, found)
        wrong = [(text, seen) for text, seen in (*pairs, *extra) if tokenizer.text(text) != seen]
        if not wrong:
            call = heard[0].of(name)[number]
            _check_tokens(name, tokenizer, call, [*odd_texts(), *(text for text, _ in extra)])
            return found
    raise _changed(generator, name, *wrong[0])


def _pairs(heard: Sequence[Heard], name: str, number: int) -> list[tuple[str, str]]:
    """Returns texts of the user with what a tokenizer was given for them."""
    return [(h.text, h.of(name)[number].text) for h in heard if h.error is None]


def _said(spec: TokenizerSpec, pairs: Sequence[tuple[str, str]]) -> TokenizerSpec | None:
    """Returns the entry with the shortest operations that make of every text what was seen; None if there are none."""
    text, seen = pairs[0]
    for operations in sequences():
        core = apply_operations(operations, text)
        for start in _places(core, seen):
            prefix, suffix = seen[:start], seen[start + len(core) :]
            if all(prefix + apply_operations(operations, t) + suffix == s for t, s in pairs):
                return replace(spec, prefix=prefix, suffix=suffix, operations=operations)
    return None


def _places(part: str, whole: str) -> Iterator[int]:
    start = whole.find(part)
    while start >= 0:
        yield start
        start = whole.find(part, start + 1)


def _inexpressible(
    generator: Generator, path: TextPath, name: str, number: int, pairs: Sequence[tuple[str, str]]
) -> ExportError:
    """Returns the error that names the first text for which no operations do what the pipeline does."""
    texts = (*path_texts()[:1], *PROBES)
    found = _pairs([path.hear(text) for text in texts], name, number)
    spec = TokenizerSpec(name, 1, 0)
    fewest = next((n for n in range(1, len(found) + 1) if _said(spec, found[:n]) is None), None)
    return _changed(generator, name, *(pairs[-1] if fewest is None else found[fewest - 1]))


def _changed(generator: Generator, name: str, text: str, seen: str) -> ExportError:
    installed = [f"{package} {version}" for package, version in cleaners().items() if version != ABSENT]
    parameters = () if generator.is_loop else inspect.signature(generator.pipeline.__call__).parameters.values()
    switches = [p.name for p in parameters if isinstance(p.default, bool) and p.name not in ("return_dict",)]
    hint = f"an argument of its call may turn it off ({', '.join(switches)})" if switches else "build another pipeline"
    if installed:
        hint += f"; it may need no {' and '.join(installed)}: build where they are not installed"
    return ExportError(
        f"{_title(generator)} makes {shortened(seen)} of the text {shortened(text)} before its {name}; what a bundle "
        f"can do to every text is {', '.join(OPERATIONS)}, the same words before and after it, and tokens of several "
        "vectors",
        hint=hint,
    )


def _expansions(name: str, tokenizer: Any) -> dict[str, str]:
    """Returns the tokens of embeddings of several vectors, each with the tokens of all its vectors.

    diffusers adds ``<token>``, ``<token>_1``, ``<token>_2`` and on for them (``load_textual_inversion``).

    Raises:
        ExportError: one such token is a part of another, so that the order in which they are replaced matters, which
            in diffusers differs from process to process.
    """
    added = getattr(tokenizer, "added_tokens_encoder", {})
    found = {}
    for token in added:
        vectors = [token]
        while f"{token}_{len(vectors)}" in added:
            vectors.append(f"{token}_{len(vectors)}")
        if len(vectors) > 1:
            found[token] = " ".join(vectors)
    for token, other in permutations(found, 2):
        if token in other:
            raise ExportError(
                f"{name} has the tokens {token!r} and {other!r}, each of several vectors: which of them a pipeline "
                "replaces first is not the same in every process",
                hint="load one of the two textual inversions under another name",
            )
    return found


def _texts_with(token: str, expansions: Mapping[str, str]) -> list[str]:
    """Returns texts that show what becomes of a token of several vectors, beside others and beside its vectors."""
    vectors = expansions[token].split(" ")
    return [
        f"a photo of {token} on a table",
        f"{token}{token.upper()},{vectors[-1]} {token}",
        f"{vectors[-1]}x",
        " and ".join(expansions),
    ]


def _check_tokens(name: str, tokenizer: Tokenizer, call: Text, texts: Sequence[str]) -> None:
    """Raises ExportError unless the bundle's tokenizer gives the ids and the mask of the pipeline's for every text."""
    theirs = call.again([tokenizer.text(text) for text in texts])
    for i, text in enumerate(texts):
        ids, mask = tokenizer(text)
        pairs = [("ids", ids[0], theirs["input_ids"])]
        pairs += [("mask", mask[0], theirs["attention_mask"])] if call.mask is not None else []
        for what, ours, rows in pairs:
            expected = rows[i].numpy()
            if ours.shape != expected.shape or not np.array_equal(ours, expected):
                raise ExportError(
                    f"{name}: the {what} of the text {shortened(text)} are {_head(ours)}, expected {_head(expected)} "
                    "as the pipeline calls it",
                    hint="a bundle pads and cuts on the tokenizer's own side and keeps its special tokens; what a "
                    "pipeline asks for beyond that cannot be expressed yet",
                )


def _head(ids: np.ndarray[Any, Any]) -> str:
    """Returns the first numbers of a row, and how many there are."""
    row = ids.tolist()
    return str(row) if len(row) <= _NUMBERS else f"[{', '.join(map(str, row[:_NUMBERS]))}, ...] ({len(row)} in all)"


def _title(generator: Generator) -> str:
    return generator.name if generator.is_loop else type(generator.pipeline).__name__


def shortened(text: str) -> str:
    """Returns a text in quotes, as a message shows it."""
    return ascii(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!a}... ({len(text)} characters)"


def _listed(given: Sequence[Given]) -> str:
    return ", ".join(g.component for g in given) or "no network"

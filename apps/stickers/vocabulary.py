"""Makes the byte-level BPE vocabulary of the text encoder from the data set's captions, in CLIP's file layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import CLIPTokenizer

from fewstep.stickers.data import Sticker

VOCABULARY_SIZE = 2048
MAX_TOKENS = 24
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(stickers: Sequence[Sticker], folder: Path) -> CLIPTokenizer:
    """Returns the tokenizer of a folder; where there is none, trains its merges and writes them first.

    Merges that are equally frequent come in another order in every process, so they are made once. Ids as in CLIP: 256
    bytes, the same 256 at a word's end, merges in order of rank, start of text, end of text.
    """
    from tokenizers import Tokenizer, models, trainers

    if (folder / "vocab.json").is_file():
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    blank = CLIPTokenizer()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = _byte_alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * VOCABULARY_SIZE, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(_texts(stickers), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: VOCABULARY_SIZE - 2 * len(alphabet) - 2]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges), _BOS, _EOS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def _texts(stickers: Sequence[Sticker]) -> Iterator[str]:
    for sticker in stickers:
        yield sticker.name
        yield " ".join(sticker.keywords)


def _byte_alphabet() -> list[str]:
    """Returns GPT-2's printable stand-ins for the bytes 0 to 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]

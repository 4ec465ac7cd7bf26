"""The fixed list of odd texts."""

from __future__ import annotations

import hashlib

from fewstep.text.probe_texts import PROBES, odd_texts


def test_texts_are_many_and_always_the_same() -> None:
    texts = odd_texts()
    assert len(texts) >= 200
    assert len(set(texts)) == len(texts)
    assert texts[: len(PROBES)] == PROBES
    together = "\0\n".join(texts).encode()  # encode: none has half a surrogate pair, which no tokenizer takes
    assert hashlib.sha256(together).hexdigest() == "4e0e977aacf560fc44e36ca547fafb35ba8ce16e6cdf157cfa294a80bd76e8a0"


def test_texts_hold_what_pipelines_change() -> None:
    assert "" in PROBES
    for of_which in (str.lower, str.strip, str.upper, lambda t: " ".join(t.split()), lambda t: t.replace("&amp;", "&")):
        assert any(of_which(text) != text for text in PROBES)
    assert max(len(text.split()) for text in PROBES) > 512  # the longest text of a T5

"""The vectors that JavaScript is tested against are what Python computes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.web.vectors import ENTITIES, FOLDER, entities, files, texts


@pytest.mark.parametrize(("name", "content"), [pytest.param(*file, id=file[0]) for file in files()])
def test_vectors_are_current(name: str, content: dict[str, Any]) -> None:
    found = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(content)), f"tests/vectors/{name}: python -m tests.web.vectors"


def test_entities_are_those_of_python() -> None:
    assert json.loads(ENTITIES.read_text(encoding="utf-8")) == entities()


def test_verdicts_of_both_kinds_are_there() -> None:
    """Vectors whose every verdict is the same would show nothing."""
    cases = json.loads((FOLDER / "floor.json").read_text(encoding="utf-8"))["cases"]
    verdicts = [check["passed"] for case in cases for check in case["checks"]]
    assert verdicts.count(True) >= 6 and verdicts.count(False) >= 6


def test_the_corpus_is_odd() -> None:
    joined = "".join(texts())
    assert "" in texts() and max(map(len, texts())) > 300
    assert all(c in joined for c in "\x00é😀ت\u202e\u200d\ufeff\u0085")

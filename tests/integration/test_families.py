"""Every family of the zoo builds through the one path, or is refused with a reason; the page says what is so."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.support.families import REFUSED, Row, build_family, family_code
from tests.support.zoo import FAMILIES, Family

# One of each kind of machinery: two text encoders and glue between them; packed latents; a picture to start from; a
# second network in every step; two times; a network that runs once; classes; sound.
FAST = (
    "sdxl-turbo",
    "flux-schnell",
    "img2img-lcm",
    "controlnet",
    "meanflow",
    "constant-acceleration",
    "consistency-model-class",
    "flash-audio",
    *REFUSED,
)
PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def marked(family: Family) -> object:
    marks = [] if family.name in FAST else [pytest.mark.slow]
    return pytest.param(family, id=family.name, marks=marks)


@pytest.mark.parametrize("family", [marked(family) for family in FAMILIES])
def test_family(family: Family, record_property: Callable[[str, object], None]) -> None:
    row = build_family(family)
    record_property("family", asdict(row))  # tests/conftest.py prints the table of them
    if family.name in REFUSED:
        assert REFUSED[family.name] in row.error
        assert row.hint
        return
    assert not row.error
    assert row.sqnr_db is not None and row.sqnr_db >= 100
    assert row.output_db is not None and row.output_db >= 80
    assert row.default_db is not None and row.default_db >= 80
    takes_prompt = any(given.kind == "prompt" for given in family.inputs.values())
    assert (row.capitals_db is not None and row.capitals_db >= 80) == takes_prompt
    assert family_code(row) == 0


def test_lines_of_a_family_are_found() -> None:
    row = Row("transformer", "", "its loop in plain PyTorch", (1,), (), "", None, None, 0, 0.0)
    assert family_code(row) > 0  # no family: a folder of a pipeline, which the compiler has to name


def test_page_is_of_this_zoo() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in text.splitlines() if re.match(r"\| [a-z0-9]", line)][1:]
    assert [(r[0], r[1], r[3]) for r in rows] == [(f.name, f.group, ", ".join(map(str, f.steps))) for f in FAMILIES], (
        "run `make families`"
    )
    refused = {r[0]: r[4] for r in rows if r[4].startswith("refused: ")}
    assert refused.keys() == REFUSED.keys()
    assert all(reason in refused[name] for name, reason in REFUSED.items())
    share = f"{len(FAMILIES) - len(REFUSED)} of {len(FAMILIES)} kinds"
    assert share in text
    assert share in (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    for row in rows:
        if row[0] not in refused:
            assert float(row[6]) >= 100, row
            assert float(row[7]) >= 80, row
            assert row[9] == "0", row
            assert all(float(value) >= 80 for value in row[8].split(", ") if value), row

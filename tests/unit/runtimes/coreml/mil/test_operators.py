"""How coremltools' own tests are counted, and what they taught the evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.errors import ContractError
from fewstep.runtimes.coreml.mil.ops import OPS
from tests.unit.runtimes.coreml.mil.operators import classify, page

PAGE = Path(__file__).parents[5] / "docs" / "coreml-operators.md"


def record(**values: Any) -> dict[str, Any]:
    plain = {"test": "iOS14/test_x.py::test[a]", "outcome": "passed", "operations": ["add"], "predictions": 1}
    return {**plain, "unknown": None, "reason": "", "rule": 4, "evaluator": "now", "wide": False, **values}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "passed"),
        ({"wide": True}, "passed to fp16"),
        ({"predictions": 0}, "not compared"),
        ({"outcome": "failed"}, "failed"),
        ({"outcome": "failed", "predictions": 0}, "failed"),
        ({"outcome": "skipped", "predictions": 0}, "skipped"),
        # Expected to fail on Core ML, evaluated, and another value.
        ({"outcome": "skipped", "predictions": 1}, "failed"),
        ({"outcome": "failed", "unknown": "unknown operation lstm 'lstm_0'"}, "unknown"),
    ],
)
def test_no_wrong_result_is_counted_as_skipped(values: dict[str, Any], expected: str) -> None:
    assert classify(record(**values)) == expected


def test_the_page_says_what_was_not_run() -> None:
    text = page([record(), record(test="iOS14/test_x.py::test[b]", outcome="failed", reason="Not equal")], {
        "iOS14/test_x.py": 3, "iOS15/test_y.py": 1,
    })  # fmt: skip
    assert "**Partial: 2 of 4 cases, in 1 of 2 test files were run**" in text
    assert "No case was run of iOS15/test_y.py." in text
    assert "| `add` | 2 | 1 | 1 |" in text
    assert "- `iOS14/test_x.py::test` (1): Not equal" in text


def test_the_page_in_the_documentation_keeps_its_promise() -> None:
    text = PAGE.read_text(encoding="utf-8")
    share = float(text.partition("of these passed | ")[2].partition("(")[2].partition(" %")[0])
    assert share >= 95


def test_zeros_of_a_reshape_count_from_the_last_dimension() -> None:
    x = np.zeros((2, 50))
    assert OPS["reshape"](x=x, shape=np.array([1, 0, -1, 0])).shape == (1, 1, 2, 50)
    assert OPS["reshape"](x=x, shape=np.array([0, -1])).shape == (2, 50)


def test_resize_takes_the_nearest_element() -> None:
    x = np.array([-6.0, 9.0]).reshape(1, 1, 2, 1)
    shape, mode = np.array([1, 1, 3, 2]), "NEAREST_NEIGHBOR"
    result = OPS["resize"](x=x, shape=shape, resized_dims=2, interpolation_mode=mode, sampling_mode="DEFAULT")
    assert result.reshape(-1).tolist() == [-6, -6, 9, 9, 9, 9]


def test_negative_indices_are_refused_where_the_program_validates() -> None:
    x, indices = np.arange(3.0), np.array([-1])
    assert OPS["gather"](x=x, indices=indices).tolist() == [2]
    with pytest.raises(ContractError, match="gather: index -1 is out of range for 3 elements"):
        OPS["gather"](x=x, indices=indices, validate_indices=True)

"""What a generator is given beside its prompt: checked, and examples of it."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.bundle.contract import InputSpec
from fewstep.errors import ContractError
from fewstep.numerics.inputs import check_inputs, example_inputs

IMAGE = InputSpec("image", "image", (1, 3, 8, 12))
LABEL = InputSpec("label", "class", (1,), 10)
SPECS = (InputSpec("prompt", "text"), IMAGE, LABEL)


def test_types_are_those_of_networks() -> None:
    checked = check_inputs(SPECS, {"image": np.zeros((1, 3, 8, 12)), "label": np.array(3)})
    assert (checked["image"].dtype, checked["image"].shape) == (np.float32, (1, 3, 8, 12))
    assert (checked["label"].dtype, checked["label"].tolist()) == (np.int64, [3])
    assert check_inputs((InputSpec("prompt", "text"),), {}) == {}
    assert check_inputs((InputSpec("label", "class", (1,)),), {"label": np.array([10**6])})["label"].tolist() == [10**6]


@pytest.mark.parametrize(
    ("given", "text", "hint"),
    [
        ({}, "input image is missing, this generator takes image (a picture [1, 3, 8, 12] in [0, 1])", "--input image"),
        ({"image": np.zeros((1, 3, 8, 12))}, "input label is missing", "inputs={'label': array}"),
        ({"labels": np.array([1])}, "unknown input 'labels', this generator takes image", "did you mean 'label'?"),
        ({"prompt": np.array([1])}, "unknown input 'prompt'", "leave it out"),
        ({"image": np.zeros((1, 3, 8, 8)), "label": np.array([1])}, "image is [1, 3, 8, 8], expected", "resize"),
        ({"image": np.zeros((3, 8, 12)), "label": np.array([1])}, "image is [3, 8, 12], expected", "resize"),
        ({"image": np.zeros((1, 3, 8, 12)), "label": np.array([10])}, "label is 10, expected 0 to 9", "from 0"),
        ({"image": np.zeros((1, 3, 8, 12)), "label": np.array([-1])}, "label is -1, expected 0 to 9", "from 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_that_are_refused(given: dict[str, np.ndarray], text: str, hint: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_inputs(SPECS, given)
    assert text in caught.value.message
    assert hint in str(caught.value.hint)


def test_examples_fit_and_differ() -> None:
    first, second, again = (example_inputs(SPECS, i) for i in (0, 1, 0))
    for example in (first, second):
        checked = check_inputs(SPECS, example)
        assert checked["image"].min() > 0
        assert checked["image"].max() < 1
    assert not np.array_equal(first["image"], second["image"])
    assert first["label"] != second["label"]
    np.testing.assert_array_equal(first["image"], again["image"])
    # Smooth, as photographs are: neighbours differ by less than the picture does.
    assert np.abs(np.diff(first["image"])).mean() < 0.5 * first["image"].std()

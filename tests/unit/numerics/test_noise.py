"""The noise is Philox4x32-10 as CUDA lays it out, and every language reads the same vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.numerics.noise import normal, philox4x32

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "vectors" / "noise.json").read_text())[
    "vectors"
]


# The known answers that Random123 1.14 ships in tests/kat_vectors.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        pytest.param("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8", id="zeros"),
        pytest.param("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd", id="ones"),
        pytest.param(
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
            id="digits of pi",
        ),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    counter_N4 = np.array([[int(word, 16) for word in counter.split()]], dtype=np.uint32)
    key_0, key_1 = (int(word, 16) for word in key.split())
    block_N4 = philox4x32(counter_N4, (key_0, key_1))
    assert block_N4.dtype == np.uint32
    assert [f"{word:08x}" for word in block_N4[0]] == expected.split()


def test_normal_is_what_cuda_prints() -> None:
    # torch.manual_seed(0); torch.randn(5, device="cuda"), as printed with four digits.
    assert np.round(normal(0, 0, (5,)), 4).tolist() == pytest.approx([-0.9247, -0.4253, -2.6438, 0.1452, -0.1209])


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"seed {v['seed']} offset {v['offset']} from {v['first']}")
def test_golden_vectors(vector: dict[str, Any]) -> None:
    first, count = vector["first"], len(vector["float32_hex"])
    values = normal(int(vector["seed"]), vector["offset"], (first + count,))[first:]
    expected = np.array([int(text, 16) for text in vector["float32_hex"]], dtype=np.uint32).view(np.float32)
    # Bit for bit but for the last bit: another libm may round log or sin differently (see the module).
    np.testing.assert_array_max_ulp(values, expected, maxulp=1)
    np.testing.assert_array_equal(np.array(vector["decimal"], dtype=np.float32), expected)


def test_golden_vectors_cover_seeds_above_63_bits_and_later_offsets() -> None:
    assert {int(vector["seed"]) for vector in VECTORS} >= {0, 2**32, 2**63 + 5, 2**64 - 1}
    assert {vector["offset"] for vector in VECTORS} >= {0, 1, 2**32 - 1}


def test_moments_and_independence_of_offsets() -> None:
    first, second = normal(3, 0, (200_000,)), normal(3, 1, (200_000,))
    # Standard errors of 200,000 samples: 0.0022 (mean, correlation), 0.0016 (deviation), 0.011 (kurtosis); 4 of them.
    assert abs(first.mean()) < 0.009
    assert abs(first.std() - 1) < 0.0065
    assert abs((first.astype(np.float64) ** 4).mean() - 3) < 0.09
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.009


def test_shape_is_row_major() -> None:
    values_NCHW = normal(9, 2, (1, 2, 3, 4))
    assert values_NCHW.dtype == np.float32
    np.testing.assert_array_equal(values_NCHW.reshape(-1), normal(9, 2, (24,)))
    assert normal(9, 2, (0, 3)).shape == (0, 3)


@given(
    seed=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(0, 64), st.integers(0, 64)),
)
def test_a_longer_array_starts_with_the_shorter(seed: int, offset: int, sizes: tuple[int, int]) -> None:
    short, long = sorted(sizes)
    values = normal(seed, offset, (long,))
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values[:short], normal(seed, offset, (short,)))


@pytest.mark.parametrize("seed", [-1, 2**64], ids=["negative", "65 bits"])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"^seed is {seed}, expected 0 to 2\*\*64 - 1 \(18446744073709551615\)$"):
        normal(seed, 0, (1,))


@pytest.mark.parametrize("offset", [-1, 2**32], ids=["negative", "33 bits"])
def test_offset_out_of_range_is_refused(offset: int) -> None:
    with pytest.raises(ValueError, match=rf"^offset is {offset}, expected 0 to 2\*\*32 - 1 \(4294967295\)$"):
        normal(0, offset, (1,))

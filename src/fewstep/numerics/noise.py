"""Normal noise from a seed: the same numbers in Python, JavaScript, Swift and Kotlin.

Generator: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) and Box-Muller. Layout:
that of `torch.randn(..., device="cuda")` for tensors that one launch of the GPU's threads covers, where element i is
the first normal of subsequence i. CUDA computes in float32; here the arithmetic is float64, rounded to float32 once.
So the two agree to a few float32 steps, and implementations in other languages agree with this one bit for bit, except
where another mathematical library's log or sin differs in the last bit of float64 right at a float32 boundary.

Legend: N counters, 4 words of 32 bits each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_KEY_STEP_0 = 0x9E3779B9
_KEY_STEP_1 = 0xBB67AE85
_ROUNDS = 10
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)

# Offsets of draws beside the initial noise and the one that a step's sampler adds; the steps of any sampler stay below.
EARLY_DRAWS, DRAWS_OF_A_STEP = 1 << 31, 1 << 16


def philox4x32(counter_N4: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Returns the 10-round Philox4x32 block of every counter, uint32 [N, 4].

    Args:
        counter_N4: counters, uint32 [N, 4].
        key: two words of 32 bits.
    """
    word_0, word_1, word_2, word_3 = (counter_N4[:, i].astype(np.uint64) for i in range(4))
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        product_0 = word_0 * _MULTIPLIER_0
        product_1 = word_2 * _MULTIPLIER_1
        word_0 = (product_1 >> _SHIFT_32) ^ word_1 ^ np.uint64(key_0)
        word_1 = product_1 & _LOW_32
        word_2 = (product_0 >> _SHIFT_32) ^ word_3 ^ np.uint64(key_1)
        word_3 = product_0 & _LOW_32
        key_0 = (key_0 + _KEY_STEP_0) & 0xFFFFFFFF
        key_1 = (key_1 + _KEY_STEP_1) & 0xFFFFFFFF
    return np.stack([word_0, word_1, word_2, word_3], axis=1).astype(np.uint32)


def normal(seed: int, offset: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Returns standard normal noise of the given shape, float32, row-major.

    Element i of the flattened array depends on (seed, offset, i) only, so a longer array starts with the shorter one.

    Args:
        seed: 0 to 2**64 - 1.
        offset: which array of the seed's sequence, 0 to 2**32 - 1. A sampler takes 0 for the initial noise and 1 + k
            for the noise of step k.
        shape: shape of the result.

    Raises:
        ValueError: seed or offset is out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0 to 2**64 - 1 (18446744073709551615)")
    if not 0 <= offset < 2**32:
        raise ValueError(f"offset is {offset}, expected 0 to 2**32 - 1 (4294967295)")
    count = math.prod(shape)
    index_N = np.arange(count, dtype=np.uint64)
    counter_N4 = np.zeros((count, 4), dtype=np.uint32)
    counter_N4[:, 0] = offset
    counter_N4[:, 2] = index_N & _LOW_32
    counter_N4[:, 3] = index_N >> _SHIFT_32
    bits_N4 = philox4x32(counter_N4, (seed & 0xFFFFFFFF, seed >> 32))
    # Box-Muller as cuRAND does it: the half step keeps u in (0, 1], so the logarithm is finite.
    u_N = bits_N4[:, 0] * 2.0**-32 + 2.0**-33
    v_N = bits_N4[:, 1] * (2.0 * math.pi * 2.0**-32) + 2.0 * math.pi * 2.0**-33
    normal_N = np.sqrt(-2.0 * np.log(u_N)) * np.sin(v_N)
    return np.asarray(normal_N, dtype=np.float32).reshape(shape)


def rows(seeds: Sequence[int], offset: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Returns the noise of a batch, float32: each seed's draw of an offset, one after the other in dimension 0.

    Args:
        seeds: of the samples of the batch.
        offset: see `normal`.
        shape: of the whole; its first dimension is a multiple of the number of seeds.
    """
    own = (shape[0] // len(seeds), *shape[1:])
    return np.concatenate([normal(seed, offset, own) for seed in seeds])


def draw_offset(k: int, number: int) -> int:
    """Returns the offset of a further draw before network call k, numbered from 1."""
    return EARLY_DRAWS + DRAWS_OF_A_STEP * k + number - 1

"""Inputs for runtimes whose interface has no 64-bit whole numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fewstep.errors import ContractError
from fewstep.runtimes.base import Array


def narrow(feeds: Mapping[str, Array], runtime: str) -> dict[str, Array]:
    """Returns inputs with whole numbers of 64 bits in 32, and the others as they are.

    Raises:
        ContractError: a whole number does not fit in 32 bits.
    """
    found = {}
    for name, array in feeds.items():
        if array.dtype == np.int64:
            if array.size and np.abs(array).max() > np.iinfo(np.int32).max:
                raise ContractError(
                    f"{name} has {np.abs(array).max()}, beyond {runtime}'s int32", hint="check the inputs"
                )
            array = array.astype(np.int32)
        found[name] = array
    return found

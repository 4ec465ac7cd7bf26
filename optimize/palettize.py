"""Palettes: weights that take few values, so that Core ML stores an index of a few bits for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fewstep.export.generator import Generator
from fewstep.optimize.passes import PassNote, check_in_memory, copies
from fewstep.recipe.recipe import PALETTE_BITS

Array = npt.NDArray[np.float64]

# A look-up table of 2^bits halves must be small beside the weights that share it.
GROUPS: Mapping[int, int | None] = {8: None, 6: 32, 4: 16, 3: 16, 2: 16, 1: 16}
# Smaller weights gain nothing: their table is as large as they are.
SMALLEST = 1024
_ITERATIONS = 60


@dataclass(frozen=True)
class Palettize:
    """Replaces every large weight's values by those of palettes, found by k-means, in fp16.

    Rows (output channels) share a palette in groups, see `GROUPS`. The network stays a float network whose weights
    happen to take few values: lowering stores them without loss, and is compared with this network.

    Attributes:
        bits: 1, 2, 3, 4, 6 or 8, by parameter name where ``choices`` has one.
        choices: bits of single parameters, ``component/parameter``.
        keep_zeros: leave zeros as they are, and share one palette in each weight: what a sparse weight is stored with.
    """

    bits: int
    choices: Mapping[str, int] | None = None
    keep_zeros: bool = False

    def __call__(self, generator: Generator) -> tuple[Generator, PassNote]:
        """Returns a generator with palettized copies of its modules, and how many weights changed.

        Raises:
            ExportError: the generator's weights are not in memory.
        """
        check_in_memory(generator, "palettes need all values of a weight")
        modules = copies(generator)
        changed = 0
        for component, module in modules.items():
            for name, parameter in module.named_parameters():
                if not worth_a_palette(parameter):
                    continue
                bits = (self.choices or {}).get(f"{component}/{name}", self.bits)
                weight = parameter.detach().double().numpy()
                values = of_nonzero(weight, bits) if self.keep_zeros else palettized(weight, bits)
                parameter.data.copy_(torch.from_numpy(values))
                changed += 1
        return generator.with_modules(modules), PassNote(self._name(), changed > 0, f"{changed} weights")

    def _name(self) -> str:
        return f"palettes of {self.bits} bits" if self.choices is None else "palettes of mixed bits"


def worth_a_palette(weight: torch.Tensor) -> bool:
    """Returns whether a weight is large enough that indices into a palette are smaller than its values."""
    return weight.ndim >= 2 and weight.numel() >= SMALLEST and weight.dtype == torch.float32


def palettized(weight: Array, bits: int, group: int | None = -1) -> Array:
    """Returns a weight whose every group of rows takes at most 2^bits values, all of them halves.

    Args:
        weight: [rows, ...].
        bits: of an index.
        group: rows that share a palette; None for all of them, -1 for what `GROUPS` says.
    """
    if bits not in PALETTE_BITS:
        raise ValueError(f"palettes have {', '.join(map(str, PALETTE_BITS))} bits, not {bits}")
    rows = GROUPS[bits] if group == -1 else group
    result = np.empty_like(weight)
    for at in row_groups(len(weight), rows):
        values = weight[at].reshape(-1)
        palette = np.unique(kmeans(values, 1 << bits).astype(np.float16).astype(np.float64))
        result[at] = palette[_nearest(values, palette)].reshape(weight[at].shape)
    return result


def of_nonzero(weight: Array, bits: int) -> Array:
    """Returns a weight whose values other than zero take at most 2^bits values, all of them halves."""
    result = weight.copy()
    places = weight != 0
    if places.any():
        result[places] = palettized(weight[places][:, None], bits, None)[:, 0]
    return result


def row_groups(rows: int, size: int | None) -> list[slice]:
    """Returns the groups of rows that share a palette: equal, the largest divisor of the rows up to ``size``."""
    size = rows if size is None else next(n for n in range(min(size, rows), 0, -1) if rows % n == 0)
    return [slice(start, start + size) for start in range(0, rows, size)]


def kmeans(values: Array, count: int) -> Array:
    """Returns at most ``count`` numbers near which the values lie, ascending: Lloyd's algorithm in one dimension.

    It starts from equal shares of the sorted values and of their range, and so is the same on each run.
    """
    ordered = np.sort(values)
    known = np.unique(ordered)
    if len(known) <= count:
        return known
    # Half of the centres where the values are dense, half evenly over the range: outliers have theirs from the start.
    dense = np.quantile(ordered, (np.arange(count - count // 2) + 0.5) / (count - count // 2))
    centres = np.unique(np.concatenate([dense, np.linspace(ordered[0], ordered[-1], count // 2)]))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    for _ in range(_ITERATIONS):
        cuts = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        bounds = np.concatenate([[0], cuts, [len(ordered)]])
        sizes = np.diff(bounds)
        means = np.diff(sums[bounds])[sizes > 0] / sizes[sizes > 0]
        if len(means) == len(centres) and np.allclose(means, centres, rtol=1e-7, atol=0):
            break
        centres = means
    return centres


def _nearest(values: Array, palette: Array) -> npt.NDArray[np.int64]:
    return np.searchsorted((palette[1:] + palette[:-1]) / 2, values).astype(np.int64)

"""What a layer's inputs say about which errors of its weight matter: their second moments, gathered call by call.

Legend: O output channels, I inputs of each (a convolution's in_channels / groups x kernel), K groups of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fewstep.calibration.observe import Calls, watch
from fewstep.errors import CalibrationError

# Patches of a convolution's input that are held at once, in numbers.
_PATCH_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Layer:
    """How a layer applies its weight: a linear one if ``kernel`` is empty, else a convolution padded with zeros."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, module: torch.nn.Module) -> Layer:
        """Returns the layer of a linear module or a 1- or 2-dimensional convolution.

        Raises:
            CalibrationError: it is neither, or padded otherwise than with a number of zeros.
        """
        if isinstance(module, torch.nn.Linear):
            return cls()
        if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d)):
            padding = module.padding
            if module.padding_mode == "zeros" and not isinstance(padding, str):
                return cls(module.kernel_size, module.stride, padding, module.dilation, module.groups)
        raise CalibrationError(f"{type(module).__name__} is no linear layer or convolution padded with zeros")

    def rows(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields what each output is a sum over, [K, n, I]: the layer is x_rows @ weight.reshape(K, O / K, I)^T."""
        if not self.kernel:
            yield x.reshape(1, -1, x.shape[-1])
            return
        if len(self.kernel) == 1:
            flat = Layer((1, *self.kernel), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups)
            yield from flat.rows(x[:, :, None])
            return
        down, across = self.padding
        x = torch.nn.functional.pad(x, (across, across, down, down))
        reach = self.dilation[0] * (self.kernel[0] - 1) + 1
        lines = (x.shape[2] - reach) // self.stride[0] + 1
        numbers = x.shape[0] * x.shape[1] * self.kernel[0] * self.kernel[1] * (x.shape[3] // self.stride[1] + 1)
        step = max(1, _PATCH_NUMBERS // numbers)
        for first in range(0, lines, step):
            top, count = first * self.stride[0], min(step, lines - first)
            part = x[:, :, top : top + (count - 1) * self.stride[0] + reach]
            patches = torch.nn.functional.unfold(part, self.kernel, self.dilation, stride=self.stride)
            n, features, places = patches.shape
            grouped = patches.reshape(n, self.groups, features // self.groups, places)
            yield grouped.permute(1, 0, 3, 2).reshape(self.groups, n * places, features // self.groups)


class HessianAccumulator:
    """Mean of x x^T over everything that a layer's outputs are sums over.

    Half the Hessian of the mean square error of the layer's output, the same for each output channel of a group.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, x: torch.Tensor) -> None:
        """Takes in one input of the layer."""
        for rows in self._layer.rows(x.detach().float()):
            product = rows.transpose(1, 2) @ rows
            self._sum = product if self._sum is None else self._sum.add_(product)
            self._count += rows.shape[1]

    def result(self) -> torch.Tensor:
        """Returns the mean, float32 [K, I, I].

        Raises:
            CalibrationError: nothing was added, or numbers that are not finite were.
        """
        if self._sum is None:
            raise CalibrationError("a layer has no inputs to round its weight for, expected at least one call")
        if not torch.isfinite(self._sum).all():
            raise CalibrationError("the inputs of a layer are not finite, or their squares are not, expected numbers")
        return self._sum / self._count


def hessians(
    graph: torch.fx.GraphModule, layers: Mapping[str, tuple[Layer, str]], calls: Calls
) -> dict[str, torch.Tensor]:
    """Returns the Hessian of each layer of a graph, running it once over all calls.

    Args:
        graph: takes the inputs of a call in order.
        layers: name -> (layer, name of the node that is its input). All their Hessians are in memory together.
        calls: as `fewstep.calibration.observe.observe` takes them.

    Raises:
        CalibrationError: there are no calls, or an input is not finite.
    """
    sums = {name: HessianAccumulator(layer) for name, (layer, _) in layers.items()}
    add: Callable[[str, int, torch.Tensor], None] = lambda name, _, x: sums[name].add(x)  # noqa: E731 - typed
    watch(graph, {name: node for name, (_, node) in layers.items()}, calls, add)
    return {name: total.result() for name, total in sums.items()}

"""A generator whose weights stay in their files: described without values, run with one or two networks in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.export.record.replace_tensors import replace_tensors
from fewstep.export.source.lazy_weights import StoredWeights, load_module, stored_weights
from fewstep.export.source.tiled_decoder import copy_tiling
from fewstep.export.trace.fake_tensors import fake_arguments, with_fake_parameters
from fewstep.numerics import noise

if TYPE_CHECKING:
    from fewstep.export.generator import Generator
    from fewstep.export.record.intercept import Stub

# A text encoder beside the denoiser; the decoder when the loop is over.
_IN_MEMORY = 2
_SHAPES_SEED = 1 << 41


class StoredNetworks:
    """The networks of a diffusers folder; ``halves`` rounds their weights to fp16 values as they are read.

    ``variant`` is which of its files: see `fewstep.export.source.safetensors_index.variant_of`.
    """

    def __init__(self, folder: Path, *, halves: bool = False, variant: str | None = None) -> None:
        self.folder = folder
        self.variant = variant
        self.halves = halves
        self._loaded: OrderedDict[str, torch.nn.Module] = OrderedDict()

    def rounded(self) -> StoredNetworks:
        """Returns the same networks with weights rounded to fp16 values."""
        return StoredNetworks(self.folder, halves=True, variant=self.variant)

    def weights(self, attribute: str, module: torch.nn.Module) -> StoredWeights:
        """Returns the values of a network by name, as they are in its files."""
        return stored_weights(module, self.folder / attribute, self.variant)

    def module(self, attribute: str, like: torch.nn.Module) -> torch.nn.Module:
        """Returns a network with its values in fp32; the one that was not used for longest makes room for it.

        Args:
            attribute: of the pipeline.
            like: the network without its values.
        """
        if attribute in self._loaded:
            self._loaded.move_to_end(attribute)
            copy_tiling(like, self._loaded[attribute])
            return self._loaded[attribute]
        while len(self._loaded) >= _IN_MEMORY:
            self._loaded.popitem(last=False)
        module = load_module(self.folder / attribute, type(like), self.variant)
        if self.halves:
            for parameter in module.parameters():
                parameter.data = parameter.data.half().float()
        copy_tiling(like, module)
        self._loaded[attribute] = module
        return module

    def loaded(self, generator: Generator) -> dict[str, Stub]:
        """Returns what runs each component of a generator with its values."""

        def stub(component: str) -> Stub:
            part = generator.parts[component]
            like = generator.module(component)
            return lambda _, arguments: getattr(self.module(part.attribute, like), part.method)(**arguments)

        return {component: stub(component) for component in generator.parts}


def shape_stand_ins(generator: Generator) -> dict[str, Stub]:
    """Returns what stands for each component of a generator: random results of the right shapes."""

    def stub(component: str) -> Stub:
        method = generator.parts[component].method
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        # Copied here, before anybody listens to the module itself.
        copied = with_fake_parameters(generator.module(component), mode)

        def result(number: int, arguments: Any) -> Any:
            with mode:
                shapes = getattr(copied, method)(**fake_arguments(arguments, mode))
            return replace_tensors(shapes, lambda tensor: _random(tensor, number))

        return result

    return {component: stub(component) for component in generator.parts}


def _random(tensor: torch.Tensor, number: int) -> torch.Tensor:
    if not tensor.dtype.is_floating_point:
        return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype)
    return torch.from_numpy(noise.normal(_SHAPES_SEED, number, tuple(tensor.shape))).to(tensor.dtype)


@contextmanager
def on_the_cpu(pipeline: Any) -> Iterator[None]:
    """Returns a context in which a pipeline whose networks have no values works on the CPU all the same."""
    cpu = property(lambda _: torch.device("cpu"))
    networks = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    with ExitStack() as stack:
        for cls in dict.fromkeys(type(owner) for owner in (pipeline, *networks)):
            for name in ("device", "_execution_device"):
                if hasattr(cls, name):
                    stack.enter_context(mock.patch.object(cls, name, cpu))
        yield

"""One traced component: what `fewstep.export` makes and what every runtime compiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from fewstep.bundle.contract import ComponentSpec, OutputSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Program:
    """A component as ``torch.export`` sees it. Inputs and outputs are flat and in the order of ``spec``."""

    component: str
    folder: str
    """Folder name that ONNX Runtime users of diffusers models expect (``unet``, ``vae_decoder``, ...)."""
    exported: torch.export.ExportedProgram
    spec: ComponentSpec
    weights: Mapping[str, torch.Tensor] | None = None
    """Where the values of ``exported`` are read from, by name, if its parameters are fake."""
    variant: str = ""
    """Which of the component's graphs this is, see `fewstep.bundle.manifest.Artifact`."""
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]] = ()
    """Recorded inputs, for backends that choose a precision by what they see; may be empty."""
    picture: OutputSpec | None = None
    """How the output becomes a picture, for backends that are to give an image of 8 bits instead of an array."""

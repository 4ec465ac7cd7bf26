"""Holds the golden pack of a bundle against its manifest when the bundle is opened, by the headers of its files alone.

It is what bounds a manifest's sizes: a tensor of a network is as large as what was recorded of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from fewstep.bundle.contract import TensorSpec
from fewstep.bundle.manifest import Manifest
from fewstep.bundle.samples import Header, read_header
from fewstep.errors import BundleError

GOLDEN = "golden"
# Values of a tensor that is made before any network has seen it, where no recorded one says that it is larger.
_UNRECORDED = 1 << 21
_REBUILD = "build the bundle again; golden packs are not edited"


def golden_paths(manifest: Manifest, shape: str = "") -> list[str]:
    """Returns the listed files of the golden pack in order: of one of the further shapes, or of the first."""
    folder = PurePosixPath(GOLDEN) / shape
    return sorted(
        path
        for path in manifest.files
        if PurePosixPath(path).parent == folder and PurePosixPath(path).suffix == ".safetensors"
    )


def check_golden(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError unless every golden sample is one that the manifest's components could have computed."""
    recorded = 0
    for shape in ("", *manifest.shapes):
        at = manifest.shaped(shape) if shape else manifest
        for path in golden_paths(manifest, shape):
            header = read_header(folder / path)
            _check_sample(f"{folder}: {path}", header, at)
            recorded += 1
    if not recorded:
        _check_unrecorded(folder, manifest)


def _check_sample(where: str, header: Header, manifest: Manifest) -> None:
    """Raises BundleError unless the tensors of a sample have the types and shapes of the manifest."""
    head, contract = header.head, manifest.contract
    if head["steps"] not in manifest.schedules:
        raise BundleError(f"{where} has {head['steps']} steps, which the manifest has no schedule for", hint=_REBUILD)
    latent = TensorSpec("latent", "float32", (1, *contract.latent_shape))
    for k in range(manifest.schedules[head["steps"]].steps):
        _check_tensor(where, header, f"latents/{k}", latent)
    for i, call in enumerate(head["calls"]):
        spec = manifest.components.get(call["component"])
        if spec is None:
            raise BundleError(f"{where} calls {call['component']!r}, which is no component", hint=_REBUILD)
        for kind, specs in (("in", spec.inputs), ("out", spec.outputs)):
            for tensor in specs:
                _check_tensor(where, header, f"feeds/{i}/{kind}/{tensor.name}", tensor)
    if "output" not in header.tensors:
        raise BundleError(f"{where} has no output", hint=_REBUILD)


def _check_tensor(where: str, header: Header, name: str, spec: TensorSpec) -> None:
    found = header.tensors.get(name)
    if found != (spec.dtype, spec.shape):
        what = "is missing" if found is None else f"is {found[0]} {list(found[1])}"
        raise BundleError(f"{where}: {name} {what}, the manifest says {spec.dtype} {list(spec.shape)}", hint=_REBUILD)


def _check_unrecorded(folder: Path, manifest: Manifest) -> None:
    for shape in ("", *manifest.shapes):
        at = manifest.shaped(shape) if shape else manifest
        sizes: Mapping[str, tuple[int, ...]] = {
            "the latent": at.contract.latent_shape,
            **{f"{name}.{t.name}": t.shape for name, spec in at.components.items() for t in spec.inputs},
        }
        for name, sides in sizes.items():
            if math.prod(sides) > _UNRECORDED:
                raise BundleError(
                    f"{folder}: {name} has {math.prod(sides)} values, and the bundle has no golden sample of that size",
                    hint=_REBUILD,
                )

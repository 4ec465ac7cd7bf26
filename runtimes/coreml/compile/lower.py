"""Lowers a traced component to a Core ML package (``.mlpackage``) with coremltools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fewstep.bundle.contract import OutputSpec, TensorSpec
from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.errors import ExportError
from fewstep.runtimes.coreml.compile.decompositions import decomposed
from fewstep.runtimes.coreml.compile.mixed_precision import choose_fp32_operations
from fewstep.runtimes.coreml.image_outputs import LAYOUTS, METADATA, to_metadata
from fewstep.runtimes.coreml.runtime import ENTRY, NAME, interface_name
from fewstep.runtimes.passes.materialize import materialized

if TYPE_CHECKING:
    from coremltools.models import MLModel

# What Apple's StableDiffusion package for Swift calls its resources.
PACKAGE_NAMES = {
    "text_encoder": "TextEncoder",
    "text_encoder_2": "TextEncoder2",
    "text_encoder_3": "TextEncoderT5",
    "unet": "Unet",
    "transformer": "MultiModalDiffusionTransformer",
    "vae_decoder": "VAEDecoder",
    "vae_encoder": "VAEEncoder",
}
# Where a package has its model and its weights.
MODEL, WEIGHTS = Path("Data/com.apple.CoreML/model.mlmodel"), Path("Data/com.apple.CoreML/weights/weight.bin")
TARGETS = ("iOS17", "iOS18")
DEFAULT_TARGET = "iOS18"
# What coremltools puts beside the model for ExecuTorch's debugger: as large as the graph, and no device reads it.
_DEBUG_MAPPING = "executorch_debug_handle_mapping.json"
# By name: torchao registers them, and is not there without quantization.
_PER_TENSOR = tuple(f"quantized_decomposed.{name}_per_tensor.default" for name in ("quantize", "dequantize"))


def lower(
    program: Program,
    folder: Path,
    weights: str,
    *,
    target: str = DEFAULT_TARGET,
    fp32_operations: frozenset[str] | None = None,
) -> Artifact:
    """Returns the artifact of a component, written as ``<folder>/<Name>.mlpackage``.

    Args:
        program: the traced component, float or quantized (PT2E). One with a picture gives an image.
        folder: the bundle's ``coreml`` folder.
        weights: ``fp32`` computes in fp32. All else computes in fp16, with those operations in fp32 that
            `choose_fp32_operations` names.
        target: the oldest system that the package is for, one of `TARGETS`.
        fp32_operations: what `fp32_operations_of` returned for the program; None asks it.

    Raises:
        ExportError: the component has an op that cannot be lowered, a value that fp16 cannot hold, or an output that is
            no picture where there should be one.
    """
    compute = "fp32" if weights == "fp32" else "fp16"
    _check_picture(program)
    keep = fp32_operations_of(program, weights, target=target) if fp32_operations is None else fp32_operations
    model = convert(program, compute, target=target, fp32_operations=keep, picture=program.picture)
    path = folder / f"{package_name(program.folder)}.mlpackage"
    save(model, path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Artifact(NAME, program.component, f"{path.name}/{ENTRY}", weights, compute, size, program.variant)


def fp32_operations_of(
    program: Program, weights: str, *, target: str = DEFAULT_TARGET, known: frozenset[str] | None = None
) -> frozenset[str]:
    """Returns the operations of a component that stay in fp32 where `lower` computes in fp16.

    ``known`` is what was found for another graph of it, from which the search goes on.
    """
    if weights == "fp32":
        return frozenset()

    def variant(kept: frozenset[str] | None) -> MLModel:
        if kept is None:
            return convert(program, "fp32", target=target)
        return convert(program, "fp16", target=target, fp32_operations=kept)

    return choose_fp32_operations(program, variant, known)


def _check_names(program: Program) -> None:
    """Refuses two tensors that Core ML would call the same.

    Raises:
        ExportError: there are such.
    """
    taken: dict[str, str] = {}
    for spec in (*program.spec.inputs, *program.spec.outputs):
        name = interface_name(spec.name)
        if taken.setdefault(name, spec.name) != spec.name:
            raise ExportError(
                f"{program.component}: {taken[name]} and {spec.name} would both be {name} on Core ML",
                hint="rename one of them in the network",
            )


def _check_grids(program: Program) -> None:
    """Refuses grids that Core ML cannot hold: scales that are no halves, and integers of more than 8 bits.

    Raises:
        ExportError: there is one.
    """
    for node in program.exported.graph.nodes:
        if str(node.target) not in _PER_TENSOR:
            continue
        scale, dtype = node.args[1], node.args[5]
        if float(np.float16(scale)) != scale or dtype not in (torch.int8, torch.uint8):
            raise ExportError(
                f"{program.component}: {node.name} has {dtype} and the scale {scale:.8g}, expected 8 bits and a half",
                hint="plan for Core ML: leave the profile out of the recipe, or write profile = 'ane'",
            )


def _check_picture(program: Program) -> None:
    """Refuses a program whose output should be an image and cannot be one.

    Raises:
        ExportError: it is not one tensor of a picture in grey or in colour.
    """
    if program.picture is None:
        return
    outputs = program.spec.outputs
    shapes = [list(output.shape) for output in outputs]
    if len(outputs) != 1 or len(shapes[0]) != 4 or shapes[0][0] != 1 or shapes[0][1] not in LAYOUTS:
        raise ExportError(
            f"{program.component} gives {shapes}, expected one picture [1, 1 or 3, height, width]",
            hint="build without image_output",
        )


def package_name(folder: str) -> str:
    """Returns the name of a component's package: Apple's where there is one, else the folder's in camel case."""
    return PACKAGE_NAMES.get(folder) or "".join(part.capitalize() for part in folder.split("_"))


def convert(
    program: Program,
    compute: str,
    *,
    target: str = DEFAULT_TARGET,
    fp32_operations: Collection[str] = (),
    picture: OutputSpec | None = None,
) -> MLModel:
    """Returns the converted model of a component, not loaded.

    Args:
        program: the traced component.
        compute: ``fp32`` or ``fp16``.
        target: one of `TARGETS`.
        fp32_operations: operations that stay in fp32, by the name of their first output.
        picture: how the output becomes an image; None leaves it an array.

    Raises:
        ExportError: the component has an op that coremltools cannot convert, or what Core ML cannot hold.
    """
    if target not in TARGETS:
        raise ExportError(f"unknown Core ML target {target!r}, expected one of {', '.join(TARGETS)}", hint="use iOS18")
    _check_names(program)
    _check_grids(program)
    with quiet_coremltools() as ct, materialized(program):
        names = frozenset(fp32_operations)
        precision: Any = ct.precision.FLOAT32
        if compute == "fp16":
            precision = ct.transform.FP16ComputePrecision(op_selector=lambda op: op.outputs[0].name not in names)
        try:
            model = ct.convert(
                decomposed(program),
                source="pytorch",
                inputs=[_tensor_type(ct, spec) for spec in program.spec.inputs],
                outputs=[_output_type(ct, spec, picture) for spec in program.spec.outputs],
                minimum_deployment_target=getattr(ct.target, target),
                compute_precision=precision,
                pass_pipeline=_pipeline(ct, target, picture),
                skip_model_load=True,
            )
        except Exception as error:  # coremltools raises whatever its translation of an op happens to raise
            first = str(error).strip().split("\n", 1)[0]
            raise ExportError(
                f"{program.component} cannot be lowered to Core ML ({target}): {type(error).__name__}: {first}",
                hint="the op that stops it is named above; rewrite it in the module, or report it",
            ) from error
    if picture is not None:
        model.user_defined_metadata[METADATA] = to_metadata(picture)
    return model


def save(model: MLModel, path: Path) -> None:
    """Writes a package whose bytes are the same each time that the same model is written."""
    with quiet_coremltools():
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(str(path))
    # Entries of protobuf's maps, such as functions and attributes, come in any order otherwise.
    (path / MODEL).write_bytes(model.get_spec().SerializeToString(deterministic=True))
    (path / _DEBUG_MAPPING).unlink(missing_ok=True)
    manifest_path = path / ENTRY
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    entries = manifest["itemInfoEntries"]
    names = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper() for old, entry in entries.items()}
    manifest["itemInfoEntries"] = {
        names[old]: entries[old] for old in sorted(entries, key=lambda k: entries[k]["path"])
    }
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    manifest_path.write_text(json.dumps(manifest, indent=4), encoding="utf-8")


@contextlib.contextmanager
def quiet_coremltools() -> Iterator[Any]:
    """Yields coremltools, without what it says of itself: versions, progress bars and missing native libraries."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    root = logging.root.level
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            import coremltools

            logger.setLevel(logging.ERROR)
            yield coremltools
    finally:
        logger.setLevel(level)
        logging.root.setLevel(root)


def _pipeline(ct: Any, target: str, picture: OutputSpec | None) -> Any:
    """Returns coremltools' own passes, then ours: exact norms, the picture, and the smallest weights (iOS 18)."""
    # They register the passes, and import coremltools, which talks.
    from fewstep.runtimes.coreml.compile import mil_pass_batch_norm as coreml_norms
    from fewstep.runtimes.coreml.compile import mil_pass_compress as coreml_pack
    from fewstep.runtimes.coreml.compile import mil_pass_image_output as coreml_picture_pass
    from fewstep.runtimes.coreml.compile import mil_pass_int_weights as coreml_pack_integers

    pipeline = ct.PassPipeline()
    pipeline.append_pass(coreml_norms.PASS)
    if picture is not None:
        pipeline.append_pass(coreml_picture_pass.PASS)
        pipeline.set_options(coreml_picture_pass.PASS, {"scale": repr(picture.scale), "shift": repr(picture.shift)})
    if target != "iOS17":
        pipeline.append_pass(coreml_pack_integers.PASS)
        pipeline.append_pass(coreml_pack.PASS)
    return pipeline


def _interface(spec: TensorSpec) -> Any:
    """Returns the type that a tensor has at a package's interface."""
    return np.int32 if spec.dtype in ("int64", "int32", "bool") else np.dtype(spec.dtype).type


def _tensor_type(ct: Any, spec: TensorSpec) -> Any:
    return ct.TensorType(name=interface_name(spec.name), shape=spec.shape or (1,), dtype=_interface(spec))


def _output_type(ct: Any, spec: TensorSpec, picture: OutputSpec | None) -> Any:
    if picture is None:
        return ct.TensorType(name=interface_name(spec.name), dtype=_interface(spec))
    layout = getattr(ct.colorlayout, LAYOUTS[spec.shape[1]])
    return ct.ImageType(name=interface_name(spec.name), color_layout=layout)

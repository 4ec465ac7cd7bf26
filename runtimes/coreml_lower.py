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

from fewstep.errors import ExportError
from fewstep.manifest import Artifact, TensorSpec
from fewstep.program import Program
from fewstep.runtimes.coreml import ENTRY, NAME
from fewstep.runtimes.coreml_precision import choose_fp32_operations
from fewstep.runtimes.materialize import materialized

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
TARGETS = ("iOS17", "iOS18")
_DEFAULT_TARGET = "iOS18"


def lower(program: Program, folder: Path, weights: str, *, target: str = _DEFAULT_TARGET) -> Artifact:
    """Returns the artifact of a component, written as ``<folder>/<Name>.mlpackage``.

    Args:
        program: the traced component, float or quantized (PT2E).
        folder: the bundle's ``coreml`` folder.
        weights: ``fp32`` computes in fp32. All else computes in fp16, with those operations in fp32 that
            `choose_fp32_operations` names.
        target: the oldest system that the package is for, one of `TARGETS`.

    Raises:
        ExportError: the component has an op that cannot be lowered, or a value that fp16 cannot hold.
    """
    compute = "fp32" if weights == "fp32" else "fp16"
    keep: frozenset[str] = frozenset()
    if compute == "fp16":

        def variant(kept: frozenset[str] | None) -> MLModel:
            if kept is None:
                return convert(program, "fp32", target=target)
            return convert(program, "fp16", target=target, fp32_operations=kept)

        keep = choose_fp32_operations(program, variant)
    model = convert(program, compute, target=target, fp32_operations=keep)
    path = folder / f"{package_name(program.folder)}.mlpackage"
    save(model, path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Artifact(NAME, program.component, f"{path.name}/{ENTRY}", weights, compute, size, program.variant)


def package_name(folder: str) -> str:
    """Returns the name of a component's package: Apple's where there is one, else the folder's in camel case."""
    return PACKAGE_NAMES.get(folder) or "".join(part.capitalize() for part in folder.split("_"))


def convert(
    program: Program,
    compute: str,
    *,
    target: str = _DEFAULT_TARGET,
    fp32_operations: Collection[str] = (),
) -> MLModel:
    """Returns the converted model of a component, not loaded.

    Args:
        program: the traced component.
        compute: ``fp32`` or ``fp16``.
        target: one of `TARGETS`.
        fp32_operations: operations that stay in fp32, by the name of their first output.

    Raises:
        ExportError: the component has an op that coremltools cannot convert.
    """
    if target not in TARGETS:
        raise ExportError(f"unknown Core ML target {target!r}, expected one of {', '.join(TARGETS)}", hint="use iOS18")
    with quiet_coremltools() as ct, materialized(program):
        names = frozenset(fp32_operations)
        precision: Any = ct.precision.FLOAT32
        if compute == "fp16":
            precision = ct.transform.FP16ComputePrecision(op_selector=lambda op: op.outputs[0].name not in names)
        try:
            return ct.convert(
                decomposed(program),
                source="pytorch",
                inputs=[_tensor_type(ct, spec) for spec in program.spec.inputs],
                outputs=[ct.TensorType(name=spec.name, dtype=_interface(spec)) for spec in program.spec.outputs],
                minimum_deployment_target=getattr(ct.target, target),
                compute_precision=precision,
                pass_pipeline=_pipeline(ct, target),
                skip_model_load=True,
            )
        except Exception as error:  # coremltools raises whatever its translation of an op happens to raise
            first = str(error).strip().split("\n", 1)[0]
            raise ExportError(
                f"{program.component} cannot be lowered to Core ML ({target}): {type(error).__name__}: {first}",
                hint="the op that stops it is named above; rewrite it in the module, or report it",
            ) from error


def save(model: MLModel, path: Path) -> None:
    """Writes a package, with identifiers that are the same each time that the same model is written."""
    with quiet_coremltools():
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(str(path))
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


def _pipeline(ct: Any, target: str) -> Any:
    """Returns coremltools' own passes, then the one that stores weights in their smallest form (iOS 18)."""
    pipeline = ct.PassPipeline()
    if target != "iOS17":
        from fewstep.runtimes import coreml_pack  # registers the pass, and imports coremltools, which talks

        pipeline.append_pass(coreml_pack.PASS)
    return pipeline


def _interface(spec: TensorSpec) -> Any:
    """Returns the type that a tensor has at a package's interface."""
    return np.int32 if spec.dtype in ("int64", "int32", "bool") else np.dtype(spec.dtype).type


def _tensor_type(ct: Any, spec: TensorSpec) -> Any:
    return ct.TensorType(name=spec.name, shape=spec.shape or (1,), dtype=_interface(spec))


def decomposed(program: Program) -> torch.export.ExportedProgram:
    """Returns the program in core ATen, without the nodes that coremltools has no translation for and needs none."""
    result: torch.export.ExportedProgram = program.exported.run_decompositions({})
    for node in list(result.graph.nodes):
        if node.target in (torch.ops.aten.alias.default, torch.ops.aten.alias_copy.default):
            node.replace_all_uses_with(node.args[0])
            result.graph.erase_node(node)
    result.graph_module.recompile()
    return result

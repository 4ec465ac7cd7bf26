"""Makes the generators of the rows: bundles by fewstep, and copies of the fp32 bundle with a peer's models in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quant import environments
from benchmarks.quant.rows import Method
from fewstep.bundle.bundle import Bundle, write_manifest, writing
from fewstep.errors import ContractError

PEERS = Path(__file__).parent / "peers"
RUNTIME = "onnxruntime"


def quantize(method: Method, component: str, model: Path, calls: Path, out: Path) -> dict[str, Any]:
    """Writes a component's model as a peer quantizes it, and returns its size and how long that took.

    The peer is given a copy of the model, in one file: ModelOpt 0.47 saves its input again, in place.

    Raises:
        ContractError: the peer's script failed, or wrote no model.
    """
    python = environments.ensure(method.environment)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="fewstep-peer-") as folder:
        own = Path(folder, "model.onnx")
        _copy_whole(model, own)
        job = {
            "model": str(own),
            "calls": str(calls.resolve()),
            "out": str(Path(folder, "out", out.name)),
            "options": dict(method.options),
        }
        Path(folder, "out").mkdir()
        Path(folder, "job.json").write_text(json.dumps(job))
        started = time.perf_counter()
        done = subprocess.run(
            [str(python), str((PEERS / f"{method.script}.py").resolve()), "job.json"],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise ContractError(f"{method.name} cannot quantize the {component}: {lines[-1][:300]}")
        shutil.copytree(Path(folder, "out"), out.parent, dirs_exist_ok=True)
    return {"bytes": out.stat().st_size, "seconds": round(seconds, 1)}


def _copy_whole(model: Path, copy: Path) -> None:
    """Copies a model into one file."""
    if not _weights_of(model).is_file():
        shutil.copy(model, copy)
        return
    import onnx

    onnx.save(onnx.load(model), copy)


def _weights_of(model: Path) -> Path:
    """Returns where a model's weights are, if they are not in its own file."""
    return model.with_name(f"{model.name}.data")


def networks(bundle: Bundle) -> dict[str, str]:
    """Returns the hash of every file that a bundle's runtime reads."""
    files = bundle.manifest.files
    return {path: entry.sha256[:16] for path, entry in sorted(files.items()) if "/model.onnx" in path}


def assemble(reference: Bundle, models: Mapping[str, Path], out: Path, recipe: str) -> Bundle:
    """Returns a bundle that is the reference with some components' models replaced."""
    manifest = reference.manifest
    with writing(out) as folder:
        shutil.copytree(reference.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("report", "golden"))
        artifacts = []
        for artifact in manifest.artifacts:
            model = models.get(artifact.component)
            if model is not None:
                shutil.copy(model, folder / artifact.path)
                _weights_of(folder / artifact.path).unlink(missing_ok=True)  # the reference's
                artifact = replace(artifact, weights="int8", compute="int8", bytes=model.stat().st_size)
            artifacts.append(artifact)
        changed = replace(manifest, artifacts=tuple(artifacts), recipe={**manifest.recipe, "name": recipe}, parity=None)
        write_manifest(folder, changed)
    return Bundle.open(out)


def build_recipe(recipe: str, out: str, form: str | None = "step") -> dict[str, Any]:
    """Returns the seconds of building the built-in generator with one of fewstep's recipes; the bundle is at ``out``.

    In step form, unless told otherwise: its networks take what the peers' do, and calls recorded for one fit all.

    Raises:
        FewstepError: there is no such recipe, its own limits are not kept, or it says to quantize and nothing was.
    """
    import fewstep
    from fewstep.recipe.recipe import load_recipe

    started = time.perf_counter()
    options = fewstep.Options(prompts=2, seeds=1, profile=False)
    bundle = fewstep.build("stickers", recipe, out=out, form=form, options=options)
    quantization = load_recipe(recipe).quantization
    if quantization is not None:
        check_quantized(bundle, mixed=quantization.mixed)
    return {"seconds": round(time.perf_counter() - started, 1)}


def check_quantized(bundle: Bundle, *, mixed: bool) -> None:
    """Raises ContractError for a bundle that is not what its recipe says: not quantized, or not of mixed precision."""
    import onnx

    if mixed and all(artifact.weights != "mixed" for artifact in bundle.manifest.artifacts):
        raise ContractError(
            f"recipe {bundle.manifest.recipe['name']} asks for mixed precision, but each component has one bit width",
            hint="does this version of fewstep share out bits?",
        )
    # Of weights: whole numbers beside them are shapes and indices.
    whole = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    for artifact in bundle.manifest.artifacts:
        model = onnx.load(bundle.file(artifact.path), load_external_data=False)
        if any(tensor.data_type in whole and len(tensor.dims) > 1 for tensor in model.graph.initializer):
            return
    raise ContractError(
        f"recipe {bundle.manifest.recipe['name']} says to quantize, but no model of its bundle is quantized",
        hint="does this version of fewstep quantize for ONNX Runtime?",
    )

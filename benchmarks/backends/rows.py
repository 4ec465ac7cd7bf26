"""One row: a recipe for a runtime, run by an executor; what was measured, or why there is nothing to measure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fewstep
from benchmarks.quant import latency
from fewstep.errors import FewstepError
from fewstep.pipeline.references import golden_samples
from fewstep.pipeline.replay import replay
from fewstep.runtimes import get_runtime
from fewstep.runtimes.executors import NATIVE
from fewstep.runtimes.parity.harness import label
from fewstep.runtimes.sampling.sampler import open_sampler

Array = npt.NDArray[Any]

RECIPES = ("fp32", "fp16", "w8", "w8a8", "w8a8-dynamic", "w4")
SOURCE = "stickers"
# Of the reference in PyTorch that all recipes start from: the golden pack of this bundle.
ORIGINAL = ("onnxruntime", "fp32")
# Packages whose version a runtime goes by, where its name is another.
_PACKAGES = {"litert": "ai-edge-litert"}
# What equal arrays count as: beyond float32.
_EQUAL_DB = 150.0


@dataclass(frozen=True)
class Row:
    """What was measured; None where nothing could be.

    Attributes:
        executor_text: what ran the artifacts, in words.
        version: of the runtime that the bundle was built with.
        passed: whether all checks did.
        lowering_db: least SQNR of an output, of calls fed with PyTorch's own inputs.
        picture_db: mean PSNR of the pictures to those of the PyTorch network that was compiled.
        original_db: mean PSNR of that network's pictures to the original's; None where it is the original.
        size_bytes: of the artifacts.
        latency_ms: median of a picture on this machine, one thread.
        ratio: time of a picture over that of ONNX Runtime in fp32, measured in turn.
        memory_bytes: peak above the idle process.
        notes: coverage and caveats.
        error: why there is nothing else.
    """

    runtime: str
    recipe: str
    executor: str
    executor_text: str = ""
    version: str = ""
    passed: bool | None = None
    lowering_db: float | None = None
    picture_db: float | None = None
    original_db: float | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None
    ratio: float | None = None
    memory_bytes: int | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def key(self) -> str:
        """Its name in the figures."""
        return f"{self.runtime}/{self.recipe}/{self.executor}"

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON-ready values."""
        return asdict(self)


def measure(runtime: str, recipe: str, executor: str, work: Path, *, minutes: float, timed: bool) -> Row:
    """Returns a row, measured now; its pictures go to ``work``, where its bundle is or will be.

    ``timed`` asks for milliseconds too, which a busy machine falsifies; ratios are interleaved, and memory is memory.
    """
    try:
        bundle = bundle_of(runtime, recipe, work)
        found = _built(bundle, runtime) if executor == NATIVE else _replayed(bundle, executor, runtime, minutes)
        measured: dict[str, Any] = {}
        # What stands in for a runtime here says nothing of its time and memory.
        itself = get_runtime(runtime).executor is None
        if executor == NATIVE and itself and get_runtime(runtime).availability().runs:
            original = bundle_of(*ORIGINAL, work)
            measured = latency.measure(str(bundle.path), str(original.path), bundle.manifest.default_steps)
    except FewstepError as error:
        return Row(runtime, recipe, executor, error=error.message)
    np.savez(pictures_of(work, f"{runtime}/{recipe}/{executor}"), **found.pictures)
    compression = (bundle.manifest.parity or {})["worst"].get("compression.picture")
    return Row(
        runtime,
        recipe,
        executor,
        executor_text=found.executor,
        version=bundle.manifest.versions.get(_PACKAGES.get(runtime, runtime), ""),
        passed=found.passed,
        lowering_db=min(found.lowering_db, default=math.nan),
        picture_db=_mean(found.picture_db),
        original_db=None if compression is None else float(compression["value"]),
        size_bytes=sum(a.bytes for a in bundle.manifest.artifacts if a.runtime == runtime),
        latency_ms=measured["times"]["picture"]["ms"]["median"] if measured and timed else None,
        ratio=measured["times"]["picture"]["ratio"] if measured else None,
        memory_bytes=measured.get("peak_memory_bytes"),
        notes=found.notes,
    )


@dataclass(frozen=True)
class _Found:
    """What running a bundle came to: its checks in dB, equal counting as 150, and pictures by label."""

    executor: str
    passed: bool
    lowering_db: list[float]
    picture_db: list[float]
    pictures: dict[str, Array]
    notes: tuple[str, ...]


def _replayed(bundle: fewstep.Bundle, executor: str, runtime: str, minutes: float) -> _Found:
    found = replay(bundle, executor, runtime=runtime, minutes=minutes)
    checks = [check.to_json() for check in found.report.checks]
    pictures = {label(sample): sample.output for sample in found.results}
    return _Found(found.report.executor, bool(found.report), *_decibels(checks), pictures, found.caveats)


def _built(bundle: fewstep.Bundle, runtime: str) -> _Found:
    """Returns what the bundle's own verification found on this machine when it was built, and its pictures now."""
    report = json.loads((bundle.path / "report" / "parity.json").read_text(encoding="utf-8"))
    schedules, pictures = bundle.manifest.schedule, {}
    sampler = open_sampler(bundle, runtime=runtime, exact=True)
    try:
        for s in golden_samples(bundle, ""):
            drawn = sampler(s.prompt, s.seed, schedules(s.steps), guidance=s.guidance, inputs=s.inputs)
            pictures[label(s)] = drawn.output
    finally:
        sampler.close()
    notes = (f"{report['checks']} checks against {report['reference']}",)
    return _Found(report["executor"], report["passed"], *_decibels(report["all"]), pictures, notes)


def _decibels(checks: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Returns the values in dB of components and of pictures, of what was lowered."""
    lowering = [check for check in checks if check["error"] == "lowering"]
    components = [check for check in lowering if check["level"] == "component"]
    pictures = [check for check in lowering if check["metric"] == "PSNR dB"]
    of_components, of_pictures = ([min(float(c["value"]), _EQUAL_DB) for c in cs] for cs in (components, pictures))
    return of_components, of_pictures


def bundle_of(runtime: str, recipe: str, work: Path) -> fewstep.Bundle:
    """Returns the bundle of a recipe for a runtime, built now or before."""
    out = work / f"{runtime}-{recipe}"
    if out.is_dir():
        return fewstep.Bundle.open(out)
    return fewstep.build(SOURCE, recipe, (runtime,), out, options=fewstep.Options(profile=False))


def pictures_of(work: Path, key: str) -> Path:
    """Returns where the pictures of a row are."""
    folder = work / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key.replace('/', '-')}.npz"


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan

"""One row: a recipe for a runtime, run by an executor; what was measured, or why there is nothing to measure."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fewstep
from fewstep.errors import FewstepError
from fewstep.replay import replay
from fewstep.runtimes import get_runtime
from fewstep.runtimes.executors import NATIVE
from fewstep.runtimes.parity import ParityReport, label

RECIPES = ("fp32", "fp16", "w8", "w8a8", "w4")
SOURCE = "stickers"
# Of the reference in PyTorch that all recipes start from: the golden pack of this bundle.
ORIGINAL = ("onnxruntime", "fp32")
# Where the machine itself runs a bundle, the whole golden pack takes seconds.
_NATIVE_MINUTES = 60.0


@dataclass(frozen=True)
class Row:
    """What was measured; None where nothing could be.

    Attributes:
        executor_text: what ran the artifacts, in words.
        passed: whether all checks did.
        lowering_db: least SQNR of an output, of calls fed with PyTorch's own inputs.
        picture_db: mean PSNR of the pictures to those of the PyTorch network that was compiled.
        original_db: mean PSNR of that network's pictures to the original's; None where it is the original.
        size_bytes: of the artifacts.
        latency_ms: median of a picture on this machine, one thread.
        memory_bytes: peak above the idle process.
        notes: coverage and caveats.
        error: why there is nothing else.
    """

    runtime: str
    recipe: str
    executor: str
    executor_text: str = ""
    passed: bool | None = None
    lowering_db: float | None = None
    picture_db: float | None = None
    original_db: float | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None
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


def measure(runtime: str, recipe: str, executor: str, work: Path, minutes: float) -> Row:
    """Returns a row, measured now; its pictures go to ``work``, where its bundle is or will be."""
    try:
        bundle = bundle_of(runtime, recipe, work)
        allowed = _NATIVE_MINUTES if executor == NATIVE else minutes
        found = replay(bundle, executor, runtime=runtime, minutes=allowed)
        runs = get_runtime(runtime).availability().runs
        profile = fewstep.profile(bundle, runtime=runtime, runs=5, threads=1) if runs and executor == NATIVE else None
    except FewstepError as error:
        return Row(runtime, recipe, executor, error=error.message)
    pictures = {label(sample): sample.output for sample in found.results}
    np.savez(pictures_of(work, f"{runtime}/{recipe}/{executor}"), **pictures)
    compression = (bundle.manifest.parity or {})["worst"].get("compression.picture")
    return Row(
        runtime,
        recipe,
        executor,
        executor_text=found.report.executor,
        passed=bool(found.report),
        lowering_db=_least(found.report),
        picture_db=_mean([c.value for c in found.report.checks if _is_picture(c.error, c.metric)]),
        original_db=None if compression is None else float(compression["value"]),
        size_bytes=sum(a.bytes for a in bundle.manifest.artifacts if a.runtime == runtime),
        latency_ms=None if profile is None else profile.picture.median_ms,
        memory_bytes=None if profile is None else profile.peak_memory_bytes,
        notes=found.caveats,
    )


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


def _is_picture(error: str, metric: str) -> bool:
    return error == "lowering" and metric == "PSNR dB"


def _least(report: ParityReport) -> float:
    values = [c.value for c in report.checks if c.error == "lowering" and c.level == "component"]
    return min((min(value, 150.0) for value in values), default=math.nan)


def _mean(values: list[float]) -> float:
    return math.fsum(min(v, 150.0) for v in values) / len(values) if values else math.nan

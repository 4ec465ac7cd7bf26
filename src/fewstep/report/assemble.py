"""Turns a verified bundle into the values of its report page, and writes the report folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fewstep.bundle.manifest import PLAN, PLAN_FOLDER, Artifact, Manifest
from fewstep.bundle.samples import Sample
from fewstep.bundle.schedule import Schedule
from fewstep.numerics.guidance import guidance_text
from fewstep.pipeline.verify import Verification
from fewstep.report import images
from fewstep.report.bought import Account, bought_of
from fewstep.report.charts import CurveChart, CurveSeries
from fewstep.report.page import write_report
from fewstep.report.quantized import quantization_facts
from fewstep.report.removed import removed_of
from fewstep.report.rows import CheckRow, LatencyRow, PictureRow, ReportData, ScheduleTable, Section, SizeRow
from fewstep.runtimes.parity.harness import Check, agreement_db, label
from fewstep.runtimes.profiling import Latency, Profile

if TYPE_CHECKING:
    from fewstep.export.specialize.counts import Removed
    from fewstep.optimize.quantize import QuantizedPrograms

_SHOWN_PICTURES = 16


def write_bundle_report(
    folder: Path,
    manifest: Manifest,
    verified: Verification,
    profiles: Sequence[Profile] = (),
    quantized: QuantizedPrograms | None = None,
    removed: Mapping[str, Removed] | None = None,
) -> Path:
    """Writes ``index.html``, ``parity.json``, ``profile.json``, ``static.json`` and ``grid.png``.

    Args:
        folder: of the report, in the bundle.
        manifest: of the bundle.
        verified: its verification.
        profiles: its measurements.
        quantized: its programs, if they are quantized.
        removed: what static steps took out of each network of the loop.

    Returns:
        The page's path.
    """
    removed = removed or {}
    data = report_data(manifest, verified, profiles, quantized)
    bought = _bought(folder.parent / PLAN_FOLDER / PLAN)
    page = write_report(replace(data, removed=removed_of(removed), bought=bought), folder)
    (folder / "static.json").write_text(json.dumps({name: asdict(found) for name, found in removed.items()}, indent=1))
    (folder / "parity.json").write_text(json.dumps(verified.report.to_json(), indent=1))
    (folder / "profile.json").write_text(json.dumps([profile.to_json() for profile in profiles], indent=1))
    (folder / "grid.png").write_bytes(images.png_bytes(picture_grid(verified)))
    return page


def _bought(plan: Path) -> Account | None:
    """Returns what mixed precision bought, from the plan in the bundle; None where there is none."""
    return bought_of(json.loads(plan.read_text(encoding="utf-8"))["quality"]) if plan.is_file() else None


def report_data(
    manifest: Manifest,
    verified: Verification,
    profiles: Sequence[Profile],
    quantized: QuantizedPrograms | None = None,
) -> ReportData:
    """Returns what the page shows."""
    profile = profiles[0] if profiles else None
    counts = ", ".join(str(n) for n in sorted(manifest.schedules))
    return ReportData(
        title=manifest.name,
        subtitle=f"{manifest.pipeline}, {counts} steps (default {manifest.default_steps}), {verified.report.executor}",
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        checks=[_check_row(check) for check in verified.report.checks],
        caveats=verified.caveats,
        pictures=_pictures(manifest, verified),
        curves=_curves(verified, manifest.default_steps),
        sizes=[SizeRow(_size_label(a), f"{a.weights} weights", a.bytes) for a in manifest.artifacts],
        latencies=[_latency_row(latency) for latency in profile.latencies] if profile else (),
        whole_latency=_latency_row(profile.picture) if profile else None,
        latency_note=_latency_note(profile) if profile else "",
        peak_memory_bytes=profile.peak_memory_bytes if profile else None,
        precision_notes=[_precision_note(manifest, runtime) for runtime in manifest.runtimes],
        contract=_contract(manifest),
        schedules=[_table(n, schedule) for n, schedule in sorted(manifest.schedules.items())],
        environment=[
            *(Section(name, version) for name, version in manifest.versions.items()),
            Section("source", f"{manifest.source.uri}\nsha256 {manifest.source.sha256}"),
            Section("reference", verified.report.reference),
            Section("recipe", json.dumps(manifest.recipe)),
        ],
        licences=[Section(name, text) for name, text in manifest.licences.items()],
        quantization=None
        if quantized is None
        else quantization_facts(manifest.recipe["quantization"], quantized.plan, quantized.calibration),
    )


def _pictures(manifest: Manifest, verified: Verification) -> list[PictureRow]:
    """Returns the pictures of the default step count, of each runtime, with the original's where there is another."""
    rows = []
    for name, of_one in (verified.each or {"": verified}).items():
        originals = verified.uncompressed or (None,) * len(of_one.references)
        shown = 0
        for a, b, original in zip(of_one.references, of_one.results, originals, strict=True):
            if a.steps != manifest.default_steps or shown == _SHOWN_PICTURES:
                continue
            shown += 1
            caption = f"{label(a)} ({name})" if name else label(a)
            before = None if original is None else _signed(original)
            rows.append(PictureRow(caption, _signed(a), _signed(b), agreement_db(a, b), before))
    return rows


def picture_grid(verified: Verification, *, most: int = 8) -> images.Pixels:
    """Returns one picture: a row for each sample with the reference, the bundle's picture and their difference."""
    rows, labels = [], []
    for a, b in list(zip(verified.references, verified.results, strict=True))[: 2 * most : 2]:
        difference, factor = images.difference(_signed(a), _signed(b))
        rows.append([images.to_uint8(_signed(a)), images.to_uint8(_signed(b)), difference])
        labels.append(f"{a.label}: PyTorch, bundle, difference x{factor}")
    return images.grid(rows, labels)


def _signed(sample: Sample) -> images.FloatPicture:
    """The page takes pictures in [-1, 1] with three channels."""
    picture_HWC = sample.picture_HWC if sample.picture_HWC.shape[-1] == 3 else np.repeat(sample.picture_HWC, 3, -1)
    return (picture_HWC * 2.0 - 1.0).astype(np.float32)


def _check_row(check: Check) -> CheckRow:
    metric = check.metric.removesuffix(" dB")
    unit = "dB" if metric != check.metric else ""
    component = check.component if check.tensor is None else f"{check.component}: {check.tensor}"
    component += "" if check.runtime is None else f" ({check.runtime})"
    return CheckRow(
        check.error,
        check.level,
        component,
        check.step,
        check.sample,
        metric,
        check.value,
        check.limit,
        check.passed,
        unit,
    )


def _curves(verified: Verification, steps: int) -> list[CurveChart]:
    series: dict[str, list[float]] = {}
    limits = set()
    for check in verified.report.checks:
        if check.level == "trajectory" and check.sample is not None and check.sample.endswith(f", {steps} steps"):
            series.setdefault(check.sample, []).append(check.value)
            limits.add(check.limit)
    if not series:
        return []
    lines = tuple(CurveSeries(label, tuple(values)) for label, values in series.items())
    return [CurveChart("Latent after each step, lowering error", lines, next(iter(limits)))]


def _latency_row(latency: Latency) -> LatencyRow:
    return LatencyRow(latency.component, latency.calls, latency.median_ms, latency.low_ms, latency.high_ms)


def _latency_note(profile: Profile) -> str:
    threads = "the runtime's own number of threads" if profile.threads is None else f"{profile.threads} threads"
    runs = profile.picture.runs
    return (
        f"{profile.runtime} on the machine that built the bundle, {threads}, after warm-up; "
        f"{runs} runs, spread is the middle 80 %"
    )


def _size_label(artifact: Artifact) -> str:
    variant = f" {artifact.variant}" if artifact.variant else ""
    return f"{artifact.component}{variant} ({artifact.runtime})"


def _precision_note(manifest: Manifest, runtime: str) -> str:
    first = next(a for a in manifest.artifacts if a.runtime == runtime)
    note = f"{runtime}: {first.weights} weights, {first.compute} compute"
    return note if first.weights == first.compute else f"{note}; the CPU provider has no {first.weights} kernels"


def _contract(manifest: Manifest) -> list[Section]:
    contract, guidance = manifest.contract, manifest.contract.guidance
    sections = [
        Section("latent", f"float32 {[1, *contract.latent_shape]}"),
        Section("decoder input", f"latent / {contract.latent_scale:g} + {contract.latent_shift:g}"),
        Section("prediction type", contract.prediction_type),
        Section("guidance", guidance_text(guidance)),
        Section("noise", contract.noise),
    ]
    for component, spec in manifest.components.items():
        lines = [f"{s.name}: {s.dtype} {list(s.shape)} <- {spec.bindings[s.name]}" for s in spec.inputs]
        lines += [f"{s.name}: {s.dtype} {list(s.shape)} ->" for s in spec.outputs]
        sections.append(Section(component, "\n".join(lines)))
    return sections


def _table(steps: int, schedule: Schedule) -> ScheduleTable:
    columns = ("k", "t", "s", "p", "q", "a", "b", "c")
    rows = []
    for k in range(schedule.steps):
        values = (getattr(schedule, name)[k] for name in "spqabc")
        rows.append((k, schedule.timesteps[k], *(_rounded(v) for v in values)))
    history = any(any(row) for row in schedule.h)
    title = f"{steps} steps, {schedule.source}, initial noise x {schedule.init_scale:.6g}"
    return ScheduleTable(title + (", with history (see the manifest)" if history else ""), columns, tuple(rows))


def _rounded(value: float) -> float:
    return value if value == 0 or not math.isfinite(value) else float(f"{value:.6g}")

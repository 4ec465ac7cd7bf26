"""Finds the operation at which an artifact departs from PyTorch, for every component that failed a verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.manifest import Manifest
from fewstep.bundle.program import Program
from fewstep.bundle.samples import Sample, StepFeed
from fewstep.bundle.source import SourceSpec
from fewstep.pipeline.references import as_built, prepare
from fewstep.recipe.recipe import Limits
from fewstep.runtimes.base import Array
from fewstep.runtimes.coreml import runtime as coreml
from fewstep.runtimes.onnxruntime import runtime as ort
from fewstep.runtimes.parity.harness import Check, label
from fewstep.runtimes.sampling.step_graphs import has_rows, row_call, row_variant
from fewstep.runtimes.sampling.tiled_decoder import first_tile

if TYPE_CHECKING:
    from fewstep.runtimes.parity.divergence import Departure

# Runtimes whose artifacts have a value for every value of the traced program.
BISECTED = (ort.NAME, coreml.NAME)
_LEVELS = ("component", "operation", "stored")
# Of these a check names the module by itself.
_NAMING = ("stored", "operation")


def answering(
    manifest: Manifest, program: Program, inputs: Mapping[str, Array]
) -> tuple[Program, Mapping[str, Array], str | None]:
    """Returns the program of the graph that answers a call of a component, what it takes, and its name."""
    if not has_rows(manifest.contract, program.spec):
        return program, inputs, None
    from fewstep.export.specialize.at_step import at_row

    row, left = row_call(program.spec, inputs)
    return at_row(program, row), left, row_variant(row)


def bisect_failures(
    bundle: Bundle,
    source: SourceSpec,
    runtime: str,
    failures: Sequence[Check],
    references: Sequence[Sample],
    limits: Limits,
) -> dict[str, Departure | None]:
    """Returns the first departing operation of every component that failed, None where none departs.

    Args:
        bundle: the bundle.
        source: that it was built from.
        runtime: one of `BISECTED`.
        failures: the checks that failed.
        references: the samples that were compared, with their network calls.
        limits: those of the verification.
    """
    from fewstep.export import load

    manifest = bundle.manifest
    original = load(source, guidance=manifest.recipe.get("guidance"), eager=True)
    _, programs, quantized, _ = prepare(bundle, as_built(original, manifest))
    found: dict[str, Departure | None] = {}
    for component in sorted({check.component for check in failures if check.level in _LEVELS}):
        named = _named(component, failures)
        if named is not None:
            found[component] = named
            continue
        spec, inputs, variant = manifest.components[component], _failed(component, failures, references).inputs, None
        if spec.tiles is not None:
            spec, inputs, variant = first_tile(spec, inputs)
        program = (quantized or programs).make(component, spec)
        if variant is None:
            program, inputs, variant = answering(manifest, program, inputs)
        artifact = manifest.artifact(runtime, component, variant)
        path, limit = bundle.file(artifact.path), limits.component_sqnr_db
        if runtime == coreml.NAME:
            from fewstep.runtimes.coreml.debug import bisect as coreml_bisect

            function = artifact.function or None
            found[component] = coreml_bisect.bisect(program, path, inputs, limit_db=limit, function=function)
        else:
            from fewstep.runtimes.onnxruntime.debug import bisect as ort_bisect

            found[component] = ort_bisect.bisect(program, path, inputs, limit_db=limit)
    return found


def _named(component: str, failures: Sequence[Check]) -> Departure | None:
    """Returns the departure that a check of integers tells, None where none of this component failed."""
    from fewstep.runtimes.parity.divergence import Departure

    checks = [c for c in failures if c.component == component and c.level in _NAMING and c.tensor]
    if not checks:
        return None
    first = min(checks, key=lambda check: _NAMING.index(check.level))
    path = str(first.tensor).partition(" (")[0].partition(", ")[0]
    return Departure(str(first.tensor), path, "", first.metric, first.value, len(checks))


def _failed(component: str, failures: Sequence[Check], references: Sequence[Sample]) -> StepFeed:
    """Returns the first call of a component that failed: graphs of other steps may be whole.

    Where none failed by itself, but the mean of all or a call at another shape, the first is as good as any.
    """
    failed = {(c.sample, c.step) for c in failures if c.component == component and c.level in _LEVELS}
    calls = [(label(s), feed) for s in references for feed in s.feeds if feed.component == component]
    return next((feed for sample, feed in calls if (sample, feed.step) in failed), calls[0][1])

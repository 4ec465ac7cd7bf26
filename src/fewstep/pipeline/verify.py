"""Parity of a bundle, on this machine: against the live generator where it can be had, else against the golden pack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.manifest import INTEGERS, Manifest
from fewstep.bundle.samples import Sample
from fewstep.bundle.source import SourceSpec, source_notes
from fewstep.errors import RuntimeMissingError
from fewstep.faults import naming_packages
from fewstep.pipeline.bisect import BISECTED, bisect_failures
from fewstep.pipeline.execution_notes import compute_notes, executor_text, stand_in_notes
from fewstep.pipeline.references import (
    as_built,
    golden_samples,
    known_floor,
    limits_of,
    live_references,
    load_original,
    usable_source,
)
from fewstep.pipeline.shape_and_batch import batches
from fewstep.progress import Progress, Silent, stage
from fewstep.proof.checks import compare_operations, host_of, recorded_checks, source_checks
from fewstep.proof.manifest_ties import check_limits
from fewstep.proof.user_calls import Told, UserCalls
from fewstep.recipe.recipe import Limits
from fewstep.runtimes import get_runtime
from fewstep.runtimes.parity.golden_operations import golden_operation_checks
from fewstep.runtimes.parity.harness import (
    COMPRESSION,
    FP16_LIMITS,
    LOWERING,
    LOWERING_FP16,
    Check,
    Floor,
    ParityReport,
    compare_components,
    compare_samples,
    fold,
    label,
)
from fewstep.runtimes.parity.host_arithmetic import first_place
from fewstep.runtimes.parity.image_outputs import compare_levels
from fewstep.runtimes.parity.quantized import floor_checks, mean_check
from fewstep.runtimes.parity.stored_integers import load_table, stored_checks
from fewstep.runtimes.sampling.sampler import Sampler, open_sampler
from fewstep.text.cleaners import cleaner_notes

if TYPE_CHECKING:
    from fewstep.optimize.quantize import QuantizedPrograms
    from fewstep.runtimes.parity.divergence import Departure

PYTORCH = "PyTorch, the generator's own pipeline, run now"
# How many samples are run with other kernels to learn the noise floor: its median is then known to about 1 dB.
FLOOR_SAMPLES = 16
GOLDEN = "the bundle's golden pack, recorded from PyTorch when it was built"


@dataclass(frozen=True)
class Verification:
    """A parity report with the samples behind it, reference first, and what it does not prove."""

    report: ParityReport
    references: tuple[Sample, ...]
    results: tuple[Sample, ...]
    caveats: tuple[str, ...]
    departures: dict[str, Departure | None] = field(default_factory=dict)
    uncompressed: tuple[Sample, ...] | None = None
    """The samples of the original network, where the recipe changed it."""
    place: str | None = None
    """Which part of the host departs first, such as ``tokenizer`` or ``schedule step 2``; None where none does."""
    each: dict[str, Verification] = field(default_factory=dict)
    """The verifications of each runtime, where there are several; ``results`` are those of the first."""

    def with_checks(self, checks: Sequence[Check]) -> Verification:
        """Returns the verification with checks that are of no runtime."""
        return replace(self, report=replace(self.report, checks=self.report.checks + tuple(checks)))

    def and_at(self, shape: str, other: Verification) -> Verification:
        """Returns the verification with the checks of another shape's."""
        checks = tuple(
            replace(check, sample=", ".join(filter(None, (check.sample, shape)))) for check in other.report.checks
        )
        return replace(self, report=replace(self.report, checks=self.report.checks + checks))


@naming_packages()
def verify(
    bundle: Bundle,
    *,
    against: str | SourceSpec | None = None,
    runtime: str | None = None,
    prompts: int = 8,
    seeds: int = 2,
    bisect: bool = False,
    trust_limits: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Returns a fresh comparison of a bundle with its reference.

    Args:
        bundle: the bundle.
        against: the source to compare with; None takes the one it was built from if it is on this machine, else the
            golden pack, and says which in the report. What it leaves out (LoRAs, a decoder) is as the bundle was built.
        runtime: which of the bundle's runtimes; None takes all of them.
        prompts: how many of the generator's prompts, with live references.
        seeds: how many seeds of each.
        bisect: for every component that fails, name its first departing tensor (needs the source).
        trust_limits: takes the bundle's limits as they are, also where its recipe's kind needs more.
        progress: told where the verification is.

    Raises:
        SourceError: ``against`` cannot be loaded.
        ContractError: ``against`` is not the generator that the bundle was built from, or the bundle's limits are below
            what its recipe's kind needs.
        RuntimeMissingError: one of the runtimes cannot run here, or a package that comparing needs is not installed.
        BundleError: there is a file in the bundle that the manifest does not list.
    """
    progress, manifest = progress or Silent(), bundle.manifest
    bundle.refuse_unlisted()
    runtimes = manifest.runtimes if runtime is None else (runtime,)
    _check_runtimes(bundle, runtimes)
    limits = limits_of(manifest) if trust_limits else check_limits(manifest)
    source, reason = usable_source(bundle, against)
    if source is None:
        golden = golden_samples(bundle, "")
        caveats = [
            f"compared with the golden pack and not with PyTorch: {reason}",
            "not compared with the untouched pipeline (level call): that needs the source",
            *source_notes(bundle.manifest.source),
        ]
        if bisect:
            caveats.append("not bisected: that needs the source")
        verified = verify_targets(
            bundle, golden, None, limits, runtimes=runtimes, reference=GOLDEN, caveats=caveats, progress=progress
        )
        verified = verified.with_checks(recorded_checks(bundle, golden))
        for shape in bundle.manifest.shapes:
            at, golden = bundle.shaped(shape), golden_samples(bundle, shape)
            found = verify_targets(at, golden, None, limits, runtimes=runtimes, reference=GOLDEN, progress=progress)
            verified = verified.and_at(shape, found.with_checks(host_of(at, golden)))
        return replace(verified, place=first_place(verified.report.checks))
    cleaned = cleaner_notes(manifest.versions) if manifest.tokenizers else []
    original = load_original(bundle, source, progress)
    told = Told.of(manifest.contract, manifest.default_steps, manifest.schedules, as_built(original, manifest))
    with closing(UserCalls.of(source, told)) as calls:
        live = live_references(bundle, original, prompts, seeds, progress)
        verified = verify_targets(
            bundle,
            live.samples,
            live.uncompressed,
            limits,
            quantized=live.quantized,
            runtimes=runtimes,
            caveats=[*cleaned, *source_notes(manifest.source)],
            progress=progress,
        )
        checks, notes = source_checks(bundle, live, limits, verified.report.floor)
        verified = replace(verified.with_checks(checks), caveats=(*verified.caveats, *notes))
        for shape in manifest.shapes:
            at = bundle.shaped(shape)
            there = live_references(at, original, 1, 1, progress)
            found = verify_targets(at, there.samples, there.uncompressed, limits, runtimes=runtimes, progress=progress)
            verified = verified.and_at(shape, found.with_checks(host_of(at, there.recorded)))
        verified = with_calls(verified, calls, bundle, runtimes, limits, progress)
    verified = replace(verified, place=first_place(verified.report.checks))
    if bisect and not verified.report:
        for name, of_one in (verified.each or {runtimes[0]: verified}).items():
            if name not in BISECTED:
                note = f"{name} was not bisected: it hides the values in between; bisect a bundle for onnxruntime"
                verified = replace(verified, caveats=(*verified.caveats, note))
                continue
            departed = bisect_failures(bundle, source, name, of_one.report.failures, of_one.references, limits)
            verified.departures.update(
                {f"{component} ({name})" if verified.each else component: d for component, d in departed.items()}
            )
    return verified


def with_calls(
    verified: Verification,
    calls: UserCalls,
    bundle: Bundle,
    runtimes: Sequence[str],
    limits: Limits,
    progress: Progress,
) -> Verification:
    """Returns a verification with the checks of the level *call*, which waits for the untouched pipeline's answer."""
    with stage(progress, "compare with the untouched pipeline"):
        checks, notes = calls.checks(bundle, runtimes, limits, changed=verified.uncompressed is not None)
    report = replace(verified.report, checks=(*verified.report.checks, *checks))
    return replace(verified, report=report, caveats=(*verified.caveats, *notes))


def _check_runtimes(bundle: Bundle, runtimes: Sequence[str]) -> None:
    """Raises RuntimeMissingError unless all of a bundle's runtimes that are asked for run here."""
    for name in runtimes:
        if name not in bundle.manifest.runtimes:
            continue  # the manifest refuses it, and says what it has
        state = get_runtime(name).availability()
        if not (state.runs or state.stand_in):
            others = [other for other in bundle.manifest.runtimes if other != name]
            remedy = [state.remedy] if state.remedy else []
            remedy += [f"verify {' or '.join(others)} alone with --runtime"] if others else []
            raise RuntimeMissingError(
                f"{name} cannot be verified here: {state.detail}", hint="; ".join(remedy) or "see `fewstep runtimes`"
            )


def verify_targets(
    bundle: Bundle,
    references: Sequence[Sample],
    uncompressed: Sequence[Sample] | None,
    limits: Limits,
    *,
    quantized: QuantizedPrograms | None = None,
    runtimes: Sequence[str] | None = None,
    reference: str = PYTORCH,
    caveats: Sequence[str] = (),
    progress: Progress | None = None,
) -> Verification:
    """Returns the comparison of every runtime of a bundle with recorded references, in one report.

    The arguments are those of `verify_against`; ``runtimes`` None takes all of the bundle's.
    """
    each: dict[str, Verification] = {}
    floor = None
    for name in bundle.manifest.runtimes if runtimes is None else runtimes:
        each[name] = verify_against(
            bundle,
            references,
            uncompressed,
            limits,
            quantized=quantized,
            runtime=name,
            reference=reference,
            caveats=caveats,
            floor=floor,
            progress=progress,
        )
        floor = floor or each[name].report.floor
    first = next(iter(each.values()))
    if len(each) == 1:
        return first
    notes = dict.fromkeys(note for verified in each.values() for note in verified.caveats)
    report = fold({name: verified.report for name, verified in each.items()})
    return replace(first, report=report, caveats=tuple(notes), each=each)


def verify_against(
    bundle: Bundle,
    references: Sequence[Sample],
    uncompressed: Sequence[Sample] | None,
    limits: Limits,
    *,
    quantized: QuantizedPrograms | None = None,
    runtime: str | None = None,
    reference: str = PYTORCH,
    caveats: Sequence[str] = (),
    floor: Floor | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Returns the comparison of one runtime of a bundle with recorded references.

    Args:
        bundle: the bundle.
        references: samples of the network that was lowered.
        uncompressed: the same samples of the original network; None where they are the same network.
        limits: the least that the artifacts must keep.
        quantized: the network that was lowered, if it is at hand: what computes with whole numbers is then compared
            operation by operation, and its noise floor measured instead of taken from the manifest.
        runtime: which of the bundle's runtimes; None takes the first.
        reference: what the references are, for people.
        caveats: what is known already not to be proved.
        floor: the noise floor of ``references``, if it was measured already.
        progress: told where the verification is.
    """
    progress = progress or Silent()
    manifest, name = bundle.manifest, runtime or bundle.manifest.runtimes[0]
    artifacts = {component: manifest.artifact(name, component) for component in manifest.components}
    integers = [component for component, artifact in artifacts.items() if artifact.compute == INTEGERS]
    notes = [*caveats, *stand_in_notes(name), *compute_notes(name, artifacts.values())]
    sampler = open_sampler(bundle, runtime=name, exact=True)
    try:
        with stage(progress, "compare components"):
            checks = compare_components(
                references, sampler.session, lambda c: None if c in integers else limits.component_sqnr_db
            )
        advance = progress.task("compare samples", len(references))
        results = _drawn(sampler, manifest, references, advance)
    finally:
        sampler.close()
    limit = None if integers else limits.picture_psnr_db
    checks += compare_samples(references, results, limit, schedules=manifest.schedules)
    exact = results
    narrower = get_runtime(name).open_exact is not None and any(a.compute != "fp32" for a in artifacts.values())
    if narrower:
        # What conversion changed was compared in fp32; now what the device's own arithmetic makes of it.
        shipped, results = _compare_shipped(bundle, name, references, integers, progress)
        checks += shipped
    if integers:
        some = references[:FLOOR_SAMPLES]
        floor = floor or _floor(bundle, quantized, some, progress)
        labels = {label(sample) for sample in some}
        of_some = [x for x in checks if (x.error, x.level) == (LOWERING, "component") and x.sample in labels]
        found = {c: [x.value for x in of_some if x.component == c] for c in integers}
        checks += floor_checks(floor, limits, found, some, exact[: len(some)])
        inside, why = golden_operation_checks(bundle, name)
        checks += inside
        if quantized is None:
            notes += [
                "quantized operations were compared one by one at those of the golden pack" if why is None else why
            ]
        else:
            checks += compare_operations(bundle, name, integers, quantized, references[0], progress)
    if uncompressed is not None:
        checks += compare_samples(uncompressed, references, limits.compression_psnr_db, error=COMPRESSION)
        if integers:
            checks.append(mean_check(uncompressed, references, exact))
        if integers and narrower:
            checks.append(replace(mean_check(uncompressed, references, results), error=LOWERING_FP16))
    stored, unread = stored_checks(bundle, name, load_table(bundle))
    checks += stored
    notes += unread
    executor = executor_text(get_runtime(name), artifacts.values())
    return Verification(
        ParityReport(tuple(checks), reference, executor, floor if integers else None),
        tuple(references),
        tuple(results),
        tuple(notes),
        uncompressed=None if uncompressed is None else tuple(uncompressed),
    )


def _drawn(
    sampler: Sampler, manifest: Manifest, references: Sequence[Sample], advance: Callable[[], None]
) -> list[Sample]:
    """Returns what a bundle draws for the prompts and seeds of the references."""
    results: list[Sample] = []
    for rows in batches(references, manifest.contract.batch):
        results += sampler.batch(
            [r.prompt for r in rows],
            [r.seed for r in rows],
            manifest.schedule(rows[0].steps),
            guidance=rows[0].guidance,
            negative=rows[0].negative,
            inputs=[r.inputs for r in rows],
        )
        for _ in rows:
            advance()
    return results


def _floor(
    bundle: Bundle, quantized: QuantizedPrograms | None, references: Sequence[Sample], progress: Progress
) -> Floor:
    """Returns the noise floor: measured now, or as it was when the bundle was built."""
    if quantized is not None:
        with stage(progress, "measure the noise floor"):
            return quantized.floor(references)
    return known_floor(bundle)


def _compare_shipped(
    bundle: Bundle, runtime: str, references: Sequence[Sample], integers: Sequence[str], progress: Progress
) -> tuple[list[Check], list[Sample]]:
    """Returns the checks of what the device makes of a bundle in its own arithmetic, and the samples.

    Components that compute with whole numbers have no limit: fp16 lets many more roundings fall the other way than the
    noise floor's kernels do. Theirs is the mean distance from the original. Images are compared level by level.
    """
    manifest = bundle.manifest
    image_outputs = get_runtime(runtime).image_outputs and manifest.recipe.get("image_output", False)
    images = [*manifest.components][-1:] if image_outputs else []
    sampler = open_sampler(bundle, runtime=runtime)
    try:
        with stage(progress, "compare components in fp16"):
            checks = compare_components(
                references,
                sampler.session,
                lambda c: None if c in integers or c in images else FP16_LIMITS.component_sqnr_db,
                error=LOWERING_FP16,
            )
            for component in images:
                limited = component not in integers
                output = manifest.contract.output
                checks += compare_levels(references, sampler.session, component, output, limited=limited)
        advance = progress.task("compare samples in fp16", len(references))
        results = _drawn(sampler, manifest, references, advance)
    finally:
        sampler.close()
    limit = None if integers else FP16_LIMITS.picture_psnr_db
    checks += compare_samples(references, results, limit, error=LOWERING_FP16, schedules=manifest.schedules)
    return checks, results

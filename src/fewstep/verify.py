"""Parity of a bundle, on this machine: against the live generator where it can be had, else against the golden pack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import util
from typing import TYPE_CHECKING

from fewstep.bundle import Bundle
from fewstep.errors import BundleError, ContractError
from fewstep.feeds import Sample, load_samples
from fewstep.manifest import INTEGERS, PLAN_FOLDER, Artifact, SourceInfo
from fewstep.progress import Progress, Silent, stage
from fewstep.recipe import Limits, Recipe
from fewstep.runtimes import coreml, get_runtime
from fewstep.runtimes.parity import (
    COMPRESSION,
    FP16_LIMITS,
    LOWERING_FP16,
    Check,
    Floor,
    ParityReport,
    compare_components,
    compare_samples,
)
from fewstep.runtimes.quantized_parity import floor_checks, mean_check, operation_checks
from fewstep.runtimes.sampler import open_sampler, open_tokenizers
from fewstep.source import SourceSpec

if TYPE_CHECKING:
    from fewstep.export import Generator
    from fewstep.optimize.prepared import Prepared
    from fewstep.runtimes.departure import Departure

PYTORCH = "PyTorch, the generator's own pipeline, run now"
# How many samples are run with other kernels to learn the noise floor: its mean is then known to about 1 dB.
FLOOR_SAMPLES = 8
GOLDEN = "the bundle's golden pack, recorded from PyTorch when it was built"


@dataclass(frozen=True)
class Verification:
    """A parity report with the samples behind it, reference first, and what it does not prove."""

    report: ParityReport
    references: tuple[Sample, ...]
    results: tuple[Sample, ...]
    caveats: tuple[str, ...]
    departures: dict[str, Departure | None] = field(default_factory=dict)


def verify(
    bundle: Bundle,
    *,
    against: str | SourceSpec | None = None,
    runtime: str | None = None,
    prompts: int = 8,
    seeds: int = 2,
    bisect: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Returns a fresh comparison of a bundle with its reference.

    Args:
        bundle: the bundle.
        against: the source to compare with; None takes the one it was built from if it is on this machine, else the
            golden pack, and says which in the report. What it leaves out (LoRAs, a decoder) is as the bundle was built.
        runtime: which of the bundle's runtimes; None takes the first.
        prompts: how many of the generator's prompts, with live references.
        seeds: how many seeds of each.
        bisect: for every component that fails, name its first departing tensor (needs the source).
        progress: told where the verification is.

    Raises:
        SourceError: ``against`` cannot be loaded.
        ContractError: ``against`` is not the generator that the bundle was built from.
    """
    progress = progress or Silent()
    limits = Limits(**bundle.manifest.recipe["limits"])
    source, reason = _usable_source(bundle, against)
    if source is None:
        golden = load_samples(bundle.path / "golden")
        if not golden:
            raise BundleError(f"{bundle.path} has no golden samples to verify against", hint="give --against SOURCE")
        caveats = [f"compared with the golden pack and not with PyTorch: {reason}"]
        if bisect:
            caveats.append("not bisected: that needs the source")
        return verify_against(
            bundle, golden, None, limits, runtime=runtime, reference=GOLDEN, caveats=caveats, progress=progress
        )
    prepared, lowered_from, uncompressed = _live_references(bundle, source, prompts, seeds, progress)
    verified = verify_against(
        bundle, lowered_from, uncompressed, limits, prepared=prepared, runtime=runtime, progress=progress
    )
    if bisect and not verified.report:
        verified.departures.update(_bisect(bundle, source, verified, runtime or bundle.manifest.runtimes[0], limits))
    return verified


def verify_against(
    bundle: Bundle,
    references: Sequence[Sample],
    uncompressed: Sequence[Sample] | None,
    limits: Limits,
    *,
    prepared: Prepared | None = None,
    runtime: str | None = None,
    reference: str = PYTORCH,
    caveats: Sequence[str] = (),
    progress: Progress | None = None,
) -> Verification:
    """Returns the comparison of a bundle with recorded references.

    Args:
        bundle: the bundle.
        references: samples of the network that was lowered.
        uncompressed: the same samples of the original network; None where they are the same network.
        limits: the least that the artifacts must keep.
        prepared: the network that was lowered, if it is at hand: what computes with whole numbers is then compared
            operation by operation, and its noise floor measured instead of taken from the manifest.
        runtime: which of the bundle's runtimes; None takes the first.
        reference: what the references are, for people.
        caveats: what is known already not to be proved.
        progress: told where the verification is.
    """
    progress = progress or Silent()
    manifest = bundle.manifest
    name = runtime or manifest.runtimes[0]
    artifacts = {component: manifest.artifact(name, component) for component in manifest.components}
    integers = [component for component, artifact in artifacts.items() if artifact.compute == INTEGERS]
    notes = [*caveats, *_compute_notes(name, artifacts.values())]
    sampler = open_sampler(bundle, runtime=name, exact=True)
    try:
        with stage(progress, "compare components"):
            checks = compare_components(
                references, sampler.session, lambda c: None if c in integers else limits.component_sqnr_db
            )
        advance = progress.task("compare samples", len(references))
        results = []
        for r in references:
            results.append(sampler(r.prompt, r.seed, manifest.schedule(r.steps), guidance=r.guidance, inputs=r.inputs))
            advance()
    finally:
        sampler.close()
    checks += compare_samples(references, results, None if integers else limits.picture_psnr_db)
    if get_runtime(name).open_exact is not None and any(a.compute == "fp16" for a in artifacts.values()):
        # What conversion changed was compared in fp32; now what the device's own arithmetic makes of it.
        shipped, results = _compare_shipped(bundle, name, references, progress)
        checks += shipped
    floor = None
    if integers:
        floor = _floor(bundle, prepared, references, progress)
        found = {c: [x.value for x in checks if (x.level, x.component) == ("component", c)] for c in integers}
        checks += floor_checks(floor, limits, found, references, results)
        if prepared is None:
            notes.append("quantized operations were not compared one by one: that needs the source")
        else:
            checks += _compare_operations(bundle, name, integers, prepared, references[0], progress)
    if uncompressed is not None:
        checks += compare_samples(uncompressed, references, limits.compression_psnr_db, error=COMPRESSION)
        if integers:
            checks.append(mean_check(uncompressed, references, results))
    first = next(iter(artifacts.values()))
    executor = f"{name}, {first.weights} weights, {first.compute} compute"
    said = get_runtime(name).executor
    executor += f", run by {said()}" if said is not None else ""
    return Verification(
        ParityReport(tuple(checks), reference, executor, floor), tuple(references), tuple(results), tuple(notes)
    )


def _floor(bundle: Bundle, prepared: Prepared | None, references: Sequence[Sample], progress: Progress) -> Floor:
    """Returns the noise floor: measured now, or as it was when the bundle was built."""
    if prepared is not None:
        with stage(progress, "measure the noise floor"):
            return prepared.floor(references[:FLOOR_SAMPLES])
    known = (bundle.manifest.parity or {}).get("floor")
    if known is None:
        raise BundleError(f"{bundle.path} does not say what its noise floor is", hint="build the bundle again")
    return Floor(known["components"], known["picture"])


def _compare_operations(
    bundle: Bundle, runtime: str, components: Sequence[str], prepared: Prepared, sample: Sample, progress: Progress
) -> list[Check]:
    compare = get_runtime(runtime).compare_integers
    if compare is None:
        raise ContractError(f"{runtime} computes with whole numbers and has nothing to compare them with")
    checks = []
    with stage(progress, "compare operations"):
        for component in components:
            program = prepared.program(component)
            path = bundle.file(bundle.manifest.artifact(runtime, component).path)
            for feed in (f for f in sample.feeds if f.component == component):
                checks += operation_checks(component, sample, feed.step, compare(program, path, feed.inputs))
    return checks


def _compute_notes(runtime: str, artifacts: Iterable[Artifact]) -> list[str]:
    """Returns what the precision of weights could make one believe of the arithmetic, and what is so."""
    kinds = sorted({(a.weights, a.compute) for a in artifacts if a.weights != a.compute})
    return [
        f"{runtime} computes in {compute}: its CPU provider has no {weights} kernels, so this is no {weights} baseline"
        for weights, compute in kinds
        if weights == "fp16" and compute == "fp32"
    ]


def _compare_shipped(
    bundle: Bundle, runtime: str, references: Sequence[Sample], progress: Progress
) -> tuple[list[Check], list[Sample]]:
    """Returns the checks of what the device makes of a bundle in its own arithmetic, and the samples."""
    sampler = open_sampler(bundle, runtime=runtime)
    try:
        with stage(progress, "compare components in fp16"):
            limit = FP16_LIMITS.component_sqnr_db
            checks = compare_components(references, sampler.session, lambda _: limit, error=LOWERING_FP16)
        advance = progress.task("compare samples in fp16", len(references))
        results = []
        for r in references:
            schedule = bundle.manifest.schedule(r.steps)
            results.append(sampler(r.prompt, r.seed, schedule, guidance=r.guidance, inputs=r.inputs))
            advance()
    finally:
        sampler.close()
    checks += compare_samples(references, results, FP16_LIMITS.picture_psnr_db, error=LOWERING_FP16)
    return checks, results


def _usable_source(bundle: Bundle, against: str | SourceSpec | None) -> tuple[SourceSpec | None, str]:
    """Returns the source to compare with, or None and why there is none."""
    built_from = bundle.manifest.source
    if against is not None:
        return SourceSpec.of(against).otherwise(built_from.spec()), ""
    for package in ("torch", "diffusers"):
        if util.find_spec(package) is None:
            return None, f"{package} is not installed"
    if built_from.kind == "python":
        return None, f"{built_from.uri} was assembled in Python, and only the process that did so has it"
    from fewstep.export import missing

    gone = missing(built_from)
    return (built_from.spec(), "") if gone is None else (None, f"{gone} is not on this machine")


def _live_references(
    bundle: Bundle, source: SourceSpec, prompts: int, seeds: int, progress: Progress
) -> tuple[Prepared, list[Sample], list[Sample] | None]:
    from fewstep.calibration import SampleRequest
    from fewstep.export import load

    manifest = bundle.manifest
    with stage(progress, f"load {source}"):
        quantized = manifest.recipe["quantization"] is not None or manifest.recipe.get("palette") is not None
        original = load(source, guidance=manifest.contract.guidance.scale, eager=quantized)
        _check_same(bundle.manifest.source, original.source)
        if manifest.recipe["shape"] is not None:
            original = original.shaped(*manifest.recipe["shape"])
        prepared, changed = _prepare(bundle, original)
    w = manifest.contract.guidance.scale
    requests = SampleRequest.grid(original, manifest.prompts[:prompts], range(seeds), manifest.default_steps, w)
    requests += [replace(requests[0], steps=n) for n in manifest.schedules if n != manifest.default_steps]
    advance = progress.task("run the reference", len(requests) * (2 if changed else 1))

    def run(reference: Prepared) -> list[Sample]:
        samples = []
        for sample in reference.samples(requests):
            samples.append(sample)
            advance()
        return samples

    before = replace(prepared, generator=original, plan=None)
    return prepared, run(prepared), run(before) if changed else None


def _prepare(bundle: Bundle, original: Generator) -> tuple[Prepared, bool]:
    """Returns the generator as the bundle's recipe made it, and whether that changed it."""
    from fewstep.export import describe
    from fewstep.optimize import optimize
    from fewstep.optimize.prepared import Prepared
    from fewstep.optimize.quantize import QuantPlan

    manifest = bundle.manifest
    optimized, notes = optimize(
        original, Recipe("", weights=manifest.recipe["weights"], palette=manifest.recipe.get("palette"))
    )
    described = describe(optimized, sorted(manifest.schedules))
    plan = None
    if manifest.recipe["quantization"] is not None:
        plan = QuantPlan.load(bundle.path / PLAN_FOLDER)
    tokenizers = open_tokenizers(bundle.path, manifest.tokenizers)
    return Prepared(optimized, described, plan, tokenizers), plan is not None or any(note.modified for note in notes)


def _check_same(built_from: SourceInfo, found: SourceInfo) -> None:
    if found.sha256 != built_from.sha256:
        raise ContractError(
            f"{found.spec()} (sha256 {found.sha256[:16]}...) is not what this bundle was built from "
            f"({built_from.spec()}, sha256 {built_from.sha256[:16]}...){_first_difference(built_from, found)}",
            hint="verify against the original source, or build the bundle again from this one",
        )


def _first_difference(built_from: SourceInfo, found: SourceInfo) -> str:
    """Names the first LoRA that is another one, which a name alone would hide."""
    for was, now in zip(built_from.loras, found.loras, strict=False):
        if (was.sha256, was.scale) != (now.sha256, now.scale):
            return f": LoRA {now.path} differs in {'scale' if was.sha256 == now.sha256 else 'content'}"
    return ""


def _bisect(
    bundle: Bundle, source: SourceSpec, verified: Verification, runtime: str, limits: Limits
) -> dict[str, Departure | None]:
    from fewstep.export import load

    if runtime == coreml.NAME:
        from fewstep.runtimes.coreml_bisect import bisect
    else:
        from fewstep.runtimes.ort_bisect import bisect

    manifest = bundle.manifest
    prepared, _ = _prepare(bundle, load(source, guidance=manifest.contract.guidance.scale, eager=True))
    failing = {check.component for check in verified.report.failures if check.level in ("component", "operation")}
    found: dict[str, Departure | None] = {}
    for component in sorted(failing):
        program = prepared.program(component)
        feed = next(f for sample in verified.references for f in sample.feeds if f.component == component)
        path = bundle.file(manifest.artifact(runtime, component).path)
        found[component] = bisect(program, path, feed.inputs, limit_db=limits.component_sqnr_db)
    return found

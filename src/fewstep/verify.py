"""Parity of a bundle, on this machine: against the live generator where it can be had, else against the golden pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import util
from typing import TYPE_CHECKING

from fewstep.bundle import Bundle
from fewstep.errors import BundleError, ContractError
from fewstep.feeds import Sample, load_samples
from fewstep.manifest import Manifest, SourceInfo
from fewstep.progress import Progress, Silent, stage
from fewstep.recipe import Limits, Recipe, parse_shapes
from fewstep.runtimes.parity import COMPRESSION, ParityReport, compare_components, compare_samples
from fewstep.runtimes.sampler import open_sampler
from fewstep.source import SourceSpec

if TYPE_CHECKING:
    from fewstep.export import Generator
    from fewstep.optimize.passes import PassNote
    from fewstep.runtimes.ort_bisect import Departure

PYTORCH = "PyTorch, the generator's own pipeline, run now"
GOLDEN = "the bundle's golden pack, recorded from PyTorch when it was built"


@dataclass(frozen=True)
class Verification:
    """A parity report with the samples behind it, reference first, and what it does not prove."""

    report: ParityReport
    references: tuple[Sample, ...]
    results: tuple[Sample, ...]
    caveats: tuple[str, ...]
    departures: dict[str, Departure | None] = field(default_factory=dict)

    def and_at(self, shape: str, other: Verification) -> Verification:
        """Returns the verification with the checks of another shape's."""
        checks = tuple(replace(check, sample=f"{check.sample}, {shape}") for check in other.report.checks)
        return replace(self, report=replace(self.report, checks=self.report.checks + checks))


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
        golden = _golden(bundle, "")
        caveats = [f"compared with the golden pack and not with PyTorch: {reason}"]
        if bisect:
            caveats.append("not bisected: that needs the source")
        verified = verify_against(
            bundle, golden, None, limits, runtime=runtime, reference=GOLDEN, caveats=caveats, progress=progress
        )
        for shape in bundle.manifest.shapes:
            at, golden = bundle.shaped(shape), _golden(bundle, shape)
            found = verify_against(at, golden, None, limits, runtime=runtime, reference=GOLDEN, progress=progress)
            verified = verified.and_at(shape, found)
        return verified
    original = _load(bundle, source, progress)
    lowered_from, uncompressed = _live_references(bundle, original, prompts, seeds, progress)
    verified = verify_against(bundle, lowered_from, uncompressed, limits, runtime=runtime, progress=progress)
    for shape in bundle.manifest.shapes:
        at = bundle.shaped(shape)
        references = _live_references(at, original, 1, 1, progress)
        found = verify_against(at, *references, limits, runtime=runtime, progress=progress)
        verified = verified.and_at(shape, found)
    if bisect and not verified.report:
        verified.departures.update(_bisect(bundle, source, verified, runtime or bundle.manifest.runtimes[0], limits))
    return verified


def verify_against(
    bundle: Bundle,
    references: Sequence[Sample],
    uncompressed: Sequence[Sample] | None,
    limits: Limits,
    *,
    runtime: str | None = None,
    reference: str = PYTORCH,
    caveats: Sequence[str] = (),
    progress: Progress | None = None,
) -> Verification:
    """Returns the comparison of a bundle with recorded references.

    ``references`` are samples of the network that was lowered; ``uncompressed`` the same samples of the original, None
    where they are the same network.
    """
    progress = progress or Silent()
    manifest = bundle.manifest
    name = runtime or manifest.runtimes[0]
    sampler = open_sampler(bundle, runtime=name)
    try:
        with stage(progress, "compare components"):
            checks = compare_components(references, sampler.session, limits)
        advance = progress.task("compare samples", len(references))
        results = []
        for r in references:
            results.append(sampler(r.prompt, r.seed, manifest.schedule(r.steps), guidance=r.guidance, inputs=r.inputs))
            advance()
    finally:
        sampler.close()
    checks += compare_samples(references, results, limits)
    if uncompressed is not None:
        checks += compare_samples(uncompressed, references, limits, error=COMPRESSION)
    first = manifest.artifact(name, next(iter(manifest.components)))
    executor = f"{name}, {first.weights} weights, {first.compute} compute"
    notes = list(caveats)
    if first.weights != first.compute:
        notes.append(
            f"{name} computes in {first.compute}: its CPU provider has no {first.weights} kernels, "
            f"so this is no {first.weights} baseline"
        )
    return Verification(
        ParityReport(tuple(checks), reference, executor), tuple(references), tuple(results), tuple(notes)
    )


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


def _golden(bundle: Bundle, shape: str) -> list[Sample]:
    """Returns the golden samples of one of the further shapes, or those of the first."""
    golden = load_samples(bundle.path / "golden" / shape)
    if not golden:
        what = f"golden samples of shape {shape}" if shape else "golden samples"
        raise BundleError(f"{bundle.path} has no {what} to verify against", hint="give --against SOURCE")
    return golden


def _load(bundle: Bundle, source: SourceSpec, progress: Progress) -> Generator:
    """Returns the generator that a bundle was built from, before its recipe."""
    from fewstep.export import load

    with stage(progress, f"load {source}"):
        original = load(source, guidance=bundle.manifest.contract.guidance.scale)
        _check_same(bundle.manifest.source, original.source)
    return original


def _live_references(
    bundle: Bundle, original: Generator, prompts: int, seeds: int, progress: Progress
) -> tuple[list[Sample], list[Sample] | None]:
    """Returns samples of the network that a bundle of one shape was lowered from, and of the original if it differs."""
    from fewstep.calibration import SampleRequest, record_samples
    from fewstep.export import describe

    manifest = bundle.manifest
    with stage(progress, "read the contract"):
        original = _as_built(original, manifest)
        optimized, notes = _optimized(original, manifest)
        described = describe(optimized, sorted(manifest.schedules))
    changed = any(note.modified for note in notes)
    w = manifest.contract.guidance.scale
    requests = SampleRequest.grid(original, manifest.prompts[:prompts], range(seeds), manifest.default_steps, w)
    requests += [replace(requests[0], steps=n) for n in manifest.schedules if n != manifest.default_steps]
    advance = progress.task("run the reference", len(requests) * (2 if changed else 1))

    def run(generator: object) -> list[Sample]:
        samples = []
        for sample in record_samples(generator, described, requests):  # type: ignore[arg-type]
            samples.append(sample)
            advance()
        return samples

    return run(optimized), run(original) if changed else None


def _as_built(generator: Generator, manifest: Manifest) -> Generator:
    """Returns a generator that draws and decodes at the sizes of a manifest."""
    tile = manifest.recipe.get("decoder_tile")
    generator = generator if tile is None else generator.tiled(tile)
    return generator if manifest.shape is None else generator.shaped(*parse_shapes(manifest.shape, "manifest")[0])


def _optimized(generator: Generator, manifest: Manifest) -> tuple[Generator, list[PassNote]]:
    from fewstep.optimize import optimize

    return optimize(generator, Recipe("", weights=manifest.recipe["weights"]))


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
    from fewstep.export import describe, load, trace
    from fewstep.runtimes.ort_bisect import bisect

    manifest = bundle.manifest
    original = load(source, guidance=manifest.contract.guidance.scale, eager=True)
    generator, _ = _optimized(_as_built(original, manifest), manifest)
    described = describe(generator, sorted(manifest.schedules))
    failing = {check.component for check in verified.report.failures if check.level == "component"}
    found: dict[str, Departure | None] = {}
    for component in sorted(failing):
        program = trace(generator, described.wirings[component], described.components[component])
        feed = next(f for sample in verified.references for f in sample.feeds if f.component == component)
        path = bundle.file(manifest.artifact(runtime, component).path)
        found[component] = bisect(program, path, feed.inputs, limit_db=limits.component_sqnr_db)
    return found

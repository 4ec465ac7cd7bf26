"""What a bundle is compared with: the generator it was built from, prepared as its recipe says, or its golden pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import util
from typing import TYPE_CHECKING

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.golden_headers import golden_paths
from fewstep.bundle.manifest import INTEGERS, PLAN_FOLDER, Manifest, TokenizerSpec
from fewstep.bundle.samples import Sample, load_sample
from fewstep.bundle.source import FUNCTION, PYTHON, SourceInfo, SourceSpec
from fewstep.bundle.variants import parts
from fewstep.errors import BundleError, ContractError, SourceError
from fewstep.pipeline.shape_and_batch import batch_requests, batched_programs, restate
from fewstep.progress import Progress, stage
from fewstep.recipe.call_options import only_python
from fewstep.recipe.recipe import Limits, Recipe, parse_shapes
from fewstep.runtimes.parity.harness import Agreement, Floor
from fewstep.runtimes.sampling.sampler import open_tokenizers
from fewstep.text.cleaners import cleaner_notes

if TYPE_CHECKING:
    from fewstep.export import Generator, Programs
    from fewstep.optimize.quantize import QuantizedPrograms

# Two executions of one network in PyTorch that agree to less than this would be two networks: a random one of 8 bits,
# whose roundings grow the most, agrees to 27 dB.
LEAST_FLOOR_DB, LEAST_FLOOR_COUNT = 15.0, 1


def usable_source(bundle: Bundle, against: str | SourceSpec | None) -> tuple[SourceSpec | None, str]:
    """Returns the source to compare with, or None and why there is none."""
    built_from = bundle.manifest.source
    unknown = only_python(built_from.options)
    if against is not None:
        if unknown:
            raise SourceError(
                f"{bundle.path} was built with {', '.join(unknown)} from Python, and its manifest cannot hold their "
                "values: the source alone is not what it was built from",
                hint="verify without --against to compare with the golden pack, or in Python build the bundle again",
            )
        return SourceSpec.of(against).otherwise(built_from.spec()), ""
    for package in ("torch", "diffusers"):
        if util.find_spec(package) is None:
            return None, f"{package} is not installed"
    if unknown:
        return None, f"its options {', '.join(unknown)} were given in Python, and the manifest cannot hold their values"
    if built_from.kind == FUNCTION:
        named = f"--against {built_from.uri}"
        return None, f"it was built by the Python function {built_from.uri}, which runs only if you name it: {named}"
    if built_from.kind == PYTHON:
        return None, f"{built_from.uri} was assembled in Python, and only the process that did so has it"
    from fewstep.export import missing

    gone = missing(built_from)
    return (built_from.spec(), "") if gone is None else (None, f"{gone} is not on this machine")


def golden_samples(bundle: Bundle, shape: str) -> list[Sample]:
    """Returns the golden samples of one of the further shapes, or those of the first."""
    golden = [load_sample(bundle.file(path)) for path in golden_paths(bundle.manifest, shape)]
    if not golden:
        what = f"golden samples of shape {shape}" if shape else "golden samples"
        raise BundleError(f"{bundle.path} has no {what} to verify against", hint="give --against SOURCE")
    return golden


def load_original(bundle: Bundle, source: SourceSpec, progress: Progress) -> Generator:
    """Returns the generator that a bundle was built from, before its recipe."""
    from fewstep.export import load

    with stage(progress, f"load {source}"):
        recipe = bundle.manifest.recipe
        eager = any(recipe.get(key) is not None for key in ("quantization", "palette", "sparsity"))
        original = load(source, guidance=recipe.get("guidance"), eager=eager)
        _check_same(bundle.manifest.source, original.source)
    return original


def as_built(generator: Generator, manifest: Manifest) -> Generator:
    """Returns a generator that draws and decodes at the sizes of a manifest."""
    tile = manifest.recipe.get("decoder_tile")
    generator = generator if tile is None else generator.tiled(tile)
    shape, _ = parts(manifest.shape or "") or ("", 1)
    return generator.shaped(*parse_shapes(shape, "manifest")[0]) if shape else generator


@dataclass(frozen=True)
class Live:
    """What a bundle of one shape is compared with, computed now.

    Attributes:
        samples: of the network that was lowered.
        uncompressed: the same of the original network, if it is another one.
        quantized: the network that was lowered, if it is quantized.
        programs: the contract and the components, as they are read from the source now.
        recorded: samples of the generator's own pipeline, with the calls as the bundle's components take them.
    """

    samples: list[Sample]
    uncompressed: list[Sample] | None
    quantized: QuantizedPrograms | None
    programs: Programs
    recorded: list[Sample]


def live_references(bundle: Bundle, original: Generator, prompts: int, seeds: int, progress: Progress) -> Live:
    """Returns what a bundle of one shape was lowered from, its samples, and the original's if they differ.

    Of a bundle that draws several samples at once, the samples are one batch.
    """
    from fewstep.calibration import SampleRequest, record_samples

    manifest = bundle.manifest
    batch = manifest.contract.batch
    with stage(progress, "read the contract"):
        original = as_built(original, manifest)
        optimized, programs, quantized, changed = prepare(bundle, original)
        described = programs.described
        if batch > 1:
            programs = batched_programs(programs, replace(recipe_of(manifest), batch=batch))
    w = manifest.contract.guidance.scale
    if batch > 1:
        requests = batch_requests(
            replace(original, prompts=manifest.prompts, default_steps=manifest.default_steps, guidance=w), batch
        )
    else:
        requests = SampleRequest.grid(original, manifest.prompts[:prompts], range(seeds), manifest.default_steps, w)
        requests += [replace(requests[0], steps=n) for n in manifest.schedules if n != manifest.default_steps]
        requests += requests[0].beside(manifest.contract.guidance, off=quantized is None)
    advance = progress.task("run the reference", len(requests) * (2 if changed else 1))

    def run(generator: Generator) -> list[Sample]:
        samples = []
        for sample in record_samples(generator, described, requests):
            samples.append(sample)
            advance()
        return samples

    uncompressed = run(original) if changed else None
    if quantized is None:
        samples = restate(run(optimized), programs)
        return Live(samples, uncompressed, None, programs, samples)
    assert uncompressed is not None, "quantization changes every network"
    samples = list(quantized.samples(requests))
    # A corrected table is not the pipeline's: the samples of the quantized network were drawn with it.
    corrected = bool((manifest.recipe["quantization"] or {}).get("correction"))
    return Live(samples, uncompressed, quantized, programs, samples if corrected else restate(uncompressed, programs))


def limits_of(manifest: Manifest) -> Limits:
    """Returns the least that a bundle must keep.

    Raises:
        BundleError: its recipe does not say.
    """
    try:
        return Limits(**manifest.recipe["limits"])
    except (KeyError, TypeError) as error:
        raise BundleError(f"the bundle's recipe has no limits: {error}", hint="build the bundle again") from error


def recipe_of(manifest: Manifest) -> Recipe:
    """Returns what a bundle's recipe did to the generator's networks, but for their quantization."""
    recipe = manifest.recipe
    return Recipe(
        "",
        weights=recipe.get("weights", "fp32"),
        palette=recipe.get("palette"),
        palette_choices=recipe.get("palette_choices") or {},
        sparsity=recipe.get("sparsity"),
        form=manifest.contract.form,
    )


def prepare(bundle: Bundle, original: Generator) -> tuple[Generator, Programs, QuantizedPrograms | None, bool]:
    """Returns the generator as the bundle's recipe made it, its programs, and whether the recipe changed it."""
    from fewstep.export import describe, programs_of
    from fewstep.optimize import optimize
    from fewstep.optimize.quantize import QuantizedPrograms, QuantPlan

    manifest = bundle.manifest
    recipe = recipe_of(manifest)
    optimized, notes = optimize(original, recipe)
    described = describe(optimized, sorted(manifest.schedules))
    _check_texts_read_alike(manifest, described.tokenizers)
    programs = programs_of(optimized, described, recipe)
    changed = any(note.modified for note in notes)
    if manifest.recipe.get("quantization") is None:
        return optimized, programs, None, changed
    plan = QuantPlan.load(bundle.path / PLAN_FOLDER)
    tokenizers = open_tokenizers(bundle.path, manifest.tokenizers)
    return optimized, programs, QuantizedPrograms(programs, plan, tokenizers, manifest.schedules), True


def _check_texts_read_alike(manifest: Manifest, tokenizers: Mapping[str, TokenizerSpec]) -> None:
    """Raises ContractError if a pipeline does something else to texts than its bundle was built to do."""
    for name in sorted(manifest.tokenizers.keys() | tokenizers.keys()):
        specs = manifest.tokenizers.get(name), tokenizers.get(name)
        ours, theirs = ({} if spec is None else asdict(spec) for spec in specs)
        for key in ours.keys() | theirs.keys():
            if ours.get(key) != theirs.get(key):
                raise ContractError(
                    f"{name}: {key} is {ours.get(key)!r} in the bundle and {theirs.get(key)!r} in the pipeline, "
                    "expected both to read prompts alike",
                    hint="; ".join([*cleaner_notes(manifest.versions), "build the bundle again"]),
                )


def known_floor(bundle: Bundle) -> Floor:
    """Returns the noise floor as it was when the bundle was built.

    Raises:
        BundleError: the bundle does not say.
    """
    known = (bundle.manifest.parity or {}).get("floor")
    if known is None:
        raise BundleError(f"{bundle.path} does not say what its noise floor is", hint="build the bundle again")
    try:
        floor = Floor.from_json(known)
        agreements = [floor.picture, *(floor.components[name] for name in _integers(bundle.manifest))]
        usable = all(_is_plausible(agreement) for agreement in agreements)
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"{bundle.path} states its noise floor in another form than this fewstep does",
            hint="build the bundle again",
        ) from error
    if not usable:
        raise ContractError(
            f"{bundle.path} states a noise floor of {floor.picture.median_db:g} dB, expected {LEAST_FLOOR_DB:g} to 150 "
            f"of {LEAST_FLOOR_COUNT} calls or more",
            hint="build the bundle again",
        )
    return floor


def _integers(manifest: Manifest) -> set[str]:
    return {artifact.component for artifact in manifest.artifacts if artifact.compute == INTEGERS}


def _is_plausible(agreement: Agreement) -> bool:
    """Returns whether two executions of a network can agree so."""
    return (
        LEAST_FLOOR_DB <= agreement.median_db <= 150
        and 0 <= agreement.spread_db <= 150
        and agreement.count >= LEAST_FLOOR_COUNT
    )


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

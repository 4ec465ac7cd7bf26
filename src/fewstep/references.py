"""What a bundle is compared with: the generator it was built from, prepared as its recipe says, or its golden pack."""

from __future__ import annotations

from dataclasses import replace
from importlib import util
from typing import TYPE_CHECKING

from fewstep.bundle import Bundle
from fewstep.errors import BundleError, ContractError
from fewstep.feeds import Sample, load_sample
from fewstep.further import batch_requests, batched_programs, restate
from fewstep.golden import golden_paths
from fewstep.manifest import PLAN_FOLDER, Manifest
from fewstep.progress import Progress, stage
from fewstep.recipe import Limits, Recipe, parse_shapes
from fewstep.runtimes.parity import Floor
from fewstep.runtimes.sampler import open_tokenizers
from fewstep.source import FUNCTION, PYTHON, SourceInfo, SourceSpec
from fewstep.variants import parts

if TYPE_CHECKING:
    from fewstep.export import Generator, Programs
    from fewstep.optimize.quantize import QuantizedPrograms


def usable_source(bundle: Bundle, against: str | SourceSpec | None) -> tuple[SourceSpec | None, str]:
    """Returns the source to compare with, or None and why there is none."""
    built_from = bundle.manifest.source
    if against is not None:
        return SourceSpec.of(against).otherwise(built_from.spec()), ""
    for package in ("torch", "diffusers"):
        if util.find_spec(package) is None:
            return None, f"{package} is not installed"
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
        original = load(source, guidance=bundle.manifest.contract.guidance.scale, eager=eager)
        _check_same(bundle.manifest.source, original.source)
    return original


def as_built(generator: Generator, manifest: Manifest) -> Generator:
    """Returns a generator that draws and decodes at the sizes of a manifest."""
    tile = manifest.recipe.get("decoder_tile")
    generator = generator if tile is None else generator.tiled(tile)
    shape, _ = parts(manifest.shape or "") or ("", 1)
    return generator.shaped(*parse_shapes(shape, "manifest")[0]) if shape else generator


def live_references(
    bundle: Bundle, original: Generator, prompts: int, seeds: int, progress: Progress
) -> tuple[QuantizedPrograms | None, list[Sample], list[Sample] | None]:
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
    advance = progress.task("run the reference", len(requests) * (2 if changed else 1))

    def run(generator: Generator) -> list[Sample]:
        samples = []
        for sample in record_samples(generator, described, requests):
            samples.append(sample)
            advance()
        return samples

    uncompressed = run(original) if changed else None
    if quantized is None:
        return None, restate(run(optimized), programs), uncompressed
    return quantized, list(quantized.samples(requests)), uncompressed


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
    programs = programs_of(optimized, describe(optimized, sorted(manifest.schedules)), recipe)
    changed = any(note.modified for note in notes)
    if manifest.recipe.get("quantization") is None:
        return optimized, programs, None, changed
    plan = QuantPlan.load(bundle.path / PLAN_FOLDER)
    tokenizers = open_tokenizers(bundle.path, manifest.tokenizers)
    return optimized, programs, QuantizedPrograms(programs, plan, tokenizers, manifest.schedules), True


def known_floor(bundle: Bundle) -> Floor:
    """Returns the noise floor as it was when the bundle was built.

    Raises:
        BundleError: the bundle does not say.
    """
    known = (bundle.manifest.parity or {}).get("floor")
    if known is None:
        raise BundleError(f"{bundle.path} does not say what its noise floor is", hint="build the bundle again")
    try:
        return Floor.from_json(known)
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"{bundle.path} states its noise floor in another form than this fewstep does",
            hint="build the bundle again",
        ) from error


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

"""The whole pipeline on one page: a generator in, a verified bundle out."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.bundle.bundle import Bundle, check_writable, write_manifest, writing
from fewstep.bundle.manifest import PLAN_FOLDER, Manifest
from fewstep.bundle.samples import Sample, save_samples
from fewstep.bundle.source import Lora, SourceSpec, source_notes
from fewstep.cache import StageCache
from fewstep.errors import ParityError
from fewstep.faults import naming_packages
from fewstep.numerics.guidance import write_unconditional
from fewstep.pipeline.compile import (
    check_comparable,
    check_graphs,
    check_images,
    check_size,
    check_targets,
    compile_targets,
    record_reference,
    versions,
)
from fewstep.pipeline.shape_and_batch import Further, further_programs
from fewstep.progress import Progress, Silent, stage
from fewstep.proof.checks import recorded_checks
from fewstep.proof.golden_tokens import write_tokens
from fewstep.proof.user_calls import Told, UserCalls
from fewstep.recipe.quantization import for_targets
from fewstep.recipe.recipe import Recipe, check_batch, check_form, check_steps, load_recipe, parse_shapes
from fewstep.runtimes.parity.golden_operations import save_operations
from fewstep.runtimes.sampling.sampler import open_tokenizers

if TYPE_CHECKING:
    from fewstep.calibration import SampleRequest
    from fewstep.export import Description, Generator, Programs
    from fewstep.optimize.quantize import QuantizedPrograms

PROMPTS, SEEDS = 8, 2
# How many recorded samples backends see that choose a precision by values.
COMPILE_SAMPLES = 1
# How many samples are decoded again to look for values beyond fp16.
FP16_SAMPLES = 2
# How many samples of the golden pack carry every network call, and how large the pack may grow with the others.
GOLDEN_WITH_FEEDS, GOLDEN_BYTES = 2, 32 << 20


@dataclass(frozen=True)
class Options:
    """What a build needs to know beside the recipe."""

    prompts: int = PROMPTS
    seeds: int = SEEDS
    profile: bool = True
    cache_root: Path | None = None
    check_fp16: bool = False
    """Look for decoder values beyond fp16 whatever the recipe; recipes with fp16 weights always do."""


@naming_packages()
def build(
    source: str | SourceSpec | Generator,
    recipe: str | Recipe = "fp32",
    targets: Sequence[str] = ("onnxruntime",),
    out: str | Path = "bundle",
    *,
    loras: Sequence[str | Lora] = (),
    decoder: str | None = None,
    steps: Sequence[int] | None = None,
    guidance: float | None = None,
    shape: str | None = None,
    decoder_tile: int | None = None,
    batch: int | None = None,
    form: str | None = None,
    image_output: bool | None = None,
    pipeline_options: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
    options: Options | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Returns the bundle of a generator, compiled for every target and verified against PyTorch.

    Args:
        source: a diffusers folder, a hub id, ``module:function`` or ``stickers``; or a `SourceSpec`, which also names
            single-file checkpoints with their configurations, and files for single components; or a `Generator`.
        recipe: a preset's name, a TOML file, or a `Recipe`.
        targets: runtimes to compile for.
        out: where the bundle goes. It appears when everything is done, or not at all.
        loras: LoRA files to merge, ``FILE`` or ``FILE=SCALE``; none takes the source's, then the recipe's.
        decoder: folder of a decoder to use instead; None takes the source's, then the recipe's, then its own.
        steps: step counts that the bundle can sample with; None takes the recipe's, then the generator's.
        guidance: guidance scale; None takes the recipe's, then the generator's.
        shape: height and width of the pictures such as ``512x768``, or several with commas between them, of which the
            first is the default; None takes the recipe's, then the generator's.
        decoder_tile: decode in overlapping tiles of so many pixels to a side; None takes the recipe's.
        batch: how many pictures the bundle can draw at once, beside one; None takes the recipe's.
        form: ``step``, ``table`` or ``specialized``, see `fewstep.export.programs`; None takes the recipe's, then what
            suits the steps.
        image_output: whether the decoder gives an image of 8 bits, on runtimes that have such outputs; None takes the
            recipe's.
        pipeline_options: further arguments of every call of the pipeline, such as ``{"strength": 0.5}``, over the
            recipe's and the source's.
        inputs: images that the pipeline can do without and that the bundle takes, such as ``["image"]``.
        options: how much to verify, and where to cache.
        progress: told where the build is.

    Raises:
        FewstepError: by kind, see `fewstep.errors`; a ParityError leaves its evidence in ``<out>.failed``.
    """
    # torch is needed to compile a bundle, not to run one: `import fewstep` must work without it.
    from fewstep.export import (
        check_counts,
        describe,
        diffusers_files,
        lay_over,
        load,
        programs_of,
        recorded_source,
        write_tokenizers,
    )
    from fewstep.optimize import optimize
    from fewstep.optimize.mixed_palettes import choose_palettes
    from fewstep.pipeline.verify import verify_targets, with_calls
    from fewstep.report.assemble import write_bundle_report
    from fewstep.runtimes import get_runtime
    from fewstep.runtimes.coreml.compile.swift_resources import write_resources
    from fewstep.runtimes.profiling import profile

    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    options, progress, out = options or Options(), progress or Silent(), Path(out)
    check_writable(out)
    check_targets(targets)
    recipe = replace(recipe, quantization=for_targets(recipe.quantization, targets))
    if shape is not None:
        recipe = replace(recipe, shape=parse_shapes(shape, "shape"))
    if decoder_tile is not None:
        recipe = replace(recipe, decoder_tile=decoder_tile)
    if batch is not None:
        recipe = replace(recipe, batch=check_batch(batch, "batch"))
    if form is not None:
        recipe = replace(recipe, form=check_form(form, "form"))
    if image_output is not None:
        recipe = replace(recipe, image_output=image_output)
    check_graphs(targets, recipe)
    if guidance is not None:
        recipe = replace(recipe, guidance=guidance)
    check_images(targets, recipe)
    cache = StageCache(options.cache_root)

    over = tuple(Lora.of(lora) for lora in loras)
    given = SourceSpec("", over, decoder, options=dict(pipeline_options or {}), inputs=tuple(inputs))
    with stage(progress, f"load {source if isinstance(source, (str, SourceSpec)) else source.name}"):
        w = recipe.guidance
        if isinstance(source, (str, SourceSpec)):
            spec = given.otherwise(SourceSpec.of(source)).otherwise(recipe.adapters)
            # Recipes that look at every weight several times hold them all.
            original = load(spec, guidance=w, eager=recipe.whole)
        else:
            original = load(lay_over(source, given.otherwise(recipe.adapters)), guidance=w)
        original = sized(original, recipe)
    recipe = choose_palettes(original, recipe, progress)
    with stage(progress, "optimize and read the contract"):
        optimized, notes = optimize(original, recipe)
        counts = check_steps(steps or recipe.steps or original.steps, "steps")
        check_counts(original, counts)
        optimized = replace(optimized, default_steps=_default_steps(original.default_steps, counts))
        described = describe(optimized, counts)
        programs = programs_of(optimized, described, recipe)
        others = further_programs(programs, recipe)

    told = Told.of(described.contract, optimized.default_steps, described.schedules, original)
    called = spec if isinstance(source, (str, SourceSpec)) else original
    with closing(UserCalls.of(called, told)) as calls, writing(out) as folder:
        write_tokenizers(optimized, described.tokenizers, folder)
        quantized = quantize_programs(programs, recipe, folder, cache, progress)
        check_comparable(targets, quantized)
        changed = quantized is not None or any(note.modified for note in notes)

        def reference(at: Further, requests: Sequence[SampleRequest]) -> tuple[list[Sample], list[Sample] | None]:
            generator, told, uncompressed = at.alone.generator, at.alone.described, None
            if changed:
                before, plain = Recipe("original"), at.plain(original)
                uncompressed = record_reference(plain, told, requests, before, cache, progress)
            if quantized is not None:
                return list(quantized.samples(requests)), uncompressed
            return at.restate(record_reference(generator, told, requests, recipe, cache, progress)), uncompressed

        first = Further(programs, programs, None)
        lowered_from, uncompressed = reference(first, _requests(optimized, described, options, quantized is None))
        shown = lowered_from[:COMPILE_SAMPLES]
        artifacts = compile_targets(
            quantized or programs,
            recipe,
            targets,
            folder,
            cache,
            progress,
            {name: at.programs for name, at in others.items()},
            samples=shown,
        )
        check_size(artifacts, recipe)
        if "onnxruntime" in targets and programs.contract.form == "step":
            _write_layout(diffusers_files(optimized), described.tokenizers, folder)
        if "coreml" in targets:
            write_resources(folder / "coreml", [folder / name for name in described.tokenizers])
        write_unconditional(described.contract.guidance, described.guided.values, folder)
        _write_golden(lowered_from, folder / "golden")
        write_tokens(folder, open_tokenizers(folder, described.tokenizers))
        save_operations(() if quantized is None else quantized.operations(lowered_from[0]), folder)
        beside = {name: reference(at, at.requests()) for name, at in others.items()}
        for name, (samples, _) in beside.items():
            _write_golden(samples, folder / "golden" / name, least=len(samples))
        manifest = Manifest(
            name=optimized.name,
            source=recorded_source(optimized, counts),
            pipeline=type(optimized.pipeline).__name__,
            contract=programs.contract,
            components=programs.components,
            tokenizers=described.tokenizers,
            schedules=described.schedules if quantized is None else quantized.schedules,
            default_steps=optimized.default_steps,
            artifacts=tuple(artifacts),
            recipe={**recipe.to_json(), "notes": [asdict(note) for note in notes]},
            prompts=optimized.prompts,
            licences=optimized.licences,
            versions=versions(),
            shape="{}x{}".format(*recipe.shape[0]) if recipe.shape else None,
            shapes={name: at.shaped() for name, at in others.items()},
        )
        manifest = write_manifest(folder, manifest)
        caveats = _caveats(optimized, described, lowered_from, recipe, options)
        verified = verify_targets(
            Bundle(folder, manifest),
            lowered_from,
            uncompressed,
            recipe.limits,
            quantized=quantized,
            caveats=caveats,
            progress=progress,
        )
        verified = verified.with_checks(recorded_checks(Bundle(folder, manifest), lowered_from))
        for name, references in beside.items():
            found = verify_targets(Bundle(folder, manifest.shaped(name)), *references, recipe.limits, progress=progress)
            verified = verified.and_at(name, found)
        verified = with_calls(verified, calls, Bundle(folder, manifest), manifest.runtimes, recipe.limits, progress)
        timed = [t for t in targets if get_runtime(t).availability().runs] if options.profile else []
        profiles = [profile(Bundle(folder, manifest), runtime=t, runs=5) for t in timed]
        manifest = replace(manifest, parity=verified.report.summary(), caveats=tuple(verified.caveats))
        write_bundle_report(folder / "report", manifest, verified, profiles, quantized, programs.removed)
        manifest = write_manifest(folder, manifest)
        if not verified.report:
            raise _refused(out, folder, verified.report.failures[0].where)
    return Bundle(out, manifest)


def sized(generator: Generator, recipe: Recipe) -> Generator:
    """Returns a generator that draws at a recipe's first shape and decodes in its tiles."""
    generator = generator if recipe.decoder_tile is None else generator.tiled(recipe.decoder_tile)
    return generator.shaped(*recipe.shape[0]) if recipe.shape else generator


def quantize_programs(
    programs: Programs, recipe: Recipe, folder: Path, cache: StageCache, progress: Progress
) -> QuantizedPrograms | None:
    """Returns programs quantized by a plan made from the generator's own trajectories; None for a recipe in float.

    The plan is written to a folder of ``folder``, where the tokenizers are.
    """
    if recipe.quantization is None:
        return None
    from fewstep.calibration import collect, trajectory_key
    from fewstep.optimize.quantize import QuantizedPrograms, corrected_schedules, make_plan, write_table

    q, generator, described = recipe.quantization, programs.generator, programs.described
    # All that tells its shards from others': builds at the same time would remove each other's from one folder.
    key = {
        **trajectory_key(described, generator.default_steps),
        "prompts": generator.calibration_prompts or generator.prompts,
        "guidance": generator.guidance,
        "sampler": q.sampler,
        "samples": q.samples,
        "seed": q.seed,
    }
    calls = collect(
        generator,
        described,
        q.sampler,
        generator.calibration_prompts or generator.prompts,
        size=q.samples * generator.default_steps,
        seed=q.seed,
        steps=generator.default_steps,
        guidance=generator.guidance,
        folder=cache.folder("calibration", key),
        progress=progress,
    )
    tokenizers = open_tokenizers(folder, described.tokenizers)
    plan = make_plan(programs, q, calls, progress, tokenizers=tokenizers)
    plan.save(folder / PLAN_FOLDER)
    quantized = QuantizedPrograms(programs, plan, tokenizers, described.schedules, calls)
    write_table({name: quantized.make(name) for name in quantized.components}, folder)
    schedules = corrected_schedules(programs, plan, calls) if q.correction else described.schedules
    return replace(quantized, schedules=schedules)


def _default_steps(wanted: int, counts: Sequence[int]) -> int:
    return wanted if wanted in counts else min(counts, key=lambda n: (abs(n - wanted), n))


def _requests(generator: Generator, described: Description, options: Options, in_float: bool) -> list[SampleRequest]:
    """Every prompt with every seed at the default step count, then one at each other count, then other guidance.

    Guidance that the bundle does not use by default is not calibrated: it is shown of programs ``in_float`` alone.
    """
    from fewstep.calibration import SampleRequest

    prompts, w = generator.prompts[: options.prompts], generator.guidance
    main = SampleRequest.grid(generator, prompts, range(options.seeds), generator.default_steps, w)
    others = [n for n in sorted(described.schedules) if n != generator.default_steps]
    beside = main[0].beside(described.contract.guidance, off=in_float)
    return main + [replace(main[0], steps=n) for n in others] + beside


def _caveats(
    generator: Generator, described: Description, samples: Sequence[Sample], recipe: Recipe, options: Options
) -> list[str]:
    """What parity on this machine does not show: what is left out, and values that a phone would lose in fp16."""
    from fewstep.calibration import overflow_caveat

    notes = source_notes(generator.source)
    if recipe.weights != "fp16" and not options.check_fp16:
        return notes
    caveat = overflow_caveat(generator, described, samples[:FP16_SAMPLES])
    return notes if caveat is None else [*notes, caveat]


def _write_golden(samples: Sequence[Sample], folder: Path, *, least: int = GOLDEN_WITH_FEEDS) -> None:
    """Writes the golden pack: the first samples with every call, others with latents and picture while they fit.

    At least ``least`` samples are written, whatever their size.
    """
    kept, size = [], 0
    for i, sample in enumerate(samples):
        size += sample.output.nbytes + sum(x.nbytes for x in sample.latents)
        if i >= least and size > GOLDEN_BYTES:
            break
        kept.append(sample)
    save_samples(kept, folder, with_feeds=GOLDEN_WITH_FEEDS)


def _write_layout(files: Mapping[str, str], tokenizers: Iterable[str], folder: Path) -> None:
    """Adds to ``onnxruntime/`` what ONNX Runtime users of diffusers models expect beside the networks."""
    for relative, text in files.items():
        path = folder / "onnxruntime" / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name in tokenizers:
        shutil.copytree(folder / name, folder / "onnxruntime" / name)


def _refused(out: Path, folder: Path, where: str) -> ParityError:
    """Keeps the evidence of a failed build beside ``out`` and returns the error that says so."""
    failed = out.with_name(f"{out.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    shutil.copytree(folder, failed)
    return ParityError(
        f"{out.name} is not what PyTorch computes: {where} is below its limit; no bundle was written",
        hint=f"open {failed / 'report' / 'index.html'}; "
        f"`fewstep verify {failed} --bisect` names the first tensor that departs",
    )

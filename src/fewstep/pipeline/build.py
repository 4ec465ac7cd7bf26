"""The whole pipeline on one page: a generator in, a verified bundle out."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.bundle.bundle import Bundle, check_writable, write_manifest, writing
from fewstep.bundle.manifest import Artifact, Manifest
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
from fewstep.pipeline.prepare import Prepared, prepare, quantize_programs
from fewstep.pipeline.shape_and_batch import Further
from fewstep.pipeline.verify import Verification, verify_targets, with_calls
from fewstep.progress import Progress, Silent
from fewstep.proof.checks import recorded_checks
from fewstep.proof.golden_tokens import write_tokens
from fewstep.proof.user_calls import UserCalls
from fewstep.recipe.quantization import for_targets
from fewstep.recipe.recipe import Recipe, check_batch, check_form, load_recipe, parse_shapes
from fewstep.report.assemble import write_bundle_report
from fewstep.runtimes import get_runtime
from fewstep.runtimes.parity.golden_operations import save_operations
from fewstep.runtimes.profiling import profile
from fewstep.runtimes.sampling.sampler import open_tokenizers

if TYPE_CHECKING:
    from fewstep.calibration import SampleRequest
    from fewstep.export import Description, Generator
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
        decoder_tile: decode in overlapping tiles of N x N pixels; None takes the recipe's.
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
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    options, progress, out = options or Options(), progress or Silent(), Path(out)
    check_writable(out)
    check_targets(targets)
    given: dict[str, Any] = {
        "shape": None if shape is None else parse_shapes(shape, "shape"),
        "decoder_tile": decoder_tile,
        "batch": None if batch is None else check_batch(batch, "batch"),
        "form": None if form is None else check_form(form, "form"),
        "image_output": image_output,
        "guidance": guidance,
    }
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    recipe = replace(recipe, quantization=for_targets(recipe.quantization, targets))
    check_graphs(targets, recipe)
    check_images(targets, recipe)
    merged = tuple(Lora.of(lora) for lora in loras)
    over = SourceSpec("", merged, decoder, options=dict(pipeline_options or {}), inputs=tuple(inputs))
    return _build(prepare(source, recipe, over, steps, progress), targets, out, options, progress)


def _build(prepared: Prepared, targets: Sequence[str], out: Path, options: Options, progress: Progress) -> Bundle:
    """Quantize, record, compile, write, verify, report: the bundle appears when all of it is done."""
    cache = StageCache(options.cache_root)
    # The user's own calls run beside the compiler.
    with closing(UserCalls.of(prepared.source, prepared.told())) as calls, writing(out) as folder:
        _write_tokenizers(prepared, folder)
        quantized = quantize_programs(prepared.programs, prepared.recipe, folder, cache, progress)
        check_comparable(targets, quantized)
        references = _record(prepared, quantized, options, cache, progress)
        artifacts = _compile(prepared, quantized, targets, folder, cache, progress, references[""].expected)
        _write_parts(prepared, quantized, targets, folder, references)
        manifest = write_manifest(folder, _manifest(prepared, quantized, artifacts))
        verified = _verify(prepared, quantized, Bundle(folder, manifest), references, options, progress)
        verified = with_calls(
            verified, calls, Bundle(folder, manifest), manifest.runtimes, prepared.recipe.limits, progress
        )
        timed = [t for t in targets if get_runtime(t).availability().runs] if options.profile else []
        profiles = [profile(Bundle(folder, manifest), runtime=t, runs=5) for t in timed]
        manifest = replace(manifest, parity=verified.report.summary(), caveats=tuple(verified.caveats))
        write_bundle_report(folder / "report", manifest, verified, profiles, quantized, prepared.programs.removed)
        manifest = write_manifest(folder, manifest)
        if not verified.report:
            raise _refused(out, folder, verified.report.failures[0].where)
    return Bundle(out, manifest)


@dataclass(frozen=True)
class _References:
    """Samples that a bundle is held to, and those of the network before the recipe changed it."""

    expected: Sequence[Sample]
    uncompressed: Sequence[Sample] | None


def _write_tokenizers(prepared: Prepared, folder: Path) -> None:
    from fewstep.export import write_tokenizers

    write_tokenizers(prepared.generator, prepared.described.tokenizers, folder)


def _record(
    prepared: Prepared,
    quantized: QuantizedPrograms | None,
    options: Options,
    cache: StageCache,
    progress: Progress,
) -> dict[str, _References]:
    """Returns the references of the bundle's own shape by the name ``""``, and of the others by theirs."""
    programs, recipe = prepared.programs, prepared.recipe
    changed = quantized is not None or prepared.modified

    def of(at: Further, requests: Sequence[SampleRequest]) -> _References:
        uncompressed = None
        if changed:
            plain = at.plain(prepared.original)
            uncompressed = record_reference(plain, at.alone.described, requests, Recipe("original"), cache, progress)
        if quantized is not None:
            return _References(list(quantized.samples(requests)), uncompressed)
        recorded = record_reference(at.alone.generator, at.alone.described, requests, recipe, cache, progress)
        return _References(at.restate(recorded), uncompressed)

    requests = _requests(prepared.generator, prepared.described, options, quantized is None)
    first = of(Further(programs, programs, None), requests)
    return {"": first, **{name: of(at, at.requests()) for name, at in prepared.others.items()}}


def _compile(
    prepared: Prepared,
    quantized: QuantizedPrograms | None,
    targets: Sequence[str],
    folder: Path,
    cache: StageCache,
    progress: Progress,
    samples: Sequence[Sample],
) -> Sequence[Artifact]:
    others = {name: at.programs for name, at in prepared.others.items()}
    artifacts = compile_targets(
        quantized or prepared.programs,
        prepared.recipe,
        targets,
        folder,
        cache,
        progress,
        others,
        samples=samples[:COMPILE_SAMPLES],
    )
    check_size(artifacts, prepared.recipe)
    return artifacts


def _write_parts(
    prepared: Prepared,
    quantized: QuantizedPrograms | None,
    targets: Sequence[str],
    folder: Path,
    references: Mapping[str, _References],
) -> None:
    """Writes what lies in a bundle beside its networks and its manifest."""
    from fewstep.export import diffusers_files
    from fewstep.runtimes.coreml.compile.swift_resources import write_resources

    described, expected = prepared.described, references[""].expected
    if "onnxruntime" in targets and prepared.programs.contract.form == "step":
        _write_layout(diffusers_files(prepared.generator), described.tokenizers, folder)
    if "coreml" in targets:
        write_resources(folder / "coreml", [folder / name for name in described.tokenizers])
    write_unconditional(described.contract.guidance, described.guided.values, folder)
    write_tokens(folder, open_tokenizers(folder, described.tokenizers))
    save_operations(() if quantized is None else quantized.operations(expected[0]), folder)
    for name, of in references.items():
        least = len(of.expected) if name else GOLDEN_WITH_FEEDS
        _write_golden(of.expected, folder / "golden" / name, least=least)


def _manifest(prepared: Prepared, quantized: QuantizedPrograms | None, artifacts: Sequence[Artifact]) -> Manifest:
    from fewstep.export import recorded_source

    generator, described, recipe = prepared.generator, prepared.described, prepared.recipe
    return Manifest(
        name=generator.name,
        source=recorded_source(generator, prepared.counts),
        pipeline=type(generator.pipeline).__name__,
        contract=prepared.programs.contract,
        components=prepared.programs.components,
        tokenizers=described.tokenizers,
        schedules=described.schedules if quantized is None else quantized.schedules,
        default_steps=generator.default_steps,
        artifacts=tuple(artifacts),
        recipe={**recipe.to_json(), "notes": [asdict(note) for note in prepared.notes]},
        prompts=generator.prompts,
        licences=generator.licences,
        versions=versions(),
        shape="{}x{}".format(*recipe.shape[0]) if recipe.shape else None,
        shapes={name: at.shaped() for name, at in prepared.others.items()},
    )


def _verify(
    prepared: Prepared,
    quantized: QuantizedPrograms | None,
    bundle: Bundle,
    references: Mapping[str, _References],
    options: Options,
    progress: Progress,
) -> Verification:
    limits, own = prepared.recipe.limits, references[""]
    caveats = _caveats(prepared.generator, prepared.described, own.expected, prepared.recipe, options)
    verified = verify_targets(
        bundle, own.expected, own.uncompressed, limits, quantized=quantized, caveats=caveats, progress=progress
    )
    verified = verified.with_checks(recorded_checks(bundle, own.expected))
    for name in prepared.others:
        at, of = Bundle(bundle.path, bundle.manifest.shaped(name)), references[name]
        found = verify_targets(at, of.expected, of.uncompressed, limits, progress=progress)
        verified = verified.and_at(name, found)
    return verified


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

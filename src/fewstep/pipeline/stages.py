"""Single stages of a build, and looking into things: what the command line offers beside the whole pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from fewstep.bundle.bundle import MANIFEST, Bundle, writing
from fewstep.bundle.samples import Sample
from fewstep.bundle.seal import signer
from fewstep.bundle.source import SourceSpec
from fewstep.cache import StageCache
from fewstep.disk import beside, check_place, sync
from fewstep.errors import BundleError, ParityError
from fewstep.faults import naming_packages
from fewstep.numerics.inputs import example_inputs
from fewstep.numerics.metrics import psnr_db
from fewstep.pipeline.compile import check_images, check_targets, compile_targets
from fewstep.pipeline.prepare import prepare, quantize_programs
from fewstep.progress import Progress, stage
from fewstep.recipe.quantization import for_targets
from fewstep.recipe.recipe import Limits, check_steps, load_recipe
from fewstep.runtimes.sampling.sampler import open_sampler, open_tokenizers

if TYPE_CHECKING:
    from fewstep.calibration.sets import CalibrationSet
    from fewstep.runtimes.base import OpenLoop

Array = npt.NDArray[Any]
_ELSEWHERE = "free some space there, or choose another -o file"


@naming_packages()
def draw(
    bundle: Bundle,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    inputs: Sequence[Mapping[str, Array]],
    steps: int | None,
    guidance: float | None,
    negative: str | None,
    runtime: str | None,
    progress: Progress,
) -> list[Sample]:
    """Returns a sample for every prompt with its seed and other inputs, as many at once as the bundle draws.

    A single call holds one component in memory at a time.
    """
    manifest, size = bundle.manifest, bundle.manifest.contract.batch
    schedule = manifest.schedule(manifest.default_steps if steps is None else steps)
    sampler = open_sampler(bundle, runtime=runtime, keep_open=len(prompts) > size)
    advance = progress.task("steps", -(-len(prompts) // size) * schedule.steps)
    samples: list[Sample] = []
    try:
        for start in range(0, len(prompts), size):
            rows = slice(start, start + size)
            samples += sampler.batch(
                prompts[rows],
                seeds[rows],
                schedule,
                guidance=guidance,
                negative=negative,
                inputs=inputs[rows],
                on_step=lambda _, __: advance(),
            )
    finally:
        sampler.close()
    return samples


@naming_packages()
def inspect(source: str | SourceSpec) -> dict[str, Any]:
    """Returns what is in a bundle, or, by loading and running it once, in a source."""
    spec = SourceSpec.of(source)
    if spec == SourceSpec(spec.uri) and (Path(spec.uri) / MANIFEST).is_file():
        bundle = Bundle.open(spec.uri)
        return {**bundle.manifest.to_json(), "signed_by": signer(bundle.path), "unlisted": list(bundle.unlisted())}
    from fewstep.export import describe, load

    generator = load(spec)
    described = describe(generator, generator.steps)
    sizes = {
        name: sum(p.numel() for p in generator.module(wiring.part).parameters())
        for name, wiring in described.wirings.items()
        if wiring.call is not None
    }
    return {
        "name": generator.name,
        "pipeline": type(generator.pipeline).__name__,
        "source": asdict(generator.source),
        "parameters": sizes,
        "contract": asdict(described.contract),
        "components": {name: asdict(spec) for name, spec in described.components.items()},
        "schedules": {str(n): s.to_json() for n, s in described.schedules.items()},
        "licences": dict(generator.licences),
    }


@naming_packages()
def export(
    source: str | SourceSpec, out: Path, *, steps: Sequence[int] | None, guidance: float | None, progress: Progress
) -> list[Path]:
    """Writes every component as a ``torch.export`` program beside ``contract.json``, and returns the paths."""
    import torch

    from fewstep.export import describe, load, trace

    with _new_folder(out) as folder:
        with stage(progress, f"load {source}"):
            generator = load(source, guidance=guidance)
            described = describe(generator, check_steps(steps or generator.steps, "--steps"))
        advance = progress.task("trace", len(described.components))
        names = []
        for component, spec in described.components.items():
            program = trace(generator, described.wirings[component], spec)
            names.append(f"{component}.pt2")
            torch.export.save(program.exported, folder / names[-1])
            advance()
        contract = {
            "contract": asdict(described.contract),
            "components": {name: asdict(spec) for name, spec in described.components.items()},
            "schedules": {str(n): s.to_json() for n, s in described.schedules.items()},
        }
        (folder / "contract.json").write_text(json.dumps(contract, indent=1))
    return [out / name for name in (*names, "contract.json")]


@naming_packages()
def calibrate(
    source: str | SourceSpec,
    out: Path,
    *,
    steps: int | None,
    guidance: float | None,
    prompts: str,
    seeds: int,
    sampler: str,
    seed: int,
    progress: Progress,
) -> CalibrationSet:
    """Writes a calibration set: as many calls as every prompt with so many seeds makes; goes on if interrupted.

    ``prompts`` is how many of the generator's own to take, or a text file with one on each line.
    """
    from fewstep.calibration.prompts import calibration_prompts, read_prompts
    from fewstep.calibration.sets import collect, is_calibration_folder
    from fewstep.export import describe, load

    if not is_calibration_folder(out):
        raise _not_empty(out)
    texts = () if prompts.isdecimal() else read_prompts(Path(prompts))
    with stage(progress, f"load {source}"):
        generator = load(source, guidance=guidance)
        count = check_steps([generator.default_steps if steps is None else steps], "--steps")[0]
        described = describe(generator, [count])
    texts = texts or calibration_prompts(generator)[: int(prompts)]
    return collect(
        generator,
        described,
        sampler,
        texts,
        size=len(texts) * seeds * count,
        seed=seed,
        steps=count,
        guidance=generator.guidance,
        folder=out,
        progress=progress,
    )


@naming_packages()
def optimize(source: str | SourceSpec, out: Path, *, recipe: str, progress: Progress) -> list[Path]:
    """Writes the optimized generator as a diffusers folder with the passes' notes, and returns the paths."""
    from fewstep.export import load
    from fewstep.optimize import optimize as apply

    chosen = load_recipe(recipe)
    with _new_folder(out) as folder:
        spec = SourceSpec.of(source).otherwise(chosen.adapters)
        with stage(progress, f"load {spec}"):
            generator = load(spec, guidance=chosen.guidance, eager=True)
        with stage(progress, f"apply {chosen.name}"):
            optimized, notes = apply(generator, chosen)
            optimized.pipeline.save_pretrained(folder, safe_serialization=True)
        (folder / "fewstep-notes.json").write_text(json.dumps([asdict(note) for note in notes], indent=1))
    return [out, out / "fewstep-notes.json"]


@naming_packages()
def compile(
    source: str | SourceSpec,
    out: Path,
    *,
    targets: Sequence[str],
    recipe: str,
    steps: Sequence[int] | None,
    guidance: float | None,
    progress: Progress,
) -> list[Path]:
    """Writes tokenizers and the artifacts of every target without verifying them, and returns the artifacts' paths."""
    from fewstep.export import write_tokenizers

    check_targets(targets)
    chosen = load_recipe(recipe)
    check_images(targets, chosen)
    chosen = replace(chosen, quantization=for_targets(chosen.quantization, targets))
    if guidance is not None:
        chosen = replace(chosen, guidance=guidance)
    with _new_folder(out) as folder:
        prepared = prepare(source, chosen, SourceSpec(""), steps, progress)
        write_tokenizers(prepared.generator, prepared.described.tokenizers, folder)
        cache = StageCache()
        quantized = quantize_programs(prepared.programs, prepared.recipe, folder, cache, progress)
        artifacts = compile_targets(
            quantized or prepared.programs,
            prepared.recipe,
            targets,
            folder,
            cache,
            progress,
            {name: at.programs for name, at in prepared.others.items()},
        )
    return [out / artifact.path for artifact in artifacts]


@dataclass(frozen=True)
class Loop:
    """One file that samples: what its picture agrees with the bundle's to, and how its size compares."""

    path: Path
    steps: int
    output_psnr_db: float
    bytes: int
    of_components: float
    """Its bytes as a share of those of the bundle's components."""


@naming_packages()
def loop(bundle: Bundle, out: Path, *, steps: int | None, runtime: str | None, progress: Progress) -> Loop:
    """Writes one file that samples with a bundle's networks, and returns how it compares with the bundle.

    For ONNX Runtime it is an ONNX file, for Core ML a package.

    Raises:
        BundleError: there is something at ``out`` that is not to be replaced, or its name does not fit the runtime.
        ContractError: see `fewstep.runtimes.sampling.unrolled_graph.check_unrolls`.
        ParityError: what it draws is not what the bundle draws; no file is left.
        RuntimeMissingError: the runtime's artifacts cannot be put into one file.
    """
    from fewstep.runtimes.sampling.single_file import open_loop, write_loop

    manifest = bundle.manifest
    runtime = runtime or manifest.runtimes[0]
    count = manifest.default_steps if steps is None else steps
    if out.is_dir():
        raise _not_empty(out)
    check_place(out.parent, _ELSEWHERE)
    with beside(out, what="the loop", hint=_ELSEWHERE) as folder:
        partial = folder / out.name
        with stage(progress, f"unroll {count} steps"):
            write_loop(bundle, partial, runtime=runtime, steps=count)
        with stage(progress, "compare"):
            value = _agreement_db(bundle, open_loop(partial, runtime), count, runtime)
        if not value >= Limits().picture_psnr_db:
            raise ParityError(
                f"one file of {count} steps draws a picture at {value:.1f} dB of the bundle's, expected "
                f"{Limits().picture_psnr_db:.0f}",
                hint="sample with the bundle's components",
            )
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        sync(folder)
        for made in folder.iterdir():  # beside it, the weights of a file that would be too large
            made.rename(out.with_name(made.name))
    parts = sum(artifact.bytes for artifact in manifest.artifacts if artifact.runtime == runtime)
    return Loop(out, count, value, size, size / parts)


def _agreement_db(bundle: Bundle, opened: OpenLoop, steps: int, runtime: str) -> float:
    """Returns the PSNR of what one file draws against what the bundle's components do, both in fp32."""
    from fewstep.runtimes.sampling.single_file import loop_feeds

    manifest = bundle.manifest
    prompt, given = manifest.prompts[0], example_inputs(manifest.contract.inputs, 0)
    tokenizers = open_tokenizers(bundle.path, manifest.tokenizers)
    output = opened.run(loop_feeds(manifest, opened.inputs, tokenizers, prompt, 0, given))
    sampler = open_sampler(bundle, runtime=runtime, keep_open=False, exact=True)
    try:
        ours = sampler(prompt, 0, manifest.schedule(steps), inputs=given).output
    finally:
        sampler.close()
    return psnr_db(ours, output[0].transpose(1, 2, 0) if manifest.contract.output.kind == "picture" else output[0])


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``out`` when the block ends without an error."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise _not_empty(out)
    with writing(out) as folder:
        yield folder


def _not_empty(out: Path) -> BundleError:
    return BundleError(f"{out} exists and is not empty, expected a new folder", hint="choose another -o folder")

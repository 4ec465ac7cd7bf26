"""Single stages of a build, and looking into things: what the command line offers beside the whole pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from fewstep.build import further_shapes, quantize_programs, sized
from fewstep.bundle import MANIFEST, Bundle, writing
from fewstep.cache import StageCache
from fewstep.compiling import check_targets, compile_targets
from fewstep.errors import BundleError, ParityError
from fewstep.feeds import Sample
from fewstep.inputs import example_inputs
from fewstep.metrics import psnr_db
from fewstep.progress import Progress, stage
from fewstep.recipe import Limits, check_steps, load_recipe
from fewstep.runtimes.sampler import open_sampler, open_tokenizers
from fewstep.source import SourceSpec

if TYPE_CHECKING:
    from fewstep.calibration.sets import CalibrationSet

Array = npt.NDArray[Any]


def draw(
    bundle: Bundle,
    prompts: Sequence[str],
    seed: int,
    *,
    inputs: Sequence[Mapping[str, Array]],
    steps: int | None,
    guidance: float | None,
    runtime: str | None,
    progress: Progress,
) -> list[Sample]:
    """Returns a sample for every prompt with its other inputs; a single one holds one component in memory at a time."""
    schedule = bundle.manifest.schedule(bundle.manifest.default_steps if steps is None else steps)
    sampler = open_sampler(bundle, runtime=runtime, keep_open=len(prompts) > 1)
    advance = progress.task("steps", len(prompts) * schedule.steps)
    try:
        return [
            sampler(prompt, seed, schedule, guidance=guidance, inputs=given, on_step=lambda _, __: advance())
            for prompt, given in zip(prompts, inputs, strict=True)
        ]
    finally:
        sampler.close()


def inspect(source: str | SourceSpec) -> dict[str, Any]:
    """Returns what is in a bundle, or, by loading and running it once, in a source."""
    spec = SourceSpec.of(source)
    if spec == SourceSpec(spec.uri) and (Path(spec.uri) / MANIFEST).is_file():
        return Bundle.open(spec.uri).manifest.to_json()
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
    """Writes the artifacts of every target without verifying them, and returns the paths."""
    from fewstep.export import describe, load, programs_of
    from fewstep.optimize import optimize as apply

    chosen = load_recipe(recipe)
    check_targets(targets)
    with _new_folder(out) as folder:
        spec = SourceSpec.of(source).otherwise(chosen.adapters)
        with stage(progress, f"load {spec}"):
            w = chosen.guidance if guidance is None else guidance
            eager = chosen.quantization is not None or chosen.palette is not None
            original = sized(load(spec, guidance=w, eager=eager), chosen)
            generator, _ = apply(original, chosen)
            counts = check_steps(steps or chosen.steps or generator.steps, "--steps")
            default = generator.default_steps if generator.default_steps in counts else counts[-1]
            described = describe(replace(generator, default_steps=default), counts)
        cache = StageCache()
        programs = programs_of(generator, described, chosen)
        quantized = quantize_programs(programs, chosen, folder, cache, progress)
        artifacts = compile_targets(
            quantized or programs, chosen, targets, folder, cache, progress, further_shapes(programs, chosen)
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


def loop(bundle: Bundle, out: Path, *, steps: int | None, runtime: str | None, progress: Progress) -> Loop:
    """Writes one ONNX file that samples with a bundle's networks, and returns how it compares with the bundle.

    Raises:
        ContractError: the bundle guides with two passes.
        ParityError: what it draws is not what the bundle draws; no file is left.
    """
    import onnxruntime

    from fewstep.runtimes.ort_loop import loop_feeds, write_loop

    manifest = bundle.manifest
    runtime = runtime or manifest.runtimes[0]
    count = manifest.default_steps if steps is None else steps
    partial = out.with_name(f"{out.name}.partial")
    with stage(progress, f"unroll {count} steps"):
        write_loop(bundle, partial, runtime=runtime, steps=count)
    with stage(progress, "compare"):
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        shapes = {value.name: value.shape for value in session.get_inputs()}
        prompt, given = manifest.prompts[0], example_inputs(manifest.contract.inputs, 0)
        feeds = loop_feeds(manifest, shapes, open_tokenizers(bundle.path, manifest.tokenizers), prompt, 0, given)
        (output,) = session.run(None, dict(feeds))
        ours = bundle.generate(prompt, 0, steps=count, inputs=given).output
        value = psnr_db(ours, output[0].transpose(1, 2, 0) if output.ndim == 4 else output[0])
    if not value >= Limits().picture_psnr_db:
        partial.unlink()
        raise ParityError(
            f"one file of {count} steps draws a picture at {value:.1f} dB of the bundle's, expected "
            f"{Limits().picture_psnr_db:.0f}",
            hint="sample with the bundle's components",
        )
    partial.rename(out)
    size, parts = out.stat().st_size, sum(a.bytes for a in manifest.artifacts if a.runtime == runtime)
    return Loop(out, count, value, size, size / parts)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``out`` when the block ends without an error."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise _not_empty(out)
    with writing(out) as folder:
        yield folder


def _not_empty(out: Path) -> BundleError:
    return BundleError(f"{out} exists and is not empty, expected a new folder", hint="choose another -o folder")

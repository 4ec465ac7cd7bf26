"""Runs the stages of a build that take long, each once: its results are cached by everything that shapes them."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.bundle.manifest import Artifact
from fewstep.bundle.samples import Sample, load_samples, save_samples
from fewstep.cache import StageCache
from fewstep.errors import QuantizationError, RuntimeMissingError
from fewstep.pipeline.component_graphs import Graph, compile_graphs, gives_result, graphs_of, picture_output
from fewstep.progress import Progress
from fewstep.recipe.recipe import Recipe
from fewstep.runtimes.parity.harness import label
from fewstep.text.cleaners import cleaners

if TYPE_CHECKING:
    from fewstep.calibration import SampleRequest
    from fewstep.export import Description, Generator, Programs
    from fewstep.optimize.quantize import QuantizedPrograms


def record_reference(
    generator: Generator,
    described: Description,
    requests: Sequence[SampleRequest],
    recipe: Recipe,
    cache: StageCache,
    progress: Progress,
) -> list[Sample]:
    """Returns the samples of a generator as ``recipe`` made it, drawn in PyTorch; cached.

    ``described`` may be of the generator after its recipe; the key holds both.
    """
    from fewstep.calibration import record_samples
    from fewstep.export import digest, fingerprint

    key = {
        "generator": [fingerprint(generator), described.fingerprint],
        "requests": [[r.prompt, r.seed, r.steps, r.guidance, r.negative] for r in requests],
        "inputs": [asdict(spec) for spec in generator.inputs],
        "schedules": {str(n): schedule.to_json() for n, schedule in described.schedules.items()},
        "wirings": {name: digest(wiring) for name, wiring in described.wirings.items()},
        "weights": recipe.weights,
        "palette": [recipe.palette, dict(recipe.palette_choices), recipe.sparsity],
        "original": recipe.name == "original",
        "versions": versions(),
    }

    def make(entry: Path) -> None:
        advance = progress.task("record the reference", len(requests))

        def samples() -> list[Sample]:
            done = []
            for sample in record_samples(generator, described, requests):
                done.append(sample)
                advance()
            return done

        save_samples(samples(), entry, with_feeds=len(requests))

    entry, _ = cache.get_or_make("reference", key, make)
    return load_samples(entry)


def compile_targets(
    programs: Programs | QuantizedPrograms,
    recipe: Recipe,
    targets: Sequence[str],
    folder: Path,
    cache: StageCache,
    progress: Progress,
    others: Mapping[str, Programs] | None = None,
    *,
    samples: Sequence[Sample] = (),
) -> list[Artifact]:
    """Returns every component compiled for every target, under ``folder/<target>``; finished ones are cached.

    ``others`` are the programs at further shapes and in batches, by name; their graphs share the weights of the first.
    ``samples`` are recorded runs at the first shape, for backends that choose a precision by the values in them.
    """
    from fewstep.runtimes import get_runtime

    artifacts: list[Artifact] = []
    advance = progress.task("compile", len(targets) * len(programs.components))
    for target in targets:
        for component in programs.components:
            graphs = graphs_of(component, programs, others or {})
            if recipe.image_output and get_runtime(target).image_outputs and gives_result(component, programs):
                picture = picture_output(programs)
                graphs = [replace(graph, picture=picture) for graph in graphs]
            key = {
                "generator": programs.described.fingerprint,
                "graphs": [graph.key() for graph in graphs],
                "weights": recipe.weights,
                "palette": [recipe.palette, dict(recipe.palette_choices), recipe.sparsity],
                "runtime": target,
                "samples": [[label(sample), sample.guidance] for sample in samples],
                "versions": versions(),
            }

            def make(entry: Path, target: str = target, graphs: Sequence[Graph] = graphs) -> None:
                made = compile_graphs(get_runtime(target), graphs, entry / "files", recipe.weights, samples)
                (entry / "artifacts.json").write_text(json.dumps([asdict(artifact) for artifact in made]))

            entry, _ = cache.get_or_make("compile", key, make)
            shutil.copytree(entry / "files", folder / target, dirs_exist_ok=True)
            for values in json.loads((entry / "artifacts.json").read_text()):
                artifact = Artifact(**values)
                artifacts.append(programs.label(replace(artifact, path=f"{target}/{artifact.path}")))
            advance()
    return artifacts


def check_targets(targets: Sequence[str]) -> None:
    """Raises RuntimeMissingError unless every target can be compiled for, and its artifacts computed, here."""
    from fewstep.runtimes import get_runtime

    for target in targets:
        state = get_runtime(target).availability()
        if not state.builds:
            raise RuntimeMissingError(f"runtime {target} cannot be built here: {state.detail}", hint=state.remedy)


def check_shapes(targets: Sequence[str], shapes: Sequence[tuple[int, int]]) -> None:
    """Raises RuntimeMissingError unless every target can have graphs for all shapes over one set of weights."""
    from fewstep.runtimes import get_runtime

    for target in targets:
        if len(shapes) > 1 and get_runtime(target).compile_variants is None:
            raise RuntimeMissingError(
                f"runtime {target} takes one shape, and the recipe has {len(shapes)}",
                hint="build a bundle for each shape",
            )


def check_graphs(targets: Sequence[str], recipe: Recipe) -> None:
    """Raises RuntimeMissingError unless every target can have all the graphs of a component that a recipe asks for.

    What the steps ask for by themselves shows later, when they are known: see
    `fewstep.pipeline.component_graphs.compile_graphs`.
    """
    from fewstep.runtimes import get_runtime

    check_shapes(targets, recipe.shape)
    asked = {
        "a batch": recipe.batch is not None,
        "a decoder in tiles": recipe.decoder_tile is not None,
        "the form specialized": recipe.form == "specialized",
    }
    for target in targets:
        if get_runtime(target).compile_variants is not None:
            continue
        for what, given in asked.items():
            if given:
                raise RuntimeMissingError(
                    f"runtime {target} takes one graph of each component, and {what} needs several on one set of "
                    "weights",
                    hint="give no batch, no tiles and no form for this target, or another --target",
                )


def check_images(targets: Sequence[str], recipe: Recipe) -> None:
    """Raises RuntimeMissingError unless a recipe with an image as output has a target that gives images."""
    from fewstep.runtimes import RUNTIMES, get_runtime

    if recipe.image_output and not any(get_runtime(target).image_outputs for target in targets):
        able = ", ".join(name for name, runtime in RUNTIMES.items() if runtime.image_outputs)
        raise RuntimeMissingError(
            f"no target of {', '.join(targets)} gives an image, which the recipe asks for",
            hint=f"add --target {able}, or leave image_output out",
        )


def check_comparable(targets: Sequence[str], quantized: QuantizedPrograms | None) -> None:
    """Raises RuntimeMissingError unless every target's whole numbers could be compared with those of the plan."""
    from fewstep.runtimes import get_runtime

    if quantized is None or not any(plan.computes for plan in quantized.plan.components.values()):
        return
    for target in targets:
        if get_runtime(target).compare_integers is None:
            raise RuntimeMissingError(
                f"runtime {target} has no comparison of whole numbers, which this recipe computes with",
                hint="choose a recipe that quantizes weights only, a palette for coreml, or another target",
            )


def check_size(artifacts: Sequence[Artifact], recipe: Recipe) -> None:
    """Raises QuantizationError if a target's files are larger than the recipe's budget: the plan can only estimate."""
    most = None if recipe.quantization is None else recipe.quantization.max_bytes
    for target in dict.fromkeys(artifact.runtime for artifact in artifacts):
        total = sum(artifact.bytes for artifact in artifacts if artifact.runtime == target)
        if most is not None and total > most:
            raise QuantizationError(
                f"the components for {target} take {total} bytes, {total - most} more than max_bytes, which is {most}: "
                "the plan expected less of what stays in float",
                hint=f"allow --max-size {total}B, or ask for {max(1, 2 * most - total)}B so that they fit",
            )


def versions() -> dict[str, str]:
    """Returns the versions of everything that shapes a bundle, what is absent if it does, and the machine."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in (
        "fewstep",
        "torch",
        "torchao",
        "diffusers",
        "transformers",
        "tokenizers",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "coremltools",
        "tensorrt",
        "litert-torch",
        "litert-converter",
        "ai-edge-litert",
        "executorch",
        "numpy",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | cleaners()

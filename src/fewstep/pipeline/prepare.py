"""From a source to programs: loaded, laid over, optimized, described and traced, once for every stage that goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.bundle.manifest import PLAN_FOLDER
from fewstep.bundle.source import SourceSpec
from fewstep.cache import StageCache
from fewstep.pipeline.shape_and_batch import Further, further_programs
from fewstep.progress import Progress, stage
from fewstep.proof.user_calls import Told
from fewstep.recipe.recipe import Recipe, check_steps
from fewstep.runtimes.sampling.sampler import open_tokenizers

if TYPE_CHECKING:
    from fewstep.export import Description, Generator, Programs
    from fewstep.optimize import PassNote
    from fewstep.optimize.quantize import QuantizedPrograms


@dataclass(frozen=True)
class Prepared:
    """A generator as it was given and as it is compiled.

    Attributes:
        source: what the user's own call is made of: the source, or the generator that Python handed over.
        original: before the recipe's passes, at the recipe's shape.
        generator: after them.
        notes: what the passes did.
        recipe: the recipe, with what the generator decides of it.
        described: the contract and schedules of ``generator``.
        programs: its traced components.
        others: the same at further shapes and as a batch, by name.
    """

    source: SourceSpec | Generator
    original: Generator
    generator: Generator
    notes: Sequence[PassNote]
    recipe: Recipe
    described: Description
    programs: Programs
    others: Mapping[str, Further]

    @property
    def counts(self) -> list[int]:
        """The step counts that the bundle can sample with."""
        return sorted(self.described.schedules)

    @property
    def modified(self) -> bool:
        """Whether a pass changed the network."""
        return any(note.modified for note in self.notes)

    def told(self) -> Told:
        """Returns what the user's own call is told."""
        schedules = self.described.schedules
        return Told.of(self.described.contract, self.generator.default_steps, schedules, self.original)


def prepare(
    source: str | SourceSpec | Generator,
    recipe: Recipe,
    over: SourceSpec,
    steps: Sequence[int] | None,
    progress: Progress,
) -> Prepared:
    """Returns a source as programs.

    Args:
        source: as `fewstep.build` takes it.
        recipe: the recipe, with the caller's values over its own.
        over: what the caller lays over the source; the recipe's adapters lie under the source's own.
        steps: step counts; None takes the recipe's, then the generator's.
        progress: told where the build is.
    """
    from fewstep.export import check_counts, describe, programs_of
    from fewstep.optimize import optimize
    from fewstep.optimize.mixed_palettes import choose_palettes

    with stage(progress, f"load {source if isinstance(source, (str, SourceSpec)) else source.name}"):
        called, original = _load(source, recipe, over)
        original = _sized(original, recipe)
    recipe = choose_palettes(original, recipe, progress)
    with stage(progress, "optimize and read the contract"):
        optimized, notes = optimize(original, recipe)
        counts = check_steps(steps or recipe.steps or original.steps, "steps")
        check_counts(original, counts)
        optimized = replace(optimized, default_steps=_default_steps(original.default_steps, counts))
        described = describe(optimized, counts)
        programs = programs_of(optimized, described, recipe)
        others = further_programs(programs, recipe)
    return Prepared(called, original, optimized, notes, recipe, described, programs, others)


def _load(
    source: str | SourceSpec | Generator, recipe: Recipe, over: SourceSpec
) -> tuple[SourceSpec | Generator, Generator]:
    """Returns what the user's own call is made of, and the generator."""
    from fewstep.export import lay_over, load

    if isinstance(source, (str, SourceSpec)):
        spec = over.otherwise(SourceSpec.of(source)).otherwise(recipe.adapters)
        # Recipes that look at every weight several times hold them all.
        return spec, load(spec, guidance=recipe.guidance, eager=recipe.whole)
    generator = load(lay_over(source, over.otherwise(recipe.adapters)), guidance=recipe.guidance)
    return generator, generator


def _sized(generator: Generator, recipe: Recipe) -> Generator:
    """Returns a generator that draws at a recipe's first shape and decodes in its tiles."""
    generator = generator if recipe.decoder_tile is None else generator.tiled(recipe.decoder_tile)
    return generator.shaped(*recipe.shape[0]) if recipe.shape else generator


def _default_steps(wanted: int, counts: Sequence[int]) -> int:
    return wanted if wanted in counts else min(counts, key=lambda n: (abs(n - wanted), n))


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

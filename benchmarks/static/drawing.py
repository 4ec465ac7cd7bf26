"""Pictures of the built-in generator whose denoiser is replaced; the other components stay in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.quant.prompts import CALIBRATION, CALIBRATION_SEED, HELD_OUT
from fewstep.bundle.contract import BEFORE, DENOISER
from fewstep.bundle.program import Program
from fewstep.bundle.samples import Sample
from fewstep.calibration import CalibrationSet, SampleRequest, collect
from fewstep.calibration.ranges import StepRanges
from fewstep.export import Programs, describe, load, programs_of, write_tokenizers
from fewstep.numerics.metrics import psnr_db
from fewstep.optimize.quantize import ComponentPlan
from fewstep.optimize.quantize.planner import calls_of, plan_component
from fewstep.recipe.quantization import Quantization
from fewstep.recipe.recipe import load_recipe
from fewstep.recipe.target_profiles import get_profile
from fewstep.runtimes.base import CheckedSession
from fewstep.runtimes.pytorch.reference import open_program
from fewstep.runtimes.sampling.sampler import Sampler, open_tokenizers
from fewstep.text.tokens import Tokenizer


@dataclass(frozen=True)
class Drawing:
    """The generator's programs in table form for one step count, its calibration calls, and what is drawn with them."""

    programs: Programs
    floats: Mapping[str, Program]
    calls: CalibrationSet
    tokenizers: Mapping[str, Tokenizer]
    requests: Sequence[SampleRequest]
    steps: int

    @classmethod
    def prepare(cls, work: Path, *, steps: int, prompts: int, seeds: int, samples: int) -> Drawing:
        """Returns the generator, ready to draw held-out prompts.

        Args:
            work: folder for tokenizers and calibration samples.
            steps: N.
            prompts: held-out prompts to draw.
            seeds: of each.
            samples: calibration samples.
        """
        generator = load("stickers", eager=True)
        described = describe(replace(generator, default_steps=steps), [steps])
        programs = programs_of(generator, described, load_recipe("fp32"))
        calls = collect(
            generator,
            described,
            "own",
            CALIBRATION[:samples],
            size=samples * steps,
            seed=CALIBRATION_SEED,
            steps=steps,
            guidance=generator.guidance,
            folder=work / "calibration",
        )
        write_tokenizers(generator, described.tokenizers, work / "tokenizers")
        return cls(
            programs,
            {name: programs.make(name) for name in programs.components},
            calls,
            open_tokenizers(work / "tokenizers", described.tokenizers),
            SampleRequest.grid(generator, HELD_OUT[:prompts], range(seeds), steps, generator.guidance),
            steps,
        )

    @property
    def rows(self) -> list[int]:
        """The row of the table that each step reads."""
        schedule = self.programs.described.schedules[self.steps]
        return [self.programs.contract.row(schedule, k) for k in range(self.steps)]

    def plan(self, recipe: Quantization) -> tuple[ComponentPlan, StepRanges]:
        """Returns the plan of the denoiser, and the ranges of its activations."""
        early = frozenset(name for name, spec in self.programs.components.items() if spec.phase == BEFORE)
        plan, ranges = plan_component(
            self.floats[DENOISER],
            recipe,
            get_profile(recipe.profile),
            partial(calls_of, self.programs, self.calls, DENOISER),
            early,
            steps=self.steps,
        )
        assert ranges is not None, "the recipe puts activations onto grids"
        return plan, ranges

    def draw(self, denoiser: CheckedSession) -> list[Sample]:
        """Returns the samples that a denoiser makes."""
        sampler = Sampler(
            self.programs.contract,
            self.programs.components,
            self.tokenizers,
            lambda name: denoiser if name == DENOISER else open_program(self.floats[name]),
            keep_open=True,
        )
        schedule = self.programs.described.schedules[self.steps]
        return [sampler(r.prompt, r.seed, schedule, guidance=r.guidance, inputs=r.inputs) for r in self.requests]

    def references(self) -> list[Sample]:
        """Returns the samples of the denoiser in float."""
        return self.draw(open_program(self.floats[DENOISER]))


def psnrs(references: Sequence[Sample], found: Sequence[Sample]) -> list[float]:
    """Returns the PSNR of each picture against its reference, in dB."""
    return [round(psnr_db(a.output, b.output), 3) for a, b in zip(references, found, strict=True)]

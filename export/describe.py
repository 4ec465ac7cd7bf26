"""Reads what a bundle says of a generator off recorded runs: contract, components, schedules, tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fewstep.contract import DECODER, ComponentSpec, Contract, is_denoiser
from fewstep.export.embedding import read_guidance
from fewstep.export.fingerprint import fingerprint, is_own_code, with_outputs
from fewstep.export.generator import Generator
from fewstep.export.layout import read_tokenizers
from fewstep.export.reader import Reader
from fewstep.export.reference import run
from fewstep.export.sampling import Anatomy, example_prompts, loop_schedule, pipeline_schedule, probe_run
from fewstep.export.specs import read_specs, without_glue
from fewstep.export.tiled_decoder import tiles_of
from fewstep.export.wiring import Wiring
from fewstep.inputs import example_inputs, stacked
from fewstep.manifest import TokenizerSpec
from fewstep.schedule import Schedule


@dataclass(frozen=True)
class Description:
    """A generator's contract, what its components take and give, and how each becomes a program.

    ``anatomy`` is what `fewstep.export.recording` needs to read network calls off another run.
    """

    contract: Contract
    components: Mapping[str, ComponentSpec]
    wirings: Mapping[str, Wiring]
    schedules: Mapping[int, Schedule]
    tokenizers: Mapping[str, TokenizerSpec]
    anatomy: Anatomy
    fingerprint: str = ""
    """Of the generator as it was described: see `fewstep.export.fingerprint`."""


def describe(generator: Generator, steps: Sequence[int]) -> Description:
    """Returns the description of a generator for some step counts.

    Raises:
        ScheduleError: its sampler is not a table.
        ExportError: it does something between the networks that a bundle cannot express.
    """
    mark = fingerprint(generator)  # before anything runs, which may leave traces in the networks
    inputs = stacked([example_inputs(generator.inputs, i) for i in range(generator.batch)])
    prompt = example_prompts(generator)
    # Two steps tell what varies from step to step from what does not; the most call all networks that take turns.
    several = sum(map(is_denoiser, generator.parts)) > 1
    count = generator.default_steps if generator.default_steps in steps and not several else max(steps)
    count = count if generator.is_loop else max(2, count)
    stubs = None if generator.stored is None else generator.stored.shapes(generator)
    recorded = run(generator, prompt, 0, steps=count, guidance=generator.guidance, inputs=inputs, stubs=stubs)
    mark = with_outputs(mark, recorded) if is_own_code(generator) else mark
    guidance, plain = read_guidance(generator, recorded), generator.guidance
    if guidance.kind == "two_pass":
        plain = 0.0
        recorded = run(generator, prompt, 0, steps=count, guidance=plain, inputs=inputs, stubs=stubs)
    others = [probe_run(generator, recorded, n, plain, inputs) for n in sorted({min(steps), max(steps)} - {count})]
    reader = Reader(generator, recorded, guidance, plain, others)
    schedule = loop_schedule if generator.is_loop else pipeline_schedule
    schedules = {n: schedule(generator, recorded, reader.anatomy, n, inputs) for n in steps}
    contract, wirings = reader.read()
    tiles = tiles_of(generator.module(DECODER)) if DECODER in wirings and not generator.is_loop else None
    wirings = wirings if tiles is None else without_glue(wirings)
    specs = read_specs(generator, recorded, reader.anatomy, wirings)
    if tiles is not None:
        specs[DECODER] = replace(specs[DECODER], tiles=tiles)
    tokenizers = read_tokenizers(generator, recorded, prompt if isinstance(prompt, str) else prompt[0])
    contract = replace(contract, batch=generator.batch)
    return Description(contract, specs, wirings, schedules, tokenizers, reader.anatomy, mark)

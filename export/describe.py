"""Reads what a bundle says of a generator off recorded runs: contract, components, schedules, tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fewstep.bundle.contract import DECODER, ComponentSpec, Contract, is_denoiser
from fewstep.bundle.manifest import TokenizerSpec
from fewstep.bundle.schedule import Schedule
from fewstep.errors import PipelineError
from fewstep.export.contract.guidance_embedding import read_scale
from fewstep.export.contract.guidance_probe import Probe
from fewstep.export.contract.reader import Reader
from fewstep.export.contract.specs import read_specs, without_glue
from fewstep.export.contract.two_pass_guidance import Guided, read_two_passes
from fewstep.export.fingerprint import fingerprint, is_own_code, with_outputs
from fewstep.export.generator import Generator
from fewstep.export.record.run import run
from fewstep.export.record.run_record import Run
from fewstep.export.schedule.extract import (
    Anatomy,
    example_prompts,
    loop_schedule,
    pipeline_schedule,
    probe_run,
    refuse,
)
from fewstep.export.source.finite_weights import check_finite
from fewstep.export.source.offloaded_networks import shape_stand_ins
from fewstep.export.source.tiled_decoder import tiles_of
from fewstep.export.text.describe import read_tokenizers
from fewstep.export.trace.component_module import Wiring
from fewstep.numerics.inputs import example_inputs, stacked
from fewstep.numerics.metrics import sqnr_db

# Two runs of one network on one machine are equal to the bit; what differs by less than kernels do fails no check.
_REPEATED_DB = 100.0


@dataclass(frozen=True)
class Description:
    """A generator's contract, what its components take and give, and how each becomes a program.

    ``anatomy`` and ``guided`` are what `fewstep.export.record.to_samples` needs to read network calls off another run.
    """

    contract: Contract
    components: Mapping[str, ComponentSpec]
    wirings: Mapping[str, Wiring]
    schedules: Mapping[int, Schedule]
    tokenizers: Mapping[str, TokenizerSpec]
    anatomy: Anatomy
    guided: Guided
    fingerprint: str = ""
    """Of the generator as it was described: see `fewstep.export.fingerprint`."""


def describe(generator: Generator, steps: Sequence[int]) -> Description:
    """Returns the description of a generator for some step counts.

    Raises:
        ScheduleError: its sampler is not a table.
        ExportError: it does something between the networks that a bundle cannot express.
        SourceError: a weight is NaN or Inf.
    """
    check_finite(generator)
    mark = fingerprint(generator)  # before anything runs, which may leave traces in the networks
    inputs = stacked([example_inputs(generator.inputs, i) for i in range(generator.batch)])
    prompt = example_prompts(generator)
    # Two steps tell what varies from step to step from what does not; the most call all networks that take turns.
    several = sum(map(is_denoiser, generator.parts)) > 1
    count = generator.default_steps if generator.default_steps in steps and not several else max(steps)
    count = count if generator.is_loop else max(2, count)
    stubs = None if generator.stored is None else shape_stand_ins(generator)
    recorded = one_pass(
        generator, lambda w: run(generator, prompt, 0, steps=count, guidance=w, inputs=inputs, stubs=stubs)
    )
    if generator.is_loop:
        again = run(generator, prompt, 0, steps=count, guidance=recorded.guidance, inputs=inputs, stubs=stubs)
        check_repeatable(generator, recorded, again)
    mark = with_outputs(mark, recorded) if is_own_code(generator) else mark
    plain = recorded.guidance
    tokenizers = read_tokenizers(generator, recorded, count, inputs)
    probe = Probe(generator, recorded, min([n for n in (*steps, count) if n > 1] or [count]), plain, stubs)
    scale = read_scale(probe)
    others = [probe_run(generator, recorded, n, plain, inputs) for n in sorted({min(steps), max(steps)} - {count})]
    reader = Reader(generator, recorded, scale, plain, others)
    schedule = loop_schedule if generator.is_loop else pipeline_schedule
    schedules = {n: schedule(generator, recorded, reader.anatomy, n, inputs) for n in steps}
    contract, wirings = reader.read()
    guided = Guided(scale.guidance)
    if scale.guidance.kind == "two_pass":
        guided = read_two_passes(probe, scale.guidance, reader.anatomy, wirings, schedules, recorded)
    tiles = tiles_of(generator.module(DECODER)) if DECODER in wirings and not generator.is_loop else None
    wirings = wirings if tiles is None else without_glue(wirings)
    specs = read_specs(generator, recorded, reader.anatomy, wirings)
    if tiles is not None:
        specs[DECODER] = replace(specs[DECODER], tiles=tiles)
    contract = replace(contract, batch=generator.batch, guidance=guided.guidance)
    described = Description(contract, specs, wirings, schedules, tokenizers, reader.anatomy, guided, mark)
    from fewstep.export.text.check import check_texts  # it records runs by a description

    check_texts(generator, described, recorded, inputs)
    return described


def check_repeatable(generator: Generator, recorded: Run, again: Run) -> None:
    """Raises PipelineError where two runs on the same inputs and noise give different outputs."""
    first, second = recorded.output, again.output
    assert first is not None
    assert second is not None
    found = sqnr_db(first, second) if first.shape == second.shape else float("-inf")
    if not found >= _REPEATED_DB:
        raise PipelineError(
            f"{generator.name}: two runs of its loop on the same inputs and noise differ: SQNR {found:.0f} dB, "
            f"expected {_REPEATED_DB:.0f} or more",
            hint="draw every random number with noise(shape), keep nothing from one call for the next, and switch off "
            "dropout",
        )


def one_pass(generator: Generator, at: Callable[[float], Run]) -> Run:
    """Returns a run in which every step is one pass: at the scale wanted, or at one that turns guidance off.

    Raises:
        ExportError: at none of the scales that turn guidance off elsewhere.
    """
    for w in dict.fromkeys((generator.guidance, 0.0, 1.0)):
        found = at(w)
        if not _several_passes(found):
            return found
    raise refuse(f"{generator.name} makes several passes in each step at guidance {w:g} too, expected a scale with one")


def _several_passes(found: Run) -> bool:
    """Returns whether the networks of a run are called with several rows for each sample, or twice in each step."""
    output, state = next(iter(found.denoiser_calls[0].outputs.values())), found.states[0]
    several = output.ndim == state.ndim and output.shape[0] in (2 * state.shape[0], 3 * state.shape[0])
    return several or len(found.denoiser_calls) == 2 * len(found.states)

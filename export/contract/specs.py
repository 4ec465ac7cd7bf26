"""What each component of a bundle takes and gives, from the tensors of a recorded run; decoders of tiles apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fewstep.bundle.contract import AFTER, DECODER, GUIDANCE, LATENT, SAMPLE, TIME, TIMESTEP, ComponentSpec
from fewstep.export.generator import Generator
from fewstep.export.record.run_record import Run
from fewstep.export.record.tape import Glue, GlueModule, Ref
from fewstep.export.schedule.extract import Anatomy
from fewstep.export.trace.component_module import Wiring, glue_component, spec_of, wired_module


def read_specs(
    generator: Generator, run: Run, anatomy: Anatomy, wirings: Mapping[str, Wiring]
) -> dict[str, ComponentSpec]:
    """Returns the specification of each wired component, in the order of the wirings."""
    last = run.denoiser_calls[-1]
    scaled = last.inputs.get(anatomy.latent or "", run.states[-1])
    found: dict[str, torch.Tensor] = {LATENT: scaled, SAMPLE: run.latents[-1]}
    found |= {name: draws[-1] for name, draws in run.step_draws().items()}
    specs = {}
    for name, wiring in wirings.items():
        calls = [c for c in run.calls if c.instance == name]
        inputs = []
        for origin in wiring.origins:
            if origin in (TIMESTEP, GUIDANCE) or origin.startswith(TIME):
                argument = wiring.arguments[wiring.before.origins.index(origin)]
                inputs.append(calls[-1].inputs[argument])
            else:
                inputs.append(found[origin] if origin in found else run.tape.tensor(origin))
        if wiring.call is None:
            outputs = list(wired_module(generator, wiring)(*inputs))
        else:
            outputs = [wiring.call.outputs[result] for result in wiring.results]
            outputs = outputs if wiring.after is None else list(GlueModule(wiring.after)(*outputs))
        found.update({f"{name}.{output}": t for output, t in zip(wiring.outputs, outputs, strict=True)})
        specs[name] = spec_of(wiring, inputs, outputs)
    return specs


def without_glue(wirings: Mapping[str, Wiring]) -> dict[str, Wiring]:
    """Returns the wirings with what a pipeline does to the latent before its decoder as a component of its own.

    A tile of a packed latent is not what the decoder takes.
    """
    decoder = wirings[DECODER]
    if not decoder.before.steps:
        return dict(wirings)
    name = f"{DECODER}_input"
    (argument,) = decoder.arguments
    origin = f"{name}.{argument}"
    direct = Glue((origin,), (), (), (Ref(("leaf", origin)),))
    split: dict[str, Wiring] = {}
    for component, wiring in wirings.items():
        if component == DECODER:
            split[name] = glue_component(name, decoder.before, [argument], AFTER)
            wiring = replace(wiring, before=direct)
        split[component] = wiring
    return split

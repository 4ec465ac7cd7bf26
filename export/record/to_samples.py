"""Turns a run of the reference into arrays: every network call as the programs of a bundle take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fewstep.bundle.contract import (
    AFTER,
    BEFORE,
    GUIDANCE,
    INPUT,
    LATENT,
    LOOP,
    MASK,
    NOISE,
    SAMPLE,
    TIMESTEP,
    TOKENS,
    needed_before,
)
from fewstep.bundle.samples import Sample, StepFeed
from fewstep.export.describe import Description
from fewstep.export.generator import Generator
from fewstep.export.record.intercept import Stub
from fewstep.export.record.run import run
from fewstep.export.record.run_record import Call, Run
from fewstep.export.record.tape import GlueModule
from fewstep.export.schedule.extract import refuse
from fewstep.export.trace.component_module import Wiring, wired_module
from fewstep.numerics.guidance import guidance_value

# Our own arithmetic for a condition and the pipeline's differ by float32 rounding.
_RTOL, _ATOL = 1e-4, 1e-5

Values = dict[str, torch.Tensor]


def record(
    generator: Generator,
    described: Description,
    prompt: str,
    seed: int,
    *,
    steps: int,
    guidance: float,
    negative: str | None = None,
    inputs: Mapping[str, np.ndarray[Any, Any]] | None = None,
    stubs: Mapping[str, Stub] | None = None,
) -> Sample:
    """Returns one sample of the reference as arrays; ``stubs`` stand in for its networks, see `run`.

    Raises:
        ExportError: this run gives the networks other conditions than the description computes.
    """
    recorded = run(
        generator,
        prompt,
        seed,
        steps=steps,
        guidance=guidance,
        negative=negative,
        inputs=inputs,
        stubs=stubs,
        clips=described.anatomy.clips,
    )
    feeds = tuple(_Reader(generator, described, recorded, negative).feeds(steps))
    latents = tuple(x.float().numpy().copy() for x in recorded.latents)
    assert recorded.output is not None
    return Sample(
        prompt, seed, steps, guidance, feeds, latents, recorded.output, generator.kind, dict(inputs or {}), negative
    )


class _Reader:
    """Reads the calls of one run, in the order in which a bundle makes them."""

    def __init__(self, generator: Generator, described: Description, recorded: Run, negative: str | None) -> None:
        self._generator, self._described, self._run = generator, described, recorded
        guidance = described.contract.guidance
        self._branches = ("uncond", "cond") if guidance.two_passes(recorded.guidance) else ("cond",)
        given = guidance.replaced(negative)
        values = {origin: described.guided.values.get(origin, np.zeros(1)) for origin in given}
        # What the unconditional branch does not compute.
        self._fixed = {origin: torch.from_numpy(value) for origin, value in values.items()}
        self._loose = {*self._fixed, GUIDANCE}
        self._needed = needed_before(described.components, given)
        self._values: dict[str, Values] = {branch: self._leaves(branch) for branch in self._branches}

    def feeds(self, steps: int) -> Iterator[StepFeed]:
        """Yields every network call."""
        wirings = self._described.wirings.values()
        for branch in self._branches:
            for wiring in wirings:
                if wiring.phase == BEFORE and (branch == "cond" or not self._fixed or wiring.component in self._needed):
                    yield self._feed(wiring, self._call_before(wiring, branch), branch, None)
        for k in range(len(self._run.states)):
            self._at_step(k, steps)
            for branch in self._branches:
                for wiring in wirings:
                    calls = self._run.of(wiring.part) if wiring.phase == LOOP else []
                    inside = [c for c in calls if c.steps_done == k]
                    for call in inside if len(inside) < 2 else [inside[self._which(branch)]]:
                        yield self._feed(wiring, call, branch, k)
        self._values["cond"][SAMPLE] = self._sample()
        for wiring in wirings:
            if wiring.phase == AFTER:
                calls = [c for c in self._run.calls if c.instance == wiring.component]
                yield self._feed(wiring, calls[0] if calls else None, "cond", None)

    def _leaves(self, branch: str) -> Values:
        run, values = self._run, Values()
        for name, spec in self._described.tokenizers.items():
            texts = [t for t in run.texts if t.tokenizer == name and t.ids.shape[1] == spec.length]
            text = texts[0] if branch == "cond" else texts[-1]
            values[f"{TOKENS}{name}"] = text.ids
            if text.mask is not None:
                values[f"{MASK}{name}"] = text.mask
        values.update({f"{INPUT}{name}": tensor for name, tensor in run.inputs.items()})
        values.update({f"{NOISE}{offset}": tensor for offset, tensor in run.draws.items()})
        values[GUIDANCE] = torch.from_numpy(np.array(guidance_value(self._described.contract.guidance, run.guidance)))
        return values | (self._fixed if branch == "uncond" else {})

    def _call_before(self, wiring: Wiring, branch: str) -> Call | None:
        calls = {c.instance: c for c in self._run.calls}
        second = f"{wiring.part}-2"
        reads_text = any(o.startswith((TOKENS, MASK)) for o in wiring.origins)
        if branch == "uncond" and reads_text and second in calls:
            return calls[second]
        return calls.get(wiring.component)

    def _at_step(self, k: int, steps: int) -> None:
        schedule = self._described.schedules.get(steps)
        for branch in self._branches:
            values = self._values[branch]
            scale = 1.0 if schedule is None else schedule.s[k]
            values[LATENT] = self._run.states[k] * scale
            values.update({name: draws[k] for name, draws in self._run.step_draws().items()})

    def _sample(self) -> torch.Tensor:
        contract = self._described.contract
        return self._run.latents[-1] / contract.latent_scale + contract.latent_shift

    def _feed(self, wiring: Wiring, call: Call | None, branch: str, step: int | None) -> StepFeed:
        values = self._values[branch]
        inputs = []
        timestep = None
        for origin in wiring.origins:
            given = None if call is None else self._given(wiring, call, origin, branch)
            if given is None:
                given = values[origin]
            elif origin in values and origin != LATENT and not _close(given, values[origin], origin in self._loose):
                raise refuse(
                    f"{wiring.component}: the {branch} branch is given another {wiring.input_name(origin)} than the "
                    "bundle computes"
                )
            if origin == TIMESTEP:
                timestep = float(given.reshape(-1)[0])
            inputs.append(given.reshape(1) if given.ndim == 0 else given)
        if call is None:
            with torch.no_grad():
                outputs = list(wired_module(self._generator, wiring)(*inputs))
        else:
            outputs = self._outputs(wiring, call, branch)
        names = [wiring.input_name(origin) for origin in wiring.origins]
        values.update({f"{wiring.component}.{n}": t for n, t in zip(wiring.outputs, outputs, strict=True)})
        values.update(self._fixed if branch == "uncond" else {})
        return StepFeed(
            wiring.component,
            step,
            timestep,
            branch,
            {name: _array(t) for name, t in zip(names, inputs, strict=True)},
            {name: _array(t) for name, t in zip(wiring.outputs, outputs, strict=True)},
        )

    def _given(self, wiring: Wiring, call: Call, origin: str, branch: str) -> torch.Tensor | None:
        """The tensor that the network itself was given, where it is this origin unchanged."""
        for argument, direct in zip(wiring.arguments, wiring.before.origins, strict=True):
            if direct == origin:
                given = call.inputs[argument]
                if wiring.phase != LOOP or wiring.call is None:
                    return given
                return self._half(given, wiring.call.inputs[argument], branch)
        return None

    def _outputs(self, wiring: Wiring, call: Call, branch: str) -> list[torch.Tensor]:
        results = [call.outputs[name] for name in wiring.results]
        if wiring.phase == LOOP and wiring.call is not None:
            alone = wiring.call.outputs
            results = [self._half(t, alone[n], branch) for t, n in zip(results, wiring.results, strict=True)]
        if wiring.after is None:
            return results
        return list(GlueModule(wiring.after)(*results))

    def _half(self, tensor: torch.Tensor, alone: torch.Tensor, branch: str) -> torch.Tensor:
        """Pipelines with two-pass guidance stack the branches in one batch of two, most the unconditional one first."""
        if len(self._branches) == 1 or tensor.ndim == 0 or tensor.shape[0] != 2 * alone.shape[0]:
            return tensor
        return tensor.chunk(2)[self._which(branch)]

    def _which(self, branch: str) -> int:
        conditional = self._described.guided.conditional
        return conditional if branch == "cond" else 1 - conditional


def _close(a: torch.Tensor, b: torch.Tensor, loose: bool = False) -> bool:
    """Returns whether a tensor is what the bundle computes; ``loose`` where that is spread to its shape."""
    b = b.expand_as(a) if loose and (b.ndim <= a.ndim) else b
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=_RTOL, atol=_ATOL)


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().numpy().copy()

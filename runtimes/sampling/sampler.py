"""Prompt and seed in, picture out, on any runtime: what an app does with a bundle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep.bundle.bundle import Bundle, resolve_inside
from fewstep.bundle.contract import (
    AFTER,
    BEFORE,
    DRAW,
    GUIDANCE,
    INPUT,
    LATENT,
    LOOP,
    MASK,
    NOISE,
    SAMPLE,
    STEP,
    TOKENS,
    ComponentSpec,
    Contract,
    TensorSpec,
    called_in_step,
    draw_offset,
    needed_before,
    step_numbers,
)
from fewstep.bundle.manifest import TokenizerSpec
from fewstep.bundle.samples import Sample, StepFeed
from fewstep.bundle.schedule import Schedule, sample_loop
from fewstep.errors import ContractError
from fewstep.numerics import noise
from fewstep.numerics.guidance import combine, guidance_value, read_unconditional
from fewstep.numerics.inputs import check_inputs, check_request, stacked
from fewstep.numerics.outputs import to_output
from fewstep.recipe.recipe import ROW_GRAPHS
from fewstep.runtimes import get_runtime
from fewstep.runtimes.base import CheckedSession, Runtime
from fewstep.runtimes.sampling.step_graphs import RowSession, has_rows, row_spec, row_variant
from fewstep.runtimes.sampling.tiled_decoder import TiledSession, tile_spec, tile_variant
from fewstep.text.tokens import Tokenizer

Array = npt.NDArray[Any]
OpenSession = Callable[[str], CheckedSession]
OnStep = Callable[[int, int], None]


class Sampler:
    """Samples with one session for each component, as many samples at once as the contract's batch.

    Components are opened when they are first needed. ``keep_open=False`` closes each as soon as the next one's turn
    comes, so that memory holds one at a time.
    """

    def __init__(
        self,
        contract: Contract,
        components: Mapping[str, ComponentSpec],
        tokenizers: Mapping[str, Tokenizer],
        open_session: OpenSession,
        *,
        unconditional: Mapping[str, Array] | None = None,
        keep_open: bool = True,
    ) -> None:
        self._contract = contract
        self._components = components
        self._tokenizers = tokenizers
        self._open_session = open_session
        zeros: dict[str, Array] = {origin: np.zeros(1) for origin in contract.guidance.unconditional}
        self._unconditional = zeros | dict(unconditional or {})
        self._keep_open = keep_open
        self._sessions: dict[str, CheckedSession] = {}

    def __call__(
        self,
        prompt: str,
        seed: int,
        schedule: Schedule,
        *,
        guidance: float | None = None,
        negative: str | None = None,
        inputs: Mapping[str, Array] | None = None,
        on_step: OnStep | None = None,
    ) -> Sample:
        """Returns the sample of a prompt and a seed, with every network call; for a contract whose batch is 1.

        The arguments are those of `batch`, for one sample.
        """
        given = [inputs or {}]
        (sample,) = self.batch(
            [prompt], [seed], schedule, guidance=guidance, negative=negative, inputs=given, on_step=on_step
        )
        return sample

    def batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        schedule: Schedule,
        *,
        guidance: float | None = None,
        negative: str | None = None,
        inputs: Sequence[Mapping[str, Array]] | None = None,
        on_step: OnStep | None = None,
    ) -> list[Sample]:
        """Returns the samples of a batch. Each is what its prompt and seed draw alone.

        Args:
            prompts: any text for each sample; what the tokenizer's length leaves out is cut off.
            seeds: 0 to 2^64 - 1, one for each sample.
            schedule: the table of the step count wanted.
            guidance: the scale w; None takes the bundle's. Where the pipeline makes one pass at a scale, so does this.
            negative: the negative prompt of all samples; None does what the pipeline does without one, which may be
                another thing than an empty text.
            inputs: what the generator takes beside the prompt, by name, for each sample: see `InputSpec`.
            on_step: called with (steps done, steps) after each.

        Returns:
            The samples in order. The first holds the network calls, which are those of the whole batch.

        Raises:
            ContractError: another number of samples than the contract's batch, guidance or a negative prompt for a
                generator that takes none, an input missing, unknown or of another shape, or a step that the networks
                are not compiled for.
        """
        check_request(prompts, seeds, guidance)
        contract, size = self._contract, self._contract.batch
        inputs = [{}] * len(prompts) if inputs is None else inputs
        if not len(prompts) == len(seeds) == len(inputs) == size:
            counts = f"{len(prompts)} prompts, {len(seeds)} seeds and {len(inputs)} sets of inputs"
            raise ContractError(f"a batch of {size} is given {counts}", hint=f"give {size} of each")
        w = contract.guidance.check(guidance, negative)
        each = [check_inputs(contract.inputs, given) for given in inputs]
        rows = [0 if contract.form == "step" else contract.row(schedule, k) for k in range(schedule.steps)]
        feeds: list[StepFeed] = []
        latents: list[Array] = []
        branches = ("uncond", "cond") if contract.guidance.two_passes(w) else ("cond",)
        texts = {"cond": prompts, "uncond": [contract.guidance.negative if negative is None else negative] * size}
        fixed = {"cond": {}, "uncond": {n: self._unconditional[n] for n in contract.guidance.replaced(negative)}}
        given = stacked(each)
        values = {
            branch: self._before(texts[branch], given, seeds, w, branch, feeds, fixed[branch]) for branch in branches
        }
        shape = (size, *contract.latent_shape)
        anchor = values["cond"][contract.anchor] if contract.anchor else None

        def denoise(k: int, x: Array) -> Array:
            outputs = {}
            for branch in branches:
                values[branch].update({LATENT: x, STEP: rows[k], **step_numbers(schedule, k), **self._draws(k, seeds)})
                for component in (name for name in self._phase(LOOP) if called_in_step(name, schedule, k)):
                    feeds.append(
                        self._call(component, values[branch], step=k, timestep=schedule.timesteps[k], branch=branch)
                    )
                    if component == schedule.network(k):
                        outputs[branch] = next(iter(feeds[-1].outputs.values()))
            if len(branches) == 1:
                return outputs["cond"]
            return combine(outputs["uncond"], outputs["cond"], w + contract.guidance.shift)

        def step_done(k: int, x: Array, x0: Array) -> None:
            latents.append(x)
            if on_step is not None:
                on_step(k + 1, schedule.steps)

        # A python float keeps float32 arithmetic in float32.
        x_init = schedule.init_scale * self._value(values["cond"], contract.initial, shape, seeds)
        if anchor is not None and schedule.init_anchor:
            x_init = x_init + schedule.init_anchor * anchor
        x = sample_loop(schedule, x_init, denoise, lambda k: noise.rows(seeds, k + 1, shape), step_done, anchor=anchor)
        last = values["cond"]
        last[SAMPLE] = result = x / contract.latent_scale + contract.latent_shift
        for component in self._phase(AFTER):
            feeds.append(self._call(component, last))
            result = next(iter(feeds[-1].outputs.values()))
        return [
            Sample(
                prompts[i],
                seeds[i],
                schedule.steps,
                w,
                tuple(feeds) if i == 0 else (),
                tuple(latent[i : i + 1] for latent in latents),
                to_output(row, contract.output),
                contract.output.kind,
                each[i],
                negative,
            )
            for i, row in enumerate(np.split(result, size))
        ]

    def close(self) -> None:
        """Closes every open session."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def session(self, component: str) -> CheckedSession:
        """Returns the open session of a component, opening it if need be."""
        if component not in self._sessions:
            if not self._keep_open:
                self.close()
            self._sessions[component] = self._open_session(component)
        return self._sessions[component]

    def _phase(self, phase: str) -> list[str]:
        return [name for name, spec in self._components.items() if spec.phase == phase]

    def _before(
        self,
        prompts: Sequence[str],
        given: Mapping[str, Array],
        seeds: Sequence[int],
        w: float,
        branch: str,
        feeds: list[StepFeed],
        fixed: Mapping[str, Array],
    ) -> dict[str, Any]:
        """Returns all that is known before the loop, by origin; what is ``fixed`` is not computed."""
        values: dict[str, Any] = {GUIDANCE: w, **{f"{INPUT}{name}": array for name, array in given.items()}}
        for name, tokenizer in self._tokenizers.items():
            ids, masks = zip(*map(tokenizer, prompts), strict=True)
            values[f"{TOKENS}{name}"], values[f"{MASK}{name}"] = np.concatenate(ids), np.concatenate(masks)
        values |= fixed
        for component in needed_before(self._components, fixed) if fixed else self._phase(BEFORE):
            for spec in self._components[component].inputs:
                origin = self._components[component].bindings[spec.name]
                values.setdefault(origin, self._value(values, origin, spec.shape, seeds))
            feeds.append(self._call(component, values, branch=branch))
            values |= fixed
        return values

    def _draws(self, k: int, seeds: Sequence[int]) -> dict[str, Array]:
        """Returns what the networks of a step are given of the seeds' noise, by origin."""
        specs = [self._components[name] for name in self._phase(LOOP)]
        wanted = {s.bindings[t.name]: t.shape for s in specs for t in s.inputs if s.bindings[t.name].startswith(DRAW)}
        return {
            origin: noise.rows(seeds, draw_offset(k, int(origin.removeprefix(DRAW))), shape)
            for origin, shape in wanted.items()
        }

    def _value(self, values: Mapping[str, Any], origin: str, shape: tuple[int, ...], seeds: Sequence[int]) -> Any:
        if origin not in values and origin.startswith(NOISE):
            return noise.rows(seeds, int(origin.removeprefix(NOISE)), shape)
        return values[origin]

    def _call(
        self,
        component: str,
        values: dict[str, Any],
        *,
        step: int | None = None,
        timestep: float | None = None,
        branch: str = "cond",
    ) -> StepFeed:
        spec = self._components[component]
        inputs = {s.name: self._bind(values, spec.bindings[s.name], s) for s in spec.inputs}
        outputs = self._answer(component, inputs, step, branch)
        values |= {f"{component}.{name}": array for name, array in outputs.items()}
        return StepFeed(component, step, timestep, branch, inputs, outputs)

    def _answer(
        self, component: str, inputs: Mapping[str, Array], step: int | None, branch: str
    ) -> Mapping[str, Array]:
        """Returns what a network call gives, by name."""
        return self.session(component).run(inputs)

    def _bind(self, values: Mapping[str, Any], origin: str, spec: TensorSpec) -> Array:
        value = values[origin]
        if origin == GUIDANCE:
            value = guidance_value(self._contract.guidance, value)
        array = np.asarray(value, dtype=spec.dtype)
        if array.size == math.prod(spec.shape):
            return array.reshape(spec.shape)
        # A number of the step may be wanted once for every token; one row of guidance is for all samples.
        return np.full(spec.shape, array.reshape(-1)[0]) if array.size == 1 else np.broadcast_to(array, spec.shape)


def open_sampler(
    bundle: Bundle,
    *,
    runtime: str | Runtime | None = None,
    threads: int | None = None,
    keep_open: bool = True,
    exact: bool = False,
    rows: str | None = None,
) -> Sampler:
    """Returns a sampler on a bundle's artifacts for a runtime (the bundle's first unless named or given).

    Args:
        bundle: the bundle.
        runtime: one of its runtimes.
        threads: inside an op; None leaves the choice to the runtime.
        keep_open: leaves components open for the next picture.
        exact: compute in fp32 where the runtime can tell that apart from its own arithmetic.
        rows: how graphs of the specialized form are held, one of `fewstep.recipe.recipe.ROW_GRAPHS`; None takes the
            recipe's.

    Raises:
        ContractError: ``rows`` is none of them.
    """
    manifest = bundle.manifest
    backend = runtime if isinstance(runtime, Runtime) else get_runtime(runtime or manifest.runtimes[0])
    name = backend.name
    held = rows or manifest.recipe.get("row_graphs", ROW_GRAPHS[0])
    if held not in ROW_GRAPHS:
        raise ContractError(f"rows is {held!r}, expected one of {', '.join(ROW_GRAPHS)}")

    def open_graph(component: str, variant: str | None, spec: ComponentSpec, *, mapped: bool = False) -> CheckedSession:
        artifact = manifest.artifact(name, component, variant)
        there = backend.of(artifact)
        opened = there.open_exact if exact and there.open_exact is not None else there.open
        if mapped and there.open_mapped is not None:
            opened = there.open_mapped
        return opened(bundle.file(artifact.path), spec, threads)

    def open_session(component: str) -> CheckedSession:
        spec = manifest.components[component]
        if has_rows(manifest.contract, spec):

            def open_row(row: int) -> CheckedSession:
                return open_graph(component, row_variant(row), row_spec(spec), mapped=held == "mapped")

            return CheckedSession(component, spec, RowSession(spec, open_row, keep_open=held != "one"))
        if spec.tiles is None:
            return open_graph(component, None, spec)

        def open_tile(shape: tuple[int, int]) -> CheckedSession:
            return open_graph(component, tile_variant(shape), tile_spec(spec, shape))

        return CheckedSession(component, spec, TiledSession(spec, spec.tiles, open_tile))

    return Sampler(
        manifest.contract,
        manifest.components,
        open_tokenizers(bundle.path, manifest.tokenizers),
        open_session,
        unconditional=read_unconditional(manifest.contract.guidance, bundle.file),
        keep_open=keep_open,
    )


def open_tokenizers(folder: Path, specs: Mapping[str, TokenizerSpec]) -> dict[str, Tokenizer]:
    """Returns a bundle's tokenizers by name."""
    return {name: Tokenizer(resolve_inside(folder, spec.folder), spec) for name, spec in specs.items()}


def generate(
    bundle: Bundle,
    prompt: str,
    seed: int = 0,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    inputs: Mapping[str, Array] | None = None,
    runtime: str | None = None,
    on_step: OnStep | None = None,
) -> Sample:
    """Returns one picture from a bundle, holding one component in memory at a time."""
    given = None if inputs is None else [inputs]
    (sample,) = generate_batch(
        bundle,
        [prompt],
        [seed],
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        inputs=given,
        runtime=runtime,
        on_step=on_step,
    )
    return sample


def generate_batch(
    bundle: Bundle,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    inputs: Sequence[Mapping[str, Array]] | None = None,
    runtime: str | None = None,
    on_step: OnStep | None = None,
) -> list[Sample]:
    """Returns the samples of a batch from a bundle, holding one component in memory at a time: see `Sampler.batch`.

    Raises:
        ContractError: the bundle was not built for batches of so many, or as `Sampler.batch`.
    """
    bundle = bundle.batched(len(prompts))
    manifest = bundle.manifest
    schedule = manifest.schedule(manifest.default_steps if steps is None else steps)
    sampler = open_sampler(bundle, runtime=runtime, keep_open=False)
    try:
        return sampler.batch(
            prompts, seeds, schedule, guidance=guidance, negative=negative_prompt, inputs=inputs, on_step=on_step
        )
    finally:
        sampler.close()

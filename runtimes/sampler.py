"""Prompt and seed in, picture out, on any runtime: what an app does with a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep import noise
from fewstep.bundle import Bundle, resolve_inside
from fewstep.errors import ContractError
from fewstep.feeds import Sample, StepFeed
from fewstep.guidance import combine, guidance_embedding
from fewstep.inputs import check_inputs
from fewstep.manifest import (
    AFTER,
    BEFORE,
    DENOISER,
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
    TokenizerSpec,
    step_numbers,
)
from fewstep.output import to_output
from fewstep.runtimes import get_runtime
from fewstep.runtimes.base import CheckedSession, Runtime
from fewstep.runtimes.tiled import TiledSession, tile_spec, tile_variant
from fewstep.runtimes.tokenizer import Tokenizer
from fewstep.schedule import Schedule, sample_loop

Array = npt.NDArray[Any]
OpenSession = Callable[[str], CheckedSession]
OnStep = Callable[[int, int], None]


class Sampler:
    """Samples with one session for each component.

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
        keep_open: bool = True,
    ) -> None:
        self._contract = contract
        self._components = components
        self._tokenizers = tokenizers
        self._open_session = open_session
        self._keep_open = keep_open
        self._sessions: dict[str, CheckedSession] = {}

    def __call__(
        self,
        prompt: str,
        seed: int,
        schedule: Schedule,
        *,
        guidance: float | None = None,
        inputs: Mapping[str, Array] | None = None,
        on_step: OnStep | None = None,
    ) -> Sample:
        """Returns the sample of a prompt and a seed.

        Args:
            prompt: any text; what the tokenizer's length leaves out is cut off.
            seed: 0 to 2^64 - 1.
            schedule: the table of the step count wanted.
            guidance: the scale w; None takes the generator's own.
            inputs: what the generator takes beside the prompt, by name: see `InputSpec`.
            on_step: called with (steps done, steps) after each.

        Raises:
            ContractError: guidance for a generator that takes none, an input missing, unknown or of another shape, or a
                step that the networks are not compiled for.
        """
        contract = self._contract
        w = contract.guidance.scale if guidance is None else guidance
        if guidance is not None and contract.guidance.kind == "none" and guidance != contract.guidance.scale:
            raise ContractError(
                f"guidance is {guidance}, but this generator takes none",
                hint="leave --guidance out, or build it with --guidance",
            )
        given = check_inputs(contract.inputs, inputs or {})
        rows = [0 if contract.form == "step" else contract.row(schedule, k) for k in range(schedule.steps)]
        feeds: list[StepFeed] = []
        latents: list[Array] = []
        branches = ("uncond", "cond") if contract.guidance.kind == "two_pass" else ("cond",)
        texts = {"cond": prompt, "uncond": contract.guidance.negative}
        values = {branch: self._before(texts[branch], given, seed, w, branch, feeds) for branch in branches}
        shape = (1, *contract.latent_shape)
        anchor = values["cond"][contract.anchor] if contract.anchor else None

        def denoise(k: int, x: Array) -> Array:
            outputs = {}
            for branch in branches:
                values[branch].update({LATENT: x, STEP: rows[k], **step_numbers(schedule, k)})
                for component in self._phase(LOOP):
                    feeds.append(
                        self._call(component, values[branch], step=k, timestep=schedule.timesteps[k], branch=branch)
                    )
                    if component == DENOISER:
                        outputs[branch] = next(iter(feeds[-1].outputs.values()))
            return combine(outputs["uncond"], outputs["cond"], w) if len(branches) == 2 else outputs["cond"]

        def step_done(k: int, x: Array, x0: Array) -> None:
            latents.append(x)
            if on_step is not None:
                on_step(k + 1, schedule.steps)

        # A python float keeps float32 arithmetic in float32.
        x_init = schedule.init_scale * self._value(values["cond"], contract.initial, shape, seed)
        if anchor is not None and schedule.init_anchor:
            x_init = x_init + schedule.init_anchor * anchor
        x = sample_loop(schedule, x_init, denoise, lambda k: noise.normal(seed, k + 1, shape), step_done, anchor=anchor)
        last = values["cond"]
        last[SAMPLE] = result = x / contract.latent_scale + contract.latent_shift
        for component in self._phase(AFTER):
            feeds.append(self._call(component, last))
            result = next(iter(feeds[-1].outputs.values()))
        output = to_output(result, contract.output)
        return Sample(
            prompt, seed, schedule.steps, w, tuple(feeds), tuple(latents), output, contract.output.kind, given
        )

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
        self, prompt: str, given: Mapping[str, Array], seed: int, w: float, branch: str, feeds: list[StepFeed]
    ) -> dict[str, Any]:
        """Returns all that is known before the loop, by origin."""
        values: dict[str, Any] = {GUIDANCE: w, **{f"{INPUT}{name}": array for name, array in given.items()}}
        for name, tokenizer in self._tokenizers.items():
            values[f"{TOKENS}{name}"], values[f"{MASK}{name}"] = tokenizer(prompt)
        for component in self._phase(BEFORE):
            for spec in self._components[component].inputs:
                origin = self._components[component].bindings[spec.name]
                values.setdefault(origin, self._value(values, origin, spec.shape, seed))
            feeds.append(self._call(component, values, branch=branch))
        return values

    def _value(self, values: Mapping[str, Any], origin: str, shape: tuple[int, ...], seed: int) -> Any:
        if origin not in values and origin.startswith(NOISE):
            return noise.normal(seed, int(origin.removeprefix(NOISE)), shape)
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
        outputs = self.session(component).run(inputs)
        values |= {f"{component}.{name}": array for name, array in outputs.items()}
        return StepFeed(component, step, timestep, branch, inputs, outputs)

    def _bind(self, values: Mapping[str, Any], origin: str, spec: TensorSpec) -> Array:
        value = values[origin]
        if origin == GUIDANCE:
            value = guidance_embedding(self._contract.guidance, value)
        array = np.asarray(value, dtype=spec.dtype)
        # A number of the step may be wanted once for every token.
        return np.full(spec.shape, array.reshape(-1)[0]) if array.size == 1 else array.reshape(spec.shape)


def open_sampler(
    bundle: Bundle,
    *,
    runtime: str | Runtime | None = None,
    threads: int | None = None,
    keep_open: bool = True,
    exact: bool = False,
) -> Sampler:
    """Returns a sampler on a bundle's artifacts for a runtime (the bundle's first unless named or given).

    ``exact`` computes in fp32 where the runtime can tell that apart from its own arithmetic.
    """
    manifest = bundle.manifest
    backend = runtime if isinstance(runtime, Runtime) else get_runtime(runtime or manifest.runtimes[0])
    name = backend.name
    opened = backend.open_exact if exact and backend.open_exact is not None else backend.open

    def open_graph(component: str, variant: str | None, spec: ComponentSpec) -> CheckedSession:
        return opened(bundle.file(manifest.artifact(name, component, variant).path), spec, threads)

    def open_session(component: str) -> CheckedSession:
        spec = manifest.components[component]
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
    inputs: Mapping[str, Array] | None = None,
    runtime: str | None = None,
    on_step: OnStep | None = None,
) -> Sample:
    """Returns one picture from a bundle, holding one component in memory at a time."""
    manifest = bundle.manifest
    schedule = manifest.schedule(manifest.default_steps if steps is None else steps)
    sampler = open_sampler(bundle, runtime=runtime, keep_open=False)
    try:
        return sampler(prompt, seed, schedule, guidance=guidance, inputs=inputs, on_step=on_step)
    finally:
        sampler.close()

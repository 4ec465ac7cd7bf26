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
from fewstep.manifest import (
    DECODER,
    DENOISER,
    GUIDANCE,
    LATENT,
    SAMPLE,
    TIMESTEP,
    TOKENS,
    ComponentSpec,
    Contract,
    Manifest,
    TensorSpec,
)
from fewstep.runtimes import get_runtime
from fewstep.runtimes.base import CheckedSession
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
        on_step: OnStep | None = None,
    ) -> Sample:
        """Returns the sample of a prompt and a seed.

        Args:
            prompt: any text; what the tokenizer's length leaves out is cut off.
            seed: 0 to 2^64 - 1.
            schedule: the table of the step count wanted.
            guidance: the scale w; None takes the generator's own.
            on_step: called with (steps done, steps) after each.
        """
        w = self._contract.guidance.scale if guidance is None else guidance
        if (
            guidance is not None
            and self._contract.guidance.kind == "none"
            and guidance != self._contract.guidance.scale
        ):
            raise ContractError(
                f"guidance is {guidance}, but this generator takes none",
                hint="leave --guidance out, or build it with --guidance",
            )
        feeds: list[StepFeed] = []
        latents: list[Array] = []
        branches = ("uncond", "cond") if self._contract.guidance.kind == "two_pass" else ("cond",)
        conditions = {b: self._encode(prompt if b == "cond" else "", feeds) for b in branches}
        shape = (1, *self._contract.latent_shape)

        def denoise(k: int, x: Array) -> Array:
            outputs = {}
            for branch in branches:
                values = {LATENT: x, TIMESTEP: schedule.timesteps[k], GUIDANCE: w, **conditions[branch]}
                feed = self._call(DENOISER, values, step=k, timestep=schedule.timesteps[k], branch=branch)
                feeds.append(feed)
                outputs[branch] = next(iter(feed.outputs.values()))
            return combine(outputs["uncond"], outputs["cond"], w) if len(branches) == 2 else outputs["cond"]

        def step_done(k: int, x: Array, x0: Array) -> None:
            latents.append(x)
            if on_step is not None:
                on_step(k + 1, schedule.steps)

        # A python float keeps float32 arithmetic in float32.
        x_init = schedule.init_scale * noise.normal(seed, 0, shape)
        x = sample_loop(schedule, x_init, denoise, lambda k: noise.normal(seed, k + 1, shape), step_done)
        decoded = self._call(DECODER, {SAMPLE: x / self._contract.latent_scale + self._contract.latent_shift})
        feeds.append(decoded)
        picture_HWC = to_picture(next(iter(decoded.outputs.values())))
        return Sample(prompt, seed, schedule.steps, w, tuple(feeds), tuple(latents), picture_HWC)

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

    def _encode(self, prompt: str, feeds: list[StepFeed]) -> dict[str, Array]:
        values: dict[str, Any] = {f"{TOKENS}{name}": tokenizer(prompt) for name, tokenizer in self._tokenizers.items()}
        for component in self._components:
            if component not in (DENOISER, DECODER):
                feed = self._call(component, values)
                feeds.append(feed)
                values |= {f"{component}.{name}": array for name, array in feed.outputs.items()}
        return values

    def _call(
        self,
        component: str,
        values: Mapping[str, Any],
        *,
        step: int | None = None,
        timestep: float | None = None,
        branch: str = "cond",
    ) -> StepFeed:
        spec = self._components[component]
        inputs = {s.name: self._bind(values, spec.bindings[s.name], s) for s in spec.inputs}
        outputs = self.session(component).run(inputs)
        return StepFeed(component, step, timestep, branch, inputs, outputs)

    def _bind(self, values: Mapping[str, Any], origin: str, spec: TensorSpec) -> Array:
        value = values[origin]
        if origin == GUIDANCE:
            value = guidance_embedding(self._contract.guidance, value)
        return np.asarray(value, dtype=spec.dtype).reshape(spec.shape)


def to_picture(decoded_NCHW: Array) -> npt.NDArray[np.float32]:
    """Returns the first picture of a decoder's output in [-1, 1] as float32 [H, W, C] in [0, 1]."""
    picture = np.clip(decoded_NCHW[0] * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)
    return np.ascontiguousarray(picture.transpose(1, 2, 0), dtype=np.float32)


def open_sampler(
    bundle: Bundle, *, runtime: str | None = None, threads: int | None = None, keep_open: bool = True
) -> Sampler:
    """Returns a sampler on a bundle's artifacts for a runtime (the bundle's first unless named)."""
    manifest = bundle.manifest
    name = runtime or manifest.runtimes[0]
    backend = get_runtime(name)

    def open_session(component: str) -> CheckedSession:
        artifact = manifest.artifact(name, component)
        return backend.open(bundle.file(artifact.path), manifest.components[component], threads)

    return Sampler(
        manifest.contract,
        manifest.components,
        open_tokenizers(bundle.path, manifest),
        open_session,
        keep_open=keep_open,
    )


def open_tokenizers(folder: Path, manifest: Manifest) -> dict[str, Tokenizer]:
    """Returns a bundle's tokenizers by name."""
    return {name: Tokenizer(resolve_inside(folder, spec.folder), spec) for name, spec in manifest.tokenizers.items()}


def generate(
    bundle: Bundle,
    prompt: str,
    seed: int = 0,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    runtime: str | None = None,
    on_step: OnStep | None = None,
) -> Sample:
    """Returns one picture from a bundle, holding one component in memory at a time."""
    manifest = bundle.manifest
    schedule = manifest.schedule(manifest.default_steps if steps is None else steps)
    sampler = open_sampler(bundle, runtime=runtime, keep_open=False)
    try:
        return sampler(prompt, seed, schedule, guidance=guidance, on_step=on_step)
    finally:
        sampler.close()

"""What a bundle does at every guidance scale and negative prompt is what the pipeline does when its user calls it."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline

from fewstep.bundle.contract import ZEROS, ComponentSpec, Guidance, InputSpec, TensorSpec, needed_before
from fewstep.bundle.schedule import Schedule
from fewstep.bundle.source import SourceInfo
from fewstep.errors import BundleError, ContractError, ExportError
from fewstep.export import Description, Generator, describe, load, record, write_tokenizers
from fewstep.export.contract.guidance_probe import Probe
from fewstep.export.trace.component_module import wired_module
from fewstep.numerics import noise
from fewstep.numerics.guidance import (
    guidance_text,
    guidance_value,
    read_unconditional,
    unguided_notes,
    write_unconditional,
)
from fewstep.numerics.metrics import psnr_db, sqnr_db
from fewstep.runtimes.base import CheckedSession
from fewstep.runtimes.sampling.sampler import Sampler, open_tokenizers
from tests.support import tiny
from tests.support.zoo import dits, unets
from tests.support.zoo.parts import alive

# Eager networks, the same on both sides; what differs is the order of a few float32 sums.
LEAST_DB = 100.0
STEPS = 2
PROMPT = "a red apple"


@dataclass(frozen=True)
class Case:
    """A pipeline as its user has it, and our description of it."""

    pipeline: Any
    generator: Generator
    described: Description
    sampler: Sampler

    @property
    def guidance(self) -> Guidance:
        return self.described.contract.guidance

    def ours(self, **given: Any) -> np.ndarray[Any, Any]:
        schedule = self.described.schedules[STEPS]
        return self.sampler(PROMPT, 7, schedule, **given).output

    def theirs(self, **given: Any) -> np.ndarray[Any, Any]:
        """The pipeline called by its user, on our first latent."""
        shape = (1, *self.described.contract.latent_shape)
        latents = torch.from_numpy(noise.normal(7, 0, shape))
        with torch.no_grad():
            made = self.pipeline(
                PROMPT, num_inference_steps=STEPS, output_type="np", latents=latents, **self.generator.options, **given
            )
        return np.asarray(made.images[0])

    def agrees(self, scale: float, negative: str | None = None) -> None:
        given = {} if negative is None else {"negative_prompt": negative}
        found = psnr_db(self.theirs(guidance_scale=scale, **given), self.ours(guidance=scale, negative=negative))
        assert found >= LEAST_DB, f"guidance {scale}, negative {negative!r}: {found:.1f} dB"


class _Eager:
    """A component, computed by its module as it is."""

    def __init__(self, module: torch.nn.Module, spec: ComponentSpec) -> None:
        self._module, self._spec = module, spec

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        with torch.no_grad():
            results = self._module(*(torch.from_numpy(np.array(feeds[i.name])) for i in self._spec.inputs))
        return {o.name: r.numpy() for o, r in zip(self._spec.outputs, results, strict=True)}

    def close(self) -> None:
        pass


def eager(generator: Generator, described: Description, guidance: Guidance | None = None) -> Sampler:
    folder = Path(tempfile.mkdtemp())
    write_tokenizers(generator, described.tokenizers, folder)
    contract = replace(described.contract, guidance=guidance or described.contract.guidance)

    def session(name: str) -> CheckedSession:
        spec = described.components[name]
        return CheckedSession(name, spec, _Eager(wired_module(generator, described.wirings[name]), spec))

    tokenizers = open_tokenizers(folder, described.tokenizers)
    return Sampler(contract, described.components, tokenizers, session, unconditional=described.guided.values)


def case(pipeline: Any, *, guidance: float = 2.0, **options: Any) -> Case:
    pipeline.set_progress_bar_config(disable=True)
    made = Generator.from_pipeline(pipeline, SourceInfo("t", "diffusers", "t"), name="t", options=options)
    generator = replace(made, guidance=guidance, default_steps=STEPS)
    described = describe(generator, (STEPS,))
    return Case(pipeline, generator, described, eager(generator, described))


def _folder(write: Callable[..., Path], **options: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(write(Path(tempfile.mkdtemp()) / "source", **options))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")


@functools.cache
def sd() -> Case:
    return case(_folder(tiny.turbo_folder))


@functools.cache
def sdxl(zeros: bool) -> Case:
    pipeline = _folder(unets.sdxl, scheduler=_euler())
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    return case(pipeline)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, math.nextafter(1, 2), 1.5, 3.0])
def test_every_scale_is_the_pipelines(scale: float) -> None:
    sd().agrees(scale)
    passes = {feed.branch for feed in sd().sampler(PROMPT, 7, sd().described.schedules[STEPS], guidance=scale).feeds}
    assert passes == ({"cond", "uncond"} if scale > 1 else {"cond"}), "half the calls where the pipeline makes half"


@pytest.mark.parametrize("negative", [None, "", "blurry", "Blurry, LOW quality"])
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_negative_prompts_are_the_pipelines(scale: float, negative: str | None) -> None:
    for of in (sd(), sdxl(True), sdxl(False)):
        of.agrees(scale, negative)


def test_no_negative_prompt_may_be_zeros_and_not_an_empty_text() -> None:
    found = sdxl(True).guidance
    assert set(found.unconditional.values()) == {ZEROS}
    assert len(found.unconditional) == 2, "states of the tokens, and the pooled one"
    assert found.takes_negative and not found.empty_is_none
    assert sdxl(False).guidance.unconditional == {}
    calls = sdxl(True).sampler(PROMPT, 7, sdxl(True).described.schedules[STEPS]).feeds
    assert {f.component for f in calls if f.branch == "uncond"} == {"denoiser"}, "nothing is encoded for zeros"
    # The fault as it was: an empty text.
    as_text = eager(sdxl(True).generator, sdxl(True).described, replace(found, unconditional={}))
    wrong = as_text(PROMPT, 7, sdxl(True).described.schedules[STEPS], guidance=2.0).output
    assert psnr_db(sdxl(True).theirs(guidance_scale=2.0), wrong) < 60


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_the_reference_is_recorded_in_the_same_passes(scale: float) -> None:
    for of in (sd(), sdxl(True)):
        for negative in (None, "Blurry"):
            sample = record(of.generator, of.described, PROMPT, 7, steps=STEPS, guidance=scale, negative=negative)
            ours = of.sampler(PROMPT, 7, of.described.schedules[STEPS], guidance=scale, negative=negative)
            assert [(f.component, f.step, f.branch) for f in sample.feeds] == [
                (f.component, f.step, f.branch) for f in ours.feeds
            ]
            for a, b in zip(sample.feeds, ours.feeds, strict=True):
                for name, array in a.inputs.items():  # the latent of the last step has gone through all of them
                    assert sqnr_db(array, b.inputs[name]) >= 90, f"{a.component} {name} {a.step} {a.branch}"


def test_recording_refuses_another_unconditional_branch_than_described() -> None:
    of = sdxl(True)
    wrong = replace(of.described.contract, guidance=replace(of.guidance, unconditional={}))
    with pytest.raises(ExportError, match="the uncond branch is given another"):
        record(of.generator, replace(of.described, contract=wrong), PROMPT, 7, steps=STEPS, guidance=2.0)


class _Pipeline(StableDiffusionPipeline):
    """A pipeline whose guidance is another, by ``way``."""

    way = ""

    @property
    def do_classifier_free_guidance(self) -> bool:
        w = self._guidance_scale
        return {"at least 1": w >= 1, "above 0": w > 0, "between": 1 < w < 5, "late": w > 1.3}.get(self.way, w > 1)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        positive, negative = super().encode_prompt(*args, **kwargs)
        if negative is not None and self.way == "constant":
            negative = torch.linspace(-1, 1, negative.numel()).reshape(negative.shape)
        if negative is not None and self.way == "of the prompt":
            negative = 0.5 * positive
        return positive, negative


def _other(way: str) -> Any:
    base = _folder(tiny.turbo_folder)
    pipeline = _Pipeline(**base.components, requires_safety_checker=False)
    pipeline.way = way
    return pipeline


@pytest.mark.parametrize(("way", "threshold"), [("at least 1", math.nextafter(1, 0)), ("above 0", 0.0), ("late", 1.3)])
def test_the_threshold_is_found_to_the_last_bit(way: str, threshold: float) -> None:
    found = case(_other(way))
    assert found.guidance.threshold == threshold
    assert not found.guidance.two_passes(threshold) and found.guidance.two_passes(math.nextafter(threshold, 9))
    for scale in (0.0, 0.5, 1.0, 1.3, 2.0):
        found.agrees(scale)


def test_a_constant_of_the_unconditional_branch_is_a_tensor_of_the_bundle(tmp_path: Path) -> None:
    found = case(_other("constant"))
    (origin,) = found.guidance.unconditional
    assert found.guidance.unconditional[origin] == "guidance/unconditional.safetensors"
    assert not found.guidance.takes_negative, "the pipeline ignores its text"
    found.agrees(2.0)
    write_unconditional(found.guidance, found.described.guided.values, tmp_path)
    back = read_unconditional(found.guidance, lambda relative: tmp_path / relative)
    np.testing.assert_array_equal(back[origin], found.described.guided.values[origin])
    with pytest.raises(BundleError, match="does not hold moon"):
        read_unconditional(
            replace(found.guidance, unconditional={"moon": "guidance/unconditional.safetensors"}),
            lambda r: tmp_path / r,
        )
    with pytest.raises(ContractError, match="a negative prompt is given, but this generator takes none"):
        found.ours(negative="blurry")


@pytest.mark.parametrize(
    ("way", "options", "text"),
    [
        ("between", {}, "makes one pass at guidance 7.5 and two at"),
        ("of the prompt", {}, "neither what the text '' gives nor the same for all prompts"),
        ("", {"guidance_rescale": 0.7}, r"is made of 0.\d+ F_u and .* expected 1 \(F_u \+ w \(F_c - F_u\)\)"),
    ],
)
def test_other_guidance_is_refused_by_name(way: str, options: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ExportError, match=text):
        case(_other(way), **options)


def test_guidance_that_is_not_asked_for_is_left_out_and_said() -> None:
    found = case(_other("of the prompt"), guidance=0.0)
    assert found.guidance.kind == "fixed"
    found.agrees(0.0)
    with pytest.raises(ContractError, match="guidance is 3, but this bundle is made for 0 alone") as error:
        found.ours(guidance=3.0)
    assert "nor the same for all prompts" in str(error.value)
    assert "made for 0 alone" in guidance_text(found.guidance)


@functools.cache
def flux() -> Case:
    pipeline = _folder(functools.partial(dits._flux, guidance_embedding=True))
    return case(pipeline, guidance=3.5, max_sequence_length=dits.LENGTH, height=16, width=16)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5, 7.1])
def test_a_scale_that_is_an_input_of_the_network(scale: float) -> None:
    assert (flux().guidance.kind, flux().guidance.factor, flux().guidance.shift) == ("scalar", 1.0, 0.0)
    sample = record(flux().generator, flux().described, PROMPT, 7, steps=STEPS, guidance=scale)
    ours = flux().sampler(PROMPT, 7, flux().described.schedules[STEPS], guidance=scale)
    assert psnr_db(sample.output, ours.output) >= LEAST_DB
    assert psnr_db(sample.output, flux().ours(guidance=scale + 1)) < 80, "the scale matters"


def test_the_default_is_the_pipelines_own_where_it_is_an_input(tmp_path: Path) -> None:
    assert load(str(tiny.lcm_folder(tmp_path / "lcm"))).guidance == 8.5
    own = load(str(dits._flux(tmp_path / "flux", guidance_embedding=True)))
    assert own.guidance == 3.5
    assert load(str(tiny.turbo_folder(tmp_path / "turbo"))).guidance == 0.0, "few steps are made for no guidance"
    assert load(str(tmp_path / "flux"), guidance=0.0).guidance == 0.0


def test_faults_that_are_put_back_are_noticed() -> None:
    # Two passes at every scale: with guidance 0 the prompt would count for nothing.
    always = eager(sd().generator, sd().described, replace(sd().guidance, threshold=None))
    assert psnr_db(sd().theirs(guidance_scale=0.0), always(PROMPT, 7, _schedule(), guidance=0.0).output) < 60
    # One pass at every scale.
    never = eager(sd().generator, sd().described, replace(sd().guidance, threshold=100.0))
    assert psnr_db(sd().theirs(guidance_scale=3.0), never(PROMPT, 7, _schedule(), guidance=3.0).output) < 60
    # A scale that is another number than the network is told.
    contract = replace(flux().described.contract, guidance=replace(flux().guidance, factor=0.0))
    with pytest.raises(
        ExportError, match="denoiser: the cond branch is given another guidance than the bundle computes"
    ):
        record(flux().generator, replace(flux().described, contract=contract), PROMPT, 7, steps=STEPS, guidance=3.5)


def _schedule() -> Schedule:
    return sd().described.schedules[STEPS]


def test_a_label_that_the_network_does_not_have_is_noticed() -> None:
    pipeline = _folder(dits._dit)  # its unconditional label is 1000, of a table of 10
    made = Generator.from_pipeline(pipeline, SourceInfo("t", "diffusers", "t"), name="t")
    off = describe(replace(made, guidance=0.0), (STEPS,)).contract.guidance
    assert off.kind == "fixed"
    assert "denoiser fails with what the unconditional pass is given: IndexError" in off.reason


def test_what_a_bundle_does_with_guidance_is_said() -> None:
    off = replace(sd().guidance, scale=0.0)
    assert guidance_text(off) == (
        "the pipeline's own default is 7.5, this bundle's is 0 (off); --guidance changes it: two passes in each step "
        "above 1"
    )
    assert unguided_notes(off, None, "blurry") and not unguided_notes(off, 2.0, "blurry")
    assert "takes none" in guidance_text(Guidance("none", 0.0))
    assert "the pipeline's own default is 3.5" in guidance_text(flux().guidance)


def test_a_scale_without_effect_is_none() -> None:
    class Deaf(StableDiffusionPipeline):
        do_classifier_free_guidance = property(lambda self: False)

    base = _folder(tiny.turbo_folder)
    found = case(Deaf(**base.components, requires_safety_checker=False))
    assert found.guidance.kind == "none"
    with pytest.raises(ContractError, match="guidance is 3, but this generator takes none"):
        found.ours(guidance=3.0)


def _shape() -> tuple[int, ...]:
    return (1, 3, 8, 8)


class _Net(torch.nn.Module):
    """A network of a latent, a time, a class and the guidance scale."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.label = torch.nn.Embedding(5, 3)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor, w: torch.Tensor | None = None
    ) -> torch.Tensor:
        y: torch.Tensor = self.mix(x) + self.label(label)[:, :, None, None] + torch.as_tensor(t).reshape(-1, 1, 1, 1)
        return (y if w is None else y * (1 + w.reshape(-1, 1, 1, 1))).tanh()


def _guided(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor, nets: Any, w: float) -> torch.Tensor:
    null = torch.full_like(label, 4)
    c, u = nets["denoiser"](torch.cat([x, x]), t, torch.cat([label, null])).chunk(2)  # the conditional one first
    return u + w * (c - u)


def _loop(kind: str) -> Any:
    def sample(nets: Any, inputs: Any, *, steps: int, guidance: float, noise: Any) -> torch.Tensor:
        x = noise(_shape())
        for k in range(steps):
            t, label = torch.tensor([1 - k / steps]), inputs["label"]
            if kind == "two passes":
                v = _guided(x, t, label, nets, guidance) if guidance > 1 else nets["denoiser"](x, t, label)
            elif kind == "rescaled":
                v = _guided(x, t, label, nets, guidance) if guidance > 1 else nets["denoiser"](x, t, label)
                v = v / v.std() if guidance > 1 else v
            elif kind == "number":
                v = nets["denoiser"](x, t, label, torch.tensor([guidance * 0.1 - 0.3]))
            elif kind == "square":
                v = nets["denoiser"](x, t, label, torch.tensor([guidance**2]))
            elif kind == "python":
                v = nets["denoiser"](x, float(t), label)
            else:  # the sampler's own numbers
                v = guidance * nets["denoiser"](x, t, label)
            x = x - v / steps
        return x

    return sample


def _described_loop(kind: str, guidance: float) -> tuple[Generator, Description]:
    inputs = (InputSpec("label", "class", (1,), 4),)
    net = alive(_Net(), seed=3)
    made = Generator.assemble(
        "loop", {"denoiser": net}, _loop(kind), inputs=inputs, steps=(1, STEPS), guidance=guidance
    )
    return made, describe(made, (1, STEPS))


@pytest.mark.parametrize(
    ("kind", "built_at", "scales"), [("two passes", 3.0, (0.0, 1.0, 2.0, 3.0)), ("number", 3.0, (0.0, 2.0, 7.1))]
)
def test_loops_in_plain_pytorch(kind: str, built_at: float, scales: tuple[float, ...]) -> None:
    generator, described = _described_loop(kind, built_at)
    sampler = eager(generator, described)
    label = np.array([2])
    for scale in scales:
        draw = torch.from_numpy(noise.normal(7, 0, _shape()))
        with torch.no_grad():
            given = {"label": torch.from_numpy(label)}
            expected = generator.pipeline(given, steps=STEPS, guidance=scale, noise=lambda _, draw=draw: draw)
        ours = sampler("", 7, described.schedules[STEPS], guidance=scale, inputs={"label": label})
        np.testing.assert_allclose(ours.latents[-1], expected.numpy(), rtol=0, atol=5e-6, err_msg=f"guidance {scale}")
        record(generator, described, "", 7, steps=STEPS, guidance=scale, inputs={"label": label})
    if kind == "two passes":
        assert described.guided.conditional == 0, "the conditional pass is the first"
        assert list(described.contract.guidance.unconditional) == ["input:label"]
    else:
        assert described.contract.guidance.kind == "scalar"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("rescaled", "is not that of F_u"),
        ("square", "denoiser.w depends on the guidance scale, and is neither"),
        ("python", "denoiser: argument t is 1.0 in step 0 and 0.5 in step 1"),
    ],
)
def test_loops_that_cannot_be_expressed_are_refused(kind: str, text: str) -> None:
    with pytest.raises(ExportError, match=text):
        _described_loop(kind, 3.0)


def test_a_scale_among_the_samplers_numbers_is_that_of_the_build() -> None:
    generator, described = _described_loop("sampler", 3.0)
    assert described.contract.guidance.kind == "fixed"
    with pytest.raises(ContractError, match="guidance is 2, but this bundle is made for 3 alone"):
        eager(generator, described)("", 7, described.schedules[1], guidance=2.0, inputs={"label": np.array([2])})


def test_only_what_the_loop_wants_is_computed() -> None:
    def part(phase: str, **bindings: str) -> ComponentSpec:
        spec = TensorSpec("y", "float32", (1,))
        return ComponentSpec(tuple(replace(spec, name=n) for n in bindings), (spec,), bindings, phase)

    parts = {
        "words": part("before", ids="tokens:t"),
        "states": part("before", x="words.y"),
        "pooled": part("before", x="words.y"),
        "net": part("loop", x="latent", c="states.y", p="pooled.y"),
    }
    assert needed_before(parts, ()) == ["words", "states", "pooled"]
    assert needed_before(parts, ("states.y",)) == ["words", "pooled"]
    assert needed_before(parts, ("states.y", "pooled.y")) == []


def test_numbers_are_rounded_as_the_pipeline_rounds_them() -> None:
    told = Guidance("scalar", 0.0, factor=float(torch.tensor(0.1)), shift=0.0)
    for w in (0.3, 4.5, 7.1):
        expected = torch.full((1,), w) * 0.1
        np.testing.assert_array_equal(guidance_value(told, w), expected.numpy())


def test_stand_ins_tell_texts_apart_without_weights() -> None:
    """Networks whose weights stay in files are stood for by numbers that the row of their inputs decides."""
    from fewstep.export.record.run import run
    from fewstep.export.source.offloaded_networks import shape_stand_ins

    generator = sdxl(True).generator
    shapes = shape_stand_ins(generator)
    recorded = run(generator, PROMPT, 0, steps=STEPS, guidance=0.0, stubs=shapes)
    probe = Probe(generator, recorded, STEPS, 0.0, shapes)

    def states(**given: Any) -> torch.Tensor:
        return probe.run(**given).denoiser_calls[0].inputs["encoder_hidden_states"]

    assert torch.equal(states(), states()) and not torch.equal(states(), states(which=1))
    both = states(w=2.0, negative="blurry")
    assert torch.equal(both[1:], states()) and torch.equal(both[:1], states(prompt="blurry"))

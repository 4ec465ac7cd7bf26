"""What a device must know to run a generator: components, where every input comes from, and what a step is told."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fewstep.bundle.schedule import DENOISER as DENOISER
from fewstep.bundle.schedule import Schedule
from fewstep.bundle.tiles import Tiles
from fewstep.errors import ContractError
from fewstep.numerics.noise import draw_offset as draw_offset

DECODER = "decoder"
ENCODER = "encoder"
# What pipelines compute between their networks, as components of their own: what depends on the user's inputs alone,
# and the first latent where it is not simply noise.
CONDITIONS = "conditions"
INITIAL = "initial"

# Where the value of a component's input comes from. "<component>.<output>" names another component's output.
TOKENS = "tokens:"  # + tokenizer: the ids
MASK = "mask:"  # + tokenizer: 1 for each id that is not padding
INPUT = "input:"  # + name: what the user gave
NOISE = "noise:"  # + offset: a draw of the seed's noise
DRAW = "draw:"  # + number: a draw of the step for its networks, beside the one that its sampler adds
LATENT = "latent"  # s_k x_k
TIMESTEP = "timestep"  # t_k
STEP = "step"  # the row of the contract's table of steps
TIME = "time:"  # + name: a further number of the step, column ``times`` of the schedule
GUIDANCE = "guidance_embedding"
ZEROS = "zeros"  # what `Guidance.unconditional` says of a value that is nothing but zeros
SAMPLE = "sample"  # the last latent, as the contract scales it for the decoder

# When a component runs.
BEFORE, LOOP, AFTER = "before", "loop", "after"

# Kinds of inputs.
TEXT, CLASS, IMAGE = "text", "class", "image"


def is_denoiser(component: str) -> bool:
    """Returns whether a network of the loop makes F: `DENOISER`, or ``denoiser_...`` in the steps that call another."""
    return component == DENOISER or component.startswith(f"{DENOISER}_")


def called_in_step(component: str, schedule: Schedule, k: int) -> bool:
    """Returns whether a network of the loop is called in step k: of those that make F, one is."""
    return not is_denoiser(component) or component == schedule.network(k)


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype and static shape of one input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def check(self, shape: tuple[int, ...], dtype: str, where: str) -> None:
        """Raises ContractError unless an array of this shape and dtype fits."""
        if tuple(shape) != self.shape or dtype != self.dtype:
            raise ContractError(
                f"{where}: {self.name} is {dtype} {list(shape)}, expected {self.dtype} {list(self.shape)}",
                hint="the manifest's component section lists what each component takes",
            )


@dataclass(frozen=True)
class ComponentSpec:
    """One network call: its inputs in order, its outputs, where each input comes from, and when it runs.

    ``phase`` is ``before`` the loop, in every step of the ``loop`` (in the order of the manifest's components) or
    ``after`` it. Where the networks of the steps differ, a step calls the one that its schedule names: see
    `called_in_step`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    bindings: Mapping[str, str]
    phase: str = BEFORE
    tiles: Tiles | None = None
    """Whether the input is cut into tiles, and how; the runtime's graphs are those of the tiles then."""


@dataclass(frozen=True)
class InputSpec:
    """What the user of a generator gives.

    ``text`` goes through tokenizers; a ``class`` is int64 [1], below ``count``; an ``image`` is float32 ``shape`` in
    [0, 1].
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    count: int | None = None


@dataclass(frozen=True)
class OutputSpec:
    """How the last component's output becomes the result: ``clip(scale * y + shift)``; ``kind`` says what it is.

    ``rate`` is the number of samples a second of a sound, None where it is not known.
    """

    kind: str = "picture"
    scale: float = 0.5
    shift: float = 0.5
    clip: tuple[float, float] | None = (0.0, 1.0)
    rate: int | None = None


@dataclass(frozen=True)
class Guidance:
    """How the guidance scale w acts on a generator.

    ``none``: not at all. ``fixed``: the bundle is made for ``scale`` alone, and ``reason`` says why. ``embedded``: an
    input of the network, [sin(a_0) ... sin(a_n) cos(a_0) ... cos(a_n)] with a_i = ``factor`` (w - 1) ``frequencies[i]``
    in float32. ``scalar``: an input of the network, the number ``factor`` w + ``shift`` in float32, in all of its
    elements. ``two_pass``: F = F_u + (w + ``shift``) (F_c - F_u) where w > ``threshold`` (at every w, if that is None),
    and F = F_c elsewhere, in one pass. The frequencies are numbers and not a formula because the angles reach
    thousands, where the last bit of an ``exp`` moves a sine by 1e-4.

    F_u, the unconditional branch, is F with the text ``negative`` for the prompt, but with the values of
    ``unconditional`` at their origins: ``zeros``, or the safetensors file of the bundle that holds the origin's tensor,
    one row of it. A negative prompt of the user, where the generator takes one, takes the place of both;
    ``empty_is_none`` where an empty one is as none.

    ``own`` is the scale that the pipeline takes when its user gives none.
    """

    kind: str
    scale: float
    frequencies: tuple[float, ...] = ()
    factor: float = 1000.0
    shift: float = 0.0
    threshold: float | None = None
    negative: str = ""
    unconditional: Mapping[str, str] = field(default_factory=dict)
    takes_negative: bool = False
    empty_is_none: bool = False
    own: float | None = None
    reason: str = ""

    def two_passes(self, scale: float) -> bool:
        """Returns whether a sample of this scale is made with two passes in each step."""
        return self.kind == "two_pass" and (self.threshold is None or scale > self.threshold)

    def check(self, scale: float | None, negative: str | None) -> float:
        """Returns the scale that a sample is made with.

        Raises:
            ContractError: a scale or a negative prompt that the generator does not take.
        """
        if scale is not None and scale != self.scale and self.kind in ("none", "fixed"):
            why = (
                "this generator takes none" if self.kind == "none" else f"this bundle is made for {self.scale:g} alone"
            )
            hint = f"leave the guidance out: {self.reason}" if self.reason else "leave the guidance out"
            raise ContractError(f"guidance is {scale:g}, but {why}", hint=hint)
        if negative is not None and not self.takes_negative:
            raise ContractError(
                "a negative prompt is given, but this generator takes none", hint="leave the negative prompt out"
            )
        return self.scale if scale is None else scale

    def replaced(self, negative: str | None) -> Mapping[str, str]:
        """Returns the origins whose values are given in the unconditional branch, for a user's negative prompt."""
        return self.unconditional if negative is None or (negative == "" and self.empty_is_none) else {}


@dataclass(frozen=True)
class Contract:
    """All that a device must know to sample, besides the schedule's numbers.

    The first latent is ``init_scale * initial + init_anchor * anchor`` with the schedule's numbers, where ``initial``
    names noise or an output of the component ``initial``, and ``anchor`` a tensor of the latent's shape that stays the
    same through the loop: the latent of the picture that image-to-image starts from, for instance. The decoder gets
    ``x / latent_scale + latent_shift``.

    ``form`` says what the networks of the loop are told of a step: its numbers (``step``), or which row of the table
    ``rows`` holds them (``table``): each row is the numbers by origin, ``timestep`` and ``time:...``. With a graph for
    each row (``specialized``, variants ``row-0`` and on), the row chooses the graph, which does not take its number.

    ``batch`` is the number of samples that one call of every component draws, one row of its tensors for each.
    """

    latent_shape: tuple[int, ...]
    latent_scale: float
    latent_shift: float
    prediction_type: str
    guidance: Guidance
    initial: str = f"{NOISE}0"
    anchor: str | None = None
    inputs: tuple[InputSpec, ...] = (InputSpec("prompt", TEXT),)
    output: OutputSpec = OutputSpec()
    noise: str = "philox4x32-10, Box-Muller, element i = subsequence i; offset 0: initial noise, 1 + k: noise of step k"
    form: str = "step"
    rows: tuple[Mapping[str, float], ...] = ()
    batch: int = 1

    def row(self, schedule: Schedule, k: int) -> int:
        """Returns the row of the table that holds the numbers of a schedule's step.

        Raises:
            ContractError: no row does.
        """
        numbers = step_numbers(schedule, k)
        try:
            return self.rows.index(numbers)
        except ValueError:
            told = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
            raise ContractError(
                f"step {k} of {schedule.steps} has {told}, which is none of the {len(self.rows)} steps that the "
                "bundle's networks are compiled for",
                hint="build it with these step counts (--steps), or with --form step for any",
            ) from None

    @property
    def takes_text(self) -> bool:
        """Whether the user gives a prompt."""
        return any(spec.kind == TEXT for spec in self.inputs)


def step_numbers(schedule: Schedule, k: int) -> dict[str, float]:
    """Returns the numbers that networks take at a step, by origin."""
    return {TIMESTEP: schedule.timesteps[k], **{f"{TIME}{name}": column[k] for name, column in schedule.times.items()}}


def needed_before(components: Mapping[str, ComponentSpec], given: Collection[str]) -> list[str]:
    """Returns the components before the loop whose outputs it wants, where the values of some origins are given."""
    wanted = {origin for spec in components.values() if spec.phase == LOOP for origin in spec.bindings.values()}
    needed: list[str] = []
    for name, spec in reversed(list(components.items())):
        made = {f"{name}.{output.name}" for output in spec.outputs}
        if spec.phase == BEFORE and made & (wanted - set(given)):
            needed.insert(0, name)
            wanted |= set(spec.bindings.values())
    return needed

"""The manifest of a bundle as values: what each component takes and gives, and how a picture is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from typing import Any

import jsonschema

from fewstep.errors import BundleError, ContractError
from fewstep.schedule import Schedule
from fewstep.source import SourceInfo
from fewstep.tiles import Tiles
from fewstep.variants import batch_of, nearest, variant

SCHEMA_VERSION = 1
# Folder of a bundle with the plan of its quantization, if it has one.
PLAN_FOLDER, PLAN = "quantization", "plan.json"
# What `Artifact.compute` says of a component that multiplies whole numbers.
INTEGERS = "int8"
DENOISER = "denoiser"
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
SAMPLE = "sample"  # the last latent, as the contract scales it for the decoder

# When a component runs.
BEFORE, LOOP, AFTER = "before", "loop", "after"

# Kinds of inputs.
TEXT, CLASS, IMAGE = "text", "class", "image"

# Offsets of draws beside the initial noise and the one that a step's sampler adds; the steps of any sampler stay below.
EARLY_DRAWS, DRAWS_OF_A_STEP = 1 << 31, 1 << 16


def draw_offset(k: int, number: int) -> int:
    """Returns the offset of a further draw before network call k, numbered from 1."""
    return EARLY_DRAWS + DRAWS_OF_A_STEP * k + number - 1


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
    ``after`` it.
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
    """How the guidance scale w reaches the network.

    ``none``: not at all. ``embedded``: an input of the network, [sin(a_0) ... sin(a_n) cos(a_0) ... cos(a_n)] with
    a_i = ``factor`` (w - 1) ``frequencies[i]`` in float32. ``two_pass``: F = F_u + w (F_c - F_u), with the prompt
    ``negative`` for F_u. The frequencies are numbers and not a formula because the angles reach thousands, where the
    last bit of an ``exp`` moves a sine by 1e-4.
    """

    kind: str
    scale: float
    frequencies: tuple[float, ...] = ()
    factor: float = 1000.0
    negative: str = ""


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


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer folder (``tokenizer.json`` beside the transformers files), padded to ``length`` with ``pad_id``.

    The text is stripped of outer blanks and put in lower case where ``clean`` says so, then put between ``prefix`` and
    ``suffix``.
    """

    folder: str
    length: int
    pad_id: int
    padding_side: str = "right"
    prefix: str = ""
    suffix: str = ""
    clean: bool = False
    input: str = "prompt"


@dataclass(frozen=True)
class Artifact:
    """What one runtime runs for one component.

    A component with several graphs has an artifact for each, told apart by ``variant``: empty for the first or only
    one, a shape (``512x768``), a size of tiles (``tile-32x16``), or a row of the table of steps (``row-2``). The
    weights are those of the first.
    """

    runtime: str
    component: str
    path: str
    weights: str
    compute: str
    bytes: int
    variant: str = ""


@dataclass(frozen=True)
class FileEntry:
    """Content hash and size of one file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Shaped:
    """What differs at another shape: sizes, and tables where the sampler depends on them."""

    contract: Contract
    components: Mapping[str, ComponentSpec]
    schedules: Mapping[int, Schedule]


@dataclass(frozen=True)
class Manifest:
    """The whole of ``manifest.json``.

    ``shape`` is the size of the pictures (``512x768``, height first) where the build chose it, None where it is the
    generator's own; ``shapes`` are the others that the bundle can draw, and batches: see `fewstep.variants`.
    """

    name: str
    source: SourceInfo
    pipeline: str
    contract: Contract
    components: Mapping[str, ComponentSpec]
    tokenizers: Mapping[str, TokenizerSpec]
    schedules: Mapping[int, Schedule]
    default_steps: int
    artifacts: tuple[Artifact, ...]
    recipe: Mapping[str, Any]
    prompts: tuple[str, ...]
    licences: Mapping[str, str]
    versions: Mapping[str, str]
    parity: Mapping[str, Any] | None = None
    caveats: tuple[str, ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    shape: str | None = None
    shapes: Mapping[str, Shaped] = field(default_factory=dict)

    def shaped(self, shape: str) -> Manifest:
        """Returns the manifest as it is for one of the bundle's shapes.

        Raises:
            ContractError: the bundle was not built for this shape.
        """
        if shape == self.shape:
            return self
        if shape not in self.shapes:
            found = [name for name in (self.shape, *self.shapes) if name and batch_of(name) == 1]
            have = ", ".join(found) or "the generator's own alone"
            raise ContractError(
                f"bundle has no shape {shape}, it has {have}",
                hint=f"build it with --shape {','.join([*found, shape])}",
            )
        return self._at(shape)

    def batched(self, batch: int) -> Manifest:
        """Returns the manifest as it is for so many pictures at once, of the shape that this one is of.

        Raises:
            ContractError: the bundle was not built for this batch.
        """
        if batch == self.contract.batch:
            return self
        name = variant(self.shape, batch)
        if name not in self.shapes:
            sizes = sorted({1, *map(batch_of, self.shapes)})
            raise ContractError(
                f"bundle does not draw {batch} pictures at once, it draws {' or '.join(map(str, sizes))}",
                hint=f"build it with --batch {batch}, or draw one after the other",
            )
        return self._at(name)

    def _at(self, name: str) -> Manifest:
        other = self.shapes[name]
        return replace(
            self, shape=name, contract=other.contract, components=other.components, schedules=other.schedules
        )

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The runtimes that this bundle has artifacts for, in order."""
        return tuple(dict.fromkeys(artifact.runtime for artifact in self.artifacts))

    def artifact(self, runtime: str, component: str, graph: str | None = None) -> Artifact:
        """Returns the artifact of a component for a runtime: of a variant, by default of the manifest's shape."""
        found = {a.variant: a for a in self.artifacts if (a.runtime, a.component) == (runtime, component)}
        # Of tiles and rows, the first stands for all.
        name = nearest(self.shape or "", found) if graph is None else graph
        if name in found:
            return found[name]
        have = ", ".join(self.runtimes) or "none"
        raise BundleError(
            f"bundle has no {component} for runtime {runtime!r}, it has runtimes: {have}",
            hint=f"build it with `fewstep build SOURCE --target {runtime}`",
        )

    def schedule(self, steps: int) -> Schedule:
        """Returns the table for a number of steps."""
        try:
            return self.schedules[steps]
        except KeyError:
            have = ", ".join(str(n) for n in sorted(self.schedules))
            others = "" if self.contract.form == "step" else ", or build it with --form step for others"
            raise ContractError(
                f"bundle has no schedule for {steps} steps, it has {have}", hint=f"choose one of {have}{others}"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as JSON-ready values."""
        values = asdict(self)
        values["schema_version"] = SCHEMA_VERSION
        values["schedules"] = _tables(self.schedules)
        for shape, other in self.shapes.items():
            values["shapes"][shape]["schedules"] = _tables(other.schedules)
        return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(values))}

    @classmethod
    def from_json(cls, values: Any, *, where: str) -> Manifest:
        """Returns the manifest that ``to_json`` wrote.

        Raises:
            BundleError: another schema version, or a value that the JSON schema refuses.
        """
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{where} has schema version {version!r}, expected {SCHEMA_VERSION}",
                hint="build the bundle again with this fewstep, or open it with the one that built it",
            )
        _validate(values, where)
        return cls(
            name=values["name"],
            source=SourceInfo.from_json(values["source"]),
            pipeline=values["pipeline"],
            contract=_contract(values["contract"]),
            components=_components(values["components"]),
            tokenizers={name: TokenizerSpec(**value) for name, value in values["tokenizers"].items()},
            schedules=_schedules(values["schedules"]),
            default_steps=values["default_steps"],
            artifacts=tuple(Artifact(**value) for value in values["artifacts"]),
            recipe=values["recipe"],
            prompts=tuple(values["prompts"]),
            licences=values["licences"],
            versions=values["versions"],
            parity=values["parity"],
            caveats=tuple(values["caveats"]),
            files={path: FileEntry(**value) for path, value in values["files"].items()},
            shape=values.get("shape"),
            shapes={shape: _shaped(value) for shape, value in values.get("shapes", {}).items()},
        )


def step_numbers(schedule: Schedule, k: int) -> dict[str, float]:
    """Returns the numbers that networks take at a step, by origin."""
    return {TIMESTEP: schedule.timesteps[k], **{f"{TIME}{name}": column[k] for name, column in schedule.times.items()}}


def load_schema() -> dict[str, Any]:
    """Returns the JSON schema of ``manifest.json``."""
    text = resources.files("fewstep").joinpath("manifest.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _validate(values: Any, where: str) -> None:
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(load_schema()).iter_errors(values))
    if error is not None:
        path = "/".join(str(part) for part in error.absolute_path) or "(top)"
        raise BundleError(f"{where}: {path}: {error.message}", hint="build the bundle again; manifests are not edited")


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(v["name"], v["dtype"], tuple(v["shape"])) for v in values)


def _components(values: Any) -> dict[str, ComponentSpec]:
    return {name: _component(value) for name, value in values.items()}


def _component(values: Any) -> ComponentSpec:
    tiles = values.get("tiles")
    return ComponentSpec(
        _specs(values["inputs"]),
        _specs(values["outputs"]),
        values["bindings"],
        values["phase"],
        None if tiles is None else Tiles(**tiles),
    )


def _schedules(values: Any) -> dict[int, Schedule]:
    return {int(n): Schedule.from_json(value) for n, value in values.items()}


def _tables(schedules: Mapping[int, Schedule]) -> dict[str, Any]:
    return {str(n): schedule.to_json() for n, schedule in sorted(schedules.items())}


def _shaped(values: Any) -> Shaped:
    return Shaped(_contract(values["contract"]), _components(values["components"]), _schedules(values["schedules"]))


def _contract(values: Any) -> Contract:
    return Contract(
        latent_shape=tuple(values["latent_shape"]),
        latent_scale=values["latent_scale"],
        latent_shift=values["latent_shift"],
        prediction_type=values["prediction_type"],
        guidance=Guidance(**{**values["guidance"], "frequencies": tuple(values["guidance"]["frequencies"])}),
        initial=values["initial"],
        anchor=values["anchor"],
        inputs=tuple(InputSpec(v["name"], v["kind"], tuple(v["shape"]), v["count"]) for v in values["inputs"]),
        output=_output(values["output"]),
        noise=values["noise"],
        form=values.get("form", "step"),
        rows=tuple(values.get("rows", ())),
        batch=values.get("batch", 1),
    )


def _output(values: Any) -> OutputSpec:
    clip = values["clip"]
    return OutputSpec(**{**values, "clip": None if clip is None else (clip[0], clip[1])})

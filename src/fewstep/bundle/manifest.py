"""The manifest of a bundle as values: its contract, its files, and what was made of them for every runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from itertools import islice
from typing import Any

import jsonschema

from fewstep.bundle.consistency import HINT, check_consistent
from fewstep.bundle.contract import ComponentSpec, Contract, Guidance, InputSpec, OutputSpec, TensorSpec
from fewstep.bundle.schedule import Schedule
from fewstep.bundle.source import SourceInfo
from fewstep.bundle.tiles import Tiles
from fewstep.bundle.variants import batch_of, nearest, variant
from fewstep.errors import BundleError, ContractError, FewstepError
from fewstep.strict import validator

SCHEMA_VERSION = 1
# Folder of a bundle with the plan of its quantization, if it has one.
PLAN_FOLDER, PLAN = "quantization", "plan.json"
# What `Artifact.compute` says of a component that multiplies whole numbers.
INTEGERS = "int8"
# Of so many errors, the one is told that tells most.
_ERRORS = 50


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer folder (``tokenizer.json`` beside the transformers files), padded to ``length`` with ``pad_id``.

    A text first goes through ``operations`` in order (`fewstep.text.operations`). Then each token of ``expansions``
    that the tokenizer finds in it is replaced, wherever its letters stand: an embedding of several vectors (textual
    inversion) has a token for each. Last it is put between ``prefix`` and ``suffix``.
    """

    folder: str
    length: int
    pad_id: int
    padding_side: str = "right"
    prefix: str = ""
    suffix: str = ""
    operations: tuple[str, ...] = ()
    expansions: Mapping[str, str] = field(default_factory=dict)
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
    function: str = ""
    """Which function of the file it is, where graphs share one (Core ML, iOS 18)."""


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
    generator's own; ``shapes`` are the others that the bundle can draw, and batches: see `fewstep.bundle.variants`.
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
        """Returns the table for a number of steps.

        Raises:
            ContractError: the bundle has none for it.
        """
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise ContractError(f"steps is {steps!r}, expected an integer", hint="for example steps=4")
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
        for artifact in values["artifacts"]:
            if not artifact["function"]:
                del artifact["function"]  # what was built before there were functions can read the rest
        return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(values))}

    @classmethod
    def from_json(cls, values: Any, *, where: str) -> Manifest:
        """Returns the manifest that ``to_json`` wrote.

        Raises:
            BundleError: another schema version, a value that the JSON schema refuses, or parts that do not fit.
        """
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{where} has schema version {version!r}, expected {SCHEMA_VERSION}",
                hint="build the bundle again with this fewstep, or open it with the one that built it",
            )
        _validate(values, where)
        try:
            manifest = cls._of(values)
        except FewstepError as error:
            raise BundleError(f"{where}: {error.message}", hint=error.hint or HINT) from error
        check_consistent(manifest, where)
        return manifest

    @classmethod
    def _of(cls, values: Any) -> Manifest:
        """Returns the manifest of values that the schema lets through."""
        return cls(
            name=values["name"],
            source=SourceInfo.from_json(values["source"]),
            pipeline=values["pipeline"],
            contract=_contract(values["contract"]),
            components=_components(values["components"]),
            tokenizers={name: _tokenizer(value) for name, value in values["tokenizers"].items()},
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


def load_schema() -> dict[str, Any]:
    """Returns the JSON schema of ``manifest.json``."""
    text = resources.files("fewstep").joinpath("manifest.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _validate(values: Any, where: str) -> None:
    errors = islice(validator(load_schema()).iter_errors(values), _ERRORS)
    error = jsonschema.exceptions.best_match(errors)
    if error is not None:
        path = "/".join(str(part) for part in error.absolute_path) or "(top)"
        raise BundleError(f"{where}: {path[:500]}: {error.message[:1000]}", hint=HINT)


def _tokenizer(values: Any) -> TokenizerSpec:
    return TokenizerSpec(**{**values, "operations": tuple(values["operations"])})


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

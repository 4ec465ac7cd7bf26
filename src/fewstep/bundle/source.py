"""What a build starts from: a source, and what is laid over it before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.errors import SourceError
from fewstep.recipe import call_options

# What `SourceInfo.kind` says of a generator that a function of the user's made, and of one assembled in a process.
FUNCTION, PYTHON = "function", "python"


@dataclass(frozen=True)
class Lora:
    """A LoRA file and the scale that its weights are merged with."""

    path: str
    scale: float = 1.0

    @classmethod
    def of(cls, lora: str | Lora) -> Lora:
        """Returns the LoRA itself, or that of ``FILE`` or ``FILE=SCALE``; a file's own name may hold an equals sign.

        Raises:
            SourceError: the scale is not a finite number.
        """
        if isinstance(lora, Lora):
            return lora
        path, equals, scale = lora.rpartition("=")
        if not equals or Path(lora).is_file():
            return cls(lora)
        try:
            value = float(scale)
        except ValueError:
            value = float("nan")
        if not abs(value) < float("inf"):
            raise SourceError(
                f"LoRA {lora!r}: the scale {scale!r} is not a number, expected FILE or FILE=SCALE",
                hint=f"write {path}=0.8, or {path} alone for a scale of 1",
            )
        return cls(path, value)


@dataclass(frozen=True)
class Replacement:
    """The weights of one pipeline component, taken from a safetensors file."""

    component: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Replacement:
        """Returns the replacement of ``NAME=FILE``.

        Raises:
            SourceError: no name or no file is given.
        """
        component, _, path = text.partition("=")
        if not component or not path:
            raise SourceError(
                f"component {text!r} is not NAME=FILE", hint="for example unet=sdxl_lightning_4step_unet.safetensors"
            )
        return cls(component, path)


@dataclass(frozen=True)
class SourceSpec:
    """A source and its adapters.

    Attributes:
        uri: a diffusers folder, a single-file checkpoint, a hub id, ``module:function`` or a built-in generator; empty
            for adapters alone, which `otherwise` joins with a source.
        loras: LoRA files, merged into the weights in this order.
        decoder: folder of another decoder, such as a tiny autoencoder for the same latents.
        replacements: components whose weights come from files of their own.
        config: diffusers folder with the configurations of a single-file checkpoint.
        variant: which files of a folder that has several of each (``fp16``, ``bf16``); None prefers those without a
            variant in their names.
        options: further arguments of every call of the pipeline, such as ``strength``.
        inputs: arguments that the pipeline can do without and that the bundle shall take (``image``).
        keep_safety_checker: compile the pipeline's safety checker, too.
        kind: of a source that a bundle's manifest names, and nobody else: it is read as data of this kind or refused,
            and never imported or downloaded. None for a source that the user names.
    """

    uri: str
    loras: tuple[Lora, ...] = ()
    decoder: str | None = None
    replacements: tuple[Replacement, ...] = ()
    config: str | None = None
    variant: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    keep_safety_checker: bool = False
    kind: str | None = None

    def __post_init__(self) -> None:
        names = [r.component for r in self.replacements]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise SourceError(f"component {twice!r} is given twice, expected one file for it", hint="give one of them")

    @classmethod
    def of(cls, source: str | SourceSpec) -> SourceSpec:
        """Returns the source itself, or that of a URI with nothing laid over it."""
        return source if isinstance(source, SourceSpec) else cls(source)

    def otherwise(self, other: SourceSpec) -> SourceSpec:
        """Returns this source with what ``other`` has wherever this one leaves it out."""
        return SourceSpec(
            self.uri or other.uri,
            self.loras or other.loras,
            self.decoder or other.decoder,
            self.replacements or other.replacements,
            self.config or other.config,
            self.variant or other.variant,
            {**other.options, **self.options},
            self.inputs or other.inputs,
            self.keep_safety_checker or other.keep_safety_checker,
            kind=self.kind if self.uri else other.kind,
        )

    def __str__(self) -> str:
        """The source and its adapters as a progress bar names them."""
        over = [*(Path(lora.path).name for lora in self.loras), *(r.component for r in self.replacements)]
        over += [f"decoder {Path(self.decoder).name}"] if self.decoder else []
        return " + ".join([self.uri, *over])


@dataclass(frozen=True)
class SourcePart:
    """A file or folder that a source took beside itself, by content."""

    path: str
    sha256: str


@dataclass(frozen=True)
class MergedLora:
    """A LoRA file by content, and the scale that it was merged with."""

    path: str
    scale: float
    sha256: str


@dataclass(frozen=True)
class SourceInfo:
    """Where a generator came from; ``uri`` is what ``fewstep build`` was given.

    ``sha256`` covers everything: the source's files, its decoder and components where others took their place, and the
    LoRAs with their scales. ``revision`` is the commit that a hub id stood for. ``kind`` is ``diffusers`` (a folder),
    ``single-file``, ``hub``, ``built-in``, ``function`` (``module:function``) or ``python`` (assembled in a process).
    ``variant``, ``inputs`` and ``keep_safety_checker`` are those of `SourceSpec`; ``options`` those of
    `fewstep.recipe.call_options`. ``left_out`` names components of the pipeline that are not compiled, ``unused``
    tensors of its files that no network has a place for, by component.
    """

    uri: str
    kind: str
    sha256: str
    revision: str | None = None
    config: str | None = None
    decoder: SourcePart | None = None
    components: Mapping[str, SourcePart] = field(default_factory=dict)
    loras: tuple[MergedLora, ...] = ()
    variant: str | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    keep_safety_checker: bool = False
    left_out: tuple[str, ...] = ()
    unused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def spec(self) -> SourceSpec:
        """Returns what to load to have the same generator again: of a hub id, the very commit.

        It carries the recorded ``kind``: what a manifest names is no wish of the user's.
        """
        return SourceSpec(
            self.uri if self.revision is None else f"{self.uri.partition('@')[0]}@{self.revision}",
            loras=tuple(Lora(lora.path, lora.scale) for lora in self.loras),
            decoder=None if self.decoder is None else self.decoder.path,
            replacements=tuple(Replacement(name, part.path) for name, part in self.components.items()),
            config=self.config,
            variant=self.variant,
            options=call_options.from_json(self.options),
            inputs=self.inputs,
            keep_safety_checker=self.keep_safety_checker,
            kind=self.kind,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SourceInfo:
        """Returns what `dataclasses.asdict` made JSON-ready values of."""
        decoder = values.get("decoder")
        return cls(
            **{
                **values,
                "decoder": None if decoder is None else SourcePart(**decoder),
                "components": {name: SourcePart(**part) for name, part in values.get("components", {}).items()},
                "loras": tuple(MergedLora(**lora) for lora in values.get("loras", ())),
                "inputs": tuple(values.get("inputs", ())),
                "left_out": tuple(values.get("left_out", ())),
                "unused": {name: tuple(keys) for name, keys in values.get("unused", {}).items()},
            }
        )


# What a user loses with a component that is not compiled, and how to have it.
_LEFT_OUT = {
    "safety_checker": "the pipeline's safety checker is left out: the bundle shows images that the pipeline "
    "would black out",
    "image_encoder": "the pipeline's image encoder is left out: the bundle takes no image through it (IP-Adapter)",
}


def source_notes(source: SourceInfo) -> list[str]:
    """Returns what of a source is in no bundle: components that are left out, and tensors that no network takes."""
    notes = [_LEFT_OUT.get(name, f"the pipeline's {name} is left out") for name in source.left_out]
    for name, keys in source.unused.items():
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        notes.append(f"the files of {name} hold {keys[0]}{more}, for which the network has no place: not used")
    return notes

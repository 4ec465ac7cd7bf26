"""What a build starts from: a source, and what is laid over it before anything is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import SourceError


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
    """

    uri: str
    loras: tuple[Lora, ...] = ()
    decoder: str | None = None
    replacements: tuple[Replacement, ...] = ()
    config: str | None = None

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
        )

    def __str__(self) -> str:
        """The source and its adapters as a progress bar names them."""
        over = [*(Path(lora.path).name for lora in self.loras), *(r.component for r in self.replacements)]
        over += [f"decoder {Path(self.decoder).name}"] if self.decoder else []
        return " + ".join([self.uri, *over])

"""What is asked of the untouched pipeline, and what it answers: JSON and safetensors, never pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[Any]

REQUEST, GIVEN, ANSWER, ARRAYS = "request.json", "given.safetensors", "answer.json", "answer.safetensors"


@dataclass(frozen=True)
class UserCall:
    """One call of the pipeline.

    ``guidance`` and ``negative`` None leave the argument out: the pipeline takes its own default.
    """

    name: str
    prompt: str
    steps: int
    seed: int
    guidance: float | None = None
    negative: str | None = None


@dataclass(frozen=True)
class Source:
    """What a user loads: a diffusers folder, or a function ``module:function`` that returns a generator.

    What is laid over it is loaded as diffusers' users do; what they cannot do is left to fewstep's own loader, which is
    given ``uri`` and ``config``. ``path`` is where Python looks for the module, ``cwd`` where relative paths start.
    """

    kind: str
    uri: str
    folder: str = ""
    config: str | None = None
    variant: str | None = None
    decoder: str | None = None
    components: Mapping[str, str] = field(default_factory=dict)
    loras: tuple[tuple[str, float], ...] = ()
    tile: int | None = None
    keep: tuple[str, ...] = ()
    """Components of `loading.FILTERS` that the bundle has too."""
    path: tuple[str, ...] = ()
    cwd: str = "."
    seed: int | None = None
    """Of the process's own random numbers when a function is called, on which nothing should depend; None: as it is."""


@dataclass(frozen=True)
class Request:
    """Calls and texts for one pipeline.

    ``kind`` is what comes out (picture, video, audio or depth). ``inputs`` are the kinds of what the user gives, by the
    name of the argument; ``given`` holds those that are no text: images float32 [1, C, H, W] in [0, 1], classes int64
    [1]. ``guidance`` is the bundle's own scale, given where it is not the pipeline's default; None leaves it out.
    """

    source: Source
    kind: str
    inputs: Mapping[str, str]
    options: Mapping[str, Any]
    guidance: float | None
    calls: tuple[UserCall, ...]
    texts: tuple[str, ...]
    given: Mapping[str, Array] = field(default_factory=dict)

    @property
    def text_input(self) -> str | None:
        """The name of the argument that takes the prompt, None of a generator without one."""
        return next((name for name, kind in self.inputs.items() if kind == "text"), None)

    def save(self, folder: Path) -> None:
        """Writes the request to a folder."""
        values = asdict(self)
        del values["given"]
        (folder / REQUEST).write_text(json.dumps(values), encoding="utf-8")
        save_file({name: np.ascontiguousarray(array) for name, array in self.given.items()}, folder / GIVEN)

    @classmethod
    def load(cls, folder: Path) -> Request:
        """Returns the request of a folder."""
        values = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        source = values["source"]
        loras = tuple((path, scale) for path, scale in source["loras"])
        source = Source(**{**source, "loras": loras, "keep": tuple(source["keep"]), "path": tuple(source["path"])})
        calls = tuple(UserCall(**call) for call in values["calls"])
        whole = {**values, "source": source, "calls": calls, "texts": tuple(values["texts"])}
        return cls(**whole, given=load_file(folder / GIVEN))


@dataclass(frozen=True)
class Read:
    """What one tokenizer gave a network for one text: ids int64 [L], and the mask, if the tokenizer gave one."""

    tokenizer: str
    ids: Array
    mask: Array | None


@dataclass(frozen=True)
class Answer:
    """What the pipeline did.

    ``outputs`` has an array, or what the pipeline said instead, for each call; ``reads`` what the tokenizers gave for
    each of ``texts``, in the order of the pipeline's calls: those of the request, and texts with tokens that were added
    to the tokenizers. ``through`` says why the pipeline was not loaded as its user does,
    if it was not. ``modules`` are the modules of fewstep that the process had imported.
    """

    outputs: tuple[Array | str, ...]
    texts: tuple[str, ...]
    reads: tuple[tuple[Read, ...], ...]
    through: str = ""
    modules: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        """Writes the answer to a folder; the JSON comes last, so that where it is, all is there."""
        arrays: dict[str, Array] = {}
        errors = [output if isinstance(output, str) else None for output in self.outputs]
        arrays |= {f"outputs/{i}": array for i, array in enumerate(self.outputs) if not isinstance(array, str)}
        names = []
        for i, reads in enumerate(self.reads):
            names.append([read.tokenizer for read in reads])
            for j, read in enumerate(reads):
                arrays[f"reads/{i}/{j}/ids"] = read.ids
                if read.mask is not None:
                    arrays[f"reads/{i}/{j}/mask"] = read.mask
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / ARRAYS)
        values = {
            "errors": errors,
            "texts": self.texts,
            "reads": names,
            "through": self.through,
            "modules": self.modules,
        }
        written = folder / f"{ANSWER}.new"
        written.write_text(json.dumps(values), encoding="utf-8")
        written.replace(folder / ANSWER)

    @classmethod
    def load(cls, folder: Path) -> Answer:
        """Returns the answer of a folder."""
        values = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
        arrays = load_file(folder / ARRAYS)
        outputs = tuple(arrays[f"outputs/{i}"] if error is None else error for i, error in enumerate(values["errors"]))
        reads = tuple(
            tuple(
                Read(name, arrays[f"reads/{i}/{j}/ids"], arrays.get(f"reads/{i}/{j}/mask"))
                for j, name in enumerate(names)
            )
            for i, names in enumerate(values["reads"])
        )
        return cls(outputs, tuple(values["texts"]), reads, values["through"], tuple(values["modules"]))

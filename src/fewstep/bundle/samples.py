"""Samples with every network call that made them, as arrays, storable as safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fewstep.errors import BundleError
from fewstep.numerics.outputs import picture_of
from fewstep.strict import parse_json, validator

Array = npt.NDArray[Any]

# Seeds from here on are of samples beside the others, which show other guidance than the bundle's default: seeds tell
# them apart.
BESIDE = 1000

_REBUILD = "build the bundle again"
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
_CALL = {
    "type": "object",
    "properties": {
        "component": {"type": "string"},
        "step": {"type": ["integer", "null"], "minimum": 0},
        "timestep": {"type": ["number", "null"]},
        "branch": {"enum": ["cond", "uncond"]},
    },
    "required": ["component", "step", "timestep", "branch"],
}
_HEAD = validator(
    {
        "type": "object",
        "properties": {
            "prompt": {"type": "string"},
            "seed": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
            "steps": {"type": "integer", "minimum": 1},
            "guidance": {"type": "number"},
            "kind": {"type": "string"},
            "calls": {"type": "array", "items": _CALL},
        },
        "required": ["prompt", "seed", "steps", "guidance", "kind", "calls"],
    }
)


@dataclass(frozen=True)
class StepFeed:
    """One network call: what went in and what came out.

    ``step`` is the index of the sampling step, None for components that run once; ``timestep`` is the time value that
    the network saw; ``branch`` is ``cond`` or, in two-pass guidance, ``uncond``.
    """

    component: str
    step: int | None
    timestep: float | None
    branch: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Sample:
    """One sample: its network calls in order, the latent after each step, and the result.

    ``latents`` are float32 [1, ...]. ``output`` is float32, a picture as [H, W, C] in [0, 1], as the generator's own
    pipeline returns it before rounding to 8 bits; other kinds as their networks have them. ``inputs`` are what was
    given beside the prompt, except the text ``negative``.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float
    feeds: tuple[StepFeed, ...]
    latents: tuple[Array, ...]
    output: Array
    kind: str = "picture"
    inputs: Mapping[str, Array] = field(default_factory=dict)
    negative: str | None = None
    """The negative prompt, where one was given."""

    @property
    def label(self) -> str:
        """What a report calls this sample."""
        without = "" if self.negative is None else f", without {self.negative}"
        return f"{self.prompt} #{self.seed}{without}"

    @property
    def picture_HWC(self) -> Array:
        """The result, or something to look at where it is no picture: float32 [H, W, C] in [0, 1]."""
        return picture_of(self.output, self.kind)


def save_sample(sample: Sample, path: Path, *, with_feeds: bool = True) -> None:
    """Writes a sample; without feeds it keeps the latents and the picture alone."""
    arrays: dict[str, Array] = {"output": sample.output}
    arrays.update({f"latents/{k}": x for k, x in enumerate(sample.latents)})
    arrays.update({f"inputs/{name}": a for name, a in sample.inputs.items()})
    calls = []
    for i, feed in enumerate(sample.feeds if with_feeds else ()):
        arrays.update({f"feeds/{i}/in/{name}": a for name, a in feed.inputs.items()})
        arrays.update({f"feeds/{i}/out/{name}": a for name, a in feed.outputs.items()})
        calls.append({"component": feed.component, "step": feed.step, "timestep": feed.timestep, "branch": feed.branch})
    head = {
        "prompt": sample.prompt,
        "seed": sample.seed,
        "steps": sample.steps,
        "guidance": sample.guidance,
        "kind": sample.kind,
        "calls": calls,
    }
    if sample.negative is not None:
        head["negative"] = sample.negative
    save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, path, metadata={"fewstep": json.dumps(head)})


def load_sample(path: Path) -> Sample:
    """Returns what `save_sample` wrote."""
    with _reading(path) as (head, names, stream):
        arrays = {name: stream.get_tensor(name) for name in names}
        feeds = tuple(
            StepFeed(**call, inputs=_under(arrays, f"feeds/{i}/in/"), outputs=_under(arrays, f"feeds/{i}/out/"))
            for i, call in enumerate(head.pop("calls"))
        )
        latents = tuple(arrays[f"latents/{k}"] for k in range(head["steps"]) if f"latents/{k}" in arrays)
        return Sample(**head, feeds=feeds, latents=latents, output=arrays["output"], inputs=_under(arrays, "inputs/"))


@dataclass(frozen=True)
class Header:
    """What the file of a sample says of itself: what it is of, and dtype and shape of every tensor."""

    head: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


def read_header(path: Path) -> Header:
    """Returns what a file says of its sample, without any values.

    Raises:
        BundleError: it is no sample, or has tensors of types that no network of ours has.
    """
    with _reading(path) as (head, names, stream):
        slices = {name: stream.get_slice(name) for name in names}
        tensors = {name: (_DTYPES[s.get_dtype()], tuple(s.get_shape())) for name, s in slices.items()}
        return Header(head, tensors)


def read_head(path: Path) -> dict[str, Any]:
    """Returns what a sample is of and which calls it has, without their arrays."""
    with _reading(path) as (head, _, _):
        return head


def read_feeds(path: Path, component: str) -> list[StepFeed]:
    """Returns the calls of one component in a sample, reading no others."""
    feeds = []
    with _reading(path) as (head, names, stream):
        for i, call in enumerate(head["calls"]):
            if call["component"] == component:
                own = {name: stream.get_tensor(name) for name in names if name.startswith(f"feeds/{i}/")}
                feeds.append(
                    StepFeed(**call, inputs=_under(own, f"feeds/{i}/in/"), outputs=_under(own, f"feeds/{i}/out/"))
                )
    return feeds


@contextmanager
def _reading(path: Path) -> Iterator[tuple[dict[str, Any], list[str], Any]]:
    """Yields the head of a sample's file, the names of its arrays, and what reads them."""
    try:
        with safe_open(path, framework="numpy") as stream:
            text = (stream.metadata() or {})["fewstep"]
            head = parse_json(text, f"the head of {path}", error=BundleError, hint=_REBUILD)
            _check_head(head, path)
            yield head, list(stream.keys()), stream
    except FileNotFoundError as error:  # safetensors' own has the name in its text alone
        raise BundleError(f"{path} is not there", hint="was it removed meanwhile?") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is not a sample: {error}", hint=_REBUILD) from error


def _check_head(head: Any, path: Path) -> None:
    """Raises BundleError unless a sample's head has values of the right types."""
    wrong = jsonschema.exceptions.best_match(_HEAD.iter_errors(head))
    if wrong is not None:
        place = "/".join(str(part) for part in wrong.absolute_path) or "its head"
        raise BundleError(f"{path} is not a sample: {place}: {wrong.message[:200]}", hint=_REBUILD)


def save_samples(samples: Iterable[Sample], folder: Path, *, with_feeds: int) -> list[Path]:
    """Writes one shard for each sample, the first ``with_feeds`` of them with every network call."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, sample in enumerate(samples):
        paths.append(folder / f"{i:03d}.safetensors")
        save_sample(sample, paths[-1], with_feeds=i < with_feeds)
    return paths


def load_samples(folder: Path) -> list[Sample]:
    """Returns the samples of a folder, in order."""
    return [load_sample(path) for path in sorted(folder.glob("*.safetensors"))]


def _under(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

"""Files in, files out: pictures and classes that a generator is given, and whatever it makes."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from fewstep import disk
from fewstep.bundle.contract import CLASS, InputSpec, OutputSpec
from fewstep.bundle.samples import Sample
from fewstep.errors import ContractError
from fewstep.numerics.inputs import check_inputs, check_names
from fewstep.numerics.outputs import frames_of
from fewstep.report import images

Array = npt.NDArray[Any]

_MODES = {1: "L", 3: "RGB"}
_FRAME_MS = 125


def read_inputs(specs: Sequence[InputSpec], given: Sequence[str]) -> dict[str, Array]:
    """Returns the inputs that texts ``NAME=VALUE`` give: the file of a picture, the number of a class.

    Raises:
        ContractError: one is missing, unknown or given twice, or its value is none.
    """
    values: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator:
            raise ContractError(f"input {text!r} has no value", hint="write NAME=FILE for a picture, NAME=NUMBER else")
        if name in values:
            raise ContractError(f"input {name} is given twice", hint="give each input once")
        values[name] = value
    wanted = check_names(specs, values)
    return check_inputs(specs, {name: _read(wanted[name], value) for name, value in values.items()})


def _read(spec: InputSpec, value: str) -> Array:
    if spec.kind != CLASS:
        return read_picture(Path(value), spec)
    try:
        return np.array([int(value)])
    except ValueError:
        raise ContractError(f"{spec.name} is {value!r}, expected the number of a class", hint=_numbers(spec)) from None


def _numbers(spec: InputSpec) -> str:
    return f"for instance --input {spec.name}=0" + (f"; the largest is {spec.count - 1}" if spec.count else "")


def read_picture(path: Path, spec: InputSpec) -> npt.NDArray[np.float32]:
    """Returns a picture file in the size and with the channels of an input, float32 [1, C, H, W] in [0, 1].

    Raises:
        ContractError: there is no such file, it is no picture, or the input is not one that a picture fits.
    """
    _, channels, height, width = spec.shape
    if channels not in _MODES:
        raise ContractError(
            f"{spec.name} takes {channels} channels, expected 1 or 3 to read it from a file",
            hint="give it as an array from Python: Bundle.generate(..., inputs={...})",
        )
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits, which Pillow's conversion would cut off at 255
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            resized = picture.convert(_MODES[channels]).resize((width, height), Image.Resampling.LANCZOS)
    except FileNotFoundError:
        raise ContractError(f"{spec.name}: {path} does not exist", hint=f"give --input {spec.name}=FILE") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise ContractError(
            f"{spec.name}: {path} is not a picture that can be read", hint="give a PNG, JPEG or WebP file"
        ) from error
    values_HWC = np.asarray(resized, dtype=np.float32).reshape(height, width, channels) / np.float32(255)
    return np.ascontiguousarray(values_HWC.transpose(2, 0, 1))[None]


def check_output(path: Path, output: OutputSpec, rate: int | None = None) -> None:
    """Raises ContractError unless a file of this name can hold what a generator makes."""
    suffixes = [*_WRITERS.get(output.kind, {}), ".npy"]
    if path.suffix.lower() not in suffixes:
        raise ContractError(
            f"{path.name}: {output.kind} cannot be written as {path.suffix or 'a file without suffix'!r}, "
            f"expected {' or '.join(suffixes)}",
            hint=f"-o {path.with_suffix(suffixes[0]).name}",
        )
    if rate and output.kind != "audio":
        raise ContractError(f"a rate is given for {output.kind}, expected it for sound", hint="leave --rate out")
    if path.suffix.lower() == ".wav" and not (rate or output.rate):
        raise ContractError(
            f"{path.name}: the bundle does not say how many samples its sound has in a second",
            hint="give --rate, for instance --rate 44100",
        )


def write_output(path: Path, values: Array, output: OutputSpec, rate: int | None = None) -> None:
    """Writes what a generator made, whole or not at all.

    Args:
        path: ``.npy`` for anything; ``.png`` for a picture, 16-bit grey for depth, animated for video; ``.gif`` for
            video; ``.wav`` for sound, 16 bits, clipped to [-1, 1].
        values: as `fewstep.numerics.outputs.to_output` returns it.
        output: what it is.
        rate: samples a second of a sound; None takes the bundle's.

    Raises:
        ContractError: see `check_output`; or the values do not fit the file.
    """
    check_output(path, output, rate)
    if path.suffix.lower() == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, values)
        return write_whole(path, buffer.getvalue())
    if output.kind != "picture" and not np.isfinite(values).all():
        raise ContractError(f"{path.name}: the result is not finite", hint="-o x.npy keeps the numbers as they are")
    write_whole(path, _WRITERS[output.kind][path.suffix.lower()](values, rate or output.rate or 0))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    disk.write_whole(path, content, hint="free some space there, or choose another -o file")


def pixels_of(picture_HWC: Array) -> images.Pixels:
    """Returns a picture of 1 or 3 channels in [0, 1] as uint8 [H, W, 3]."""
    coloured = picture_HWC if picture_HWC.shape[-1] == 3 else np.repeat(picture_HWC, 3, -1)
    return images.to_uint8(coloured * 2 - 1)


def grid_png(samples: Sequence[Sample], *, columns: int = 4) -> bytes:
    """Returns the samples as one PNG, in rows under their prompts."""
    rows = [samples[i : i + columns] for i in range(0, len(samples), columns)]
    labels = [", ".join(s.prompt for s in row if s.prompt) for row in rows]
    return images.png_bytes(images.grid([[pixels_of(s.picture_HWC) for s in row] for row in rows], labels))


def _picture(values_HWC: Array, _: int) -> bytes:
    return images.png_bytes(pixels_of(values_HWC))


def _depth(values: Array, _: int) -> bytes:
    low, high = float(values.min()), float(values.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ContractError(
            f"depth is {low:.3g} to {high:.3g}, expected 0 to 1 for a picture of it",
            hint="-o x.npy keeps the numbers as they are",
        )
    grey_HW = np.rint(np.clip(values.reshape([n for n in values.shape if n != 1]), 0, 1) * 65535).astype(np.uint16)
    return _saved([Image.fromarray(grey_HW)], "PNG")


def _video(values: Array, form: str) -> bytes:
    pixels = [images.to_uint8(frame * 2 - 1) for frame in frames_of(values)]
    return _saved([Image.fromarray(frame) for frame in pixels], form)


def _saved(frames: Sequence[Image.Image], form: str) -> bytes:
    buffer = io.BytesIO()
    more: dict[str, Any] = {"append_images": frames[1:], "duration": _FRAME_MS, "loop": 0} if len(frames) > 1 else {}
    frames[0].save(buffer, form, save_all=len(frames) > 1, **more)
    return buffer.getvalue()


def _wav(values: Array, rate: int) -> bytes:
    channels_CS = values.reshape(-1, values.shape[-1])
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels_CS.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(np.clip(channels_CS, -1, 1) * 32767).astype("<i2").T.tobytes())
    return buffer.getvalue()


# By kind and suffix: (values, samples a second) -> the file's content.
_WRITERS: Mapping[str, Mapping[str, Callable[[Array, int], bytes]]] = {
    "picture": {".png": _picture},
    "audio": {".wav": _wav},
    "video": {".png": lambda values, _: _video(values, "PNG"), ".gif": lambda values, _: _video(values, "GIF")},
    "depth": {".png": _depth},
}

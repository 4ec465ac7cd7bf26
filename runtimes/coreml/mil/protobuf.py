"""Reads protocol buffers without generated classes: a message is its fields by number.

The format is that of https://protobuf.dev/programming-guides/encoding. What a field means is for the caller to know.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fewstep.errors import BundleError

Field = int | memoryview
Message = dict[int, list[Field]]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}


def message(data: memoryview) -> Message:
    """Returns the fields of a message by number, each in order: whole numbers as ``int``, all else as bytes.

    Raises:
        BundleError: the bytes end inside a field, or have a wire type that protobuf no longer uses.
    """
    found: Message = {}
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        value: Field
        if wire_type == _VARINT:
            value, position = _varint(data, position)
        elif wire_type == _BYTES or wire_type in _FIXED_SIZES:
            size = _FIXED_SIZES.get(wire_type)
            if size is None:
                size, position = _varint(data, position)
            if position + size > len(data):
                raise _truncated()
            value, position = data[position : position + size], position + size
        else:
            raise BundleError(f"not a protocol buffer: field {number} has wire type {wire_type}", hint=_HINT)
        found.setdefault(number, []).append(value)
    return found


def messages(parent: Message, number: int) -> Iterator[Message]:
    """Yields the sub-messages of a repeated field."""
    for value in parent.get(number, ()):
        yield message(_bytes(value))


def sub_message(parent: Message, number: int) -> Message | None:
    """Returns a sub-message, None if it is absent."""
    values = parent.get(number)
    return message(_bytes(values[-1])) if values else None


def entries(parent: Message, number: int) -> Iterator[tuple[str, Message]]:
    """Yields the keys and values of a map from text to messages."""
    for entry in messages(parent, number):
        yield text(entry, 1), sub_message(entry, 2) or {}


def pairs(parent: Message, number: int) -> Iterator[tuple[str, str]]:
    """Yields the keys and values of a map from text to text."""
    for entry in messages(parent, number):
        yield text(entry, 1), text(entry, 2)


def text(parent: Message, number: int) -> str:
    """Returns a text, '' if it is absent."""
    values = parent.get(number)
    return bytes(_bytes(values[-1])).decode("utf-8") if values else ""


def texts(parent: Message, number: int) -> list[str]:
    """Returns the texts of a repeated field."""
    return [bytes(_bytes(value)).decode("utf-8") for value in parent.get(number, ())]


def octets(parent: Message, number: int) -> bytes:
    """Returns a field of bytes, empty if it is absent."""
    values = parent.get(number)
    return bytes(_bytes(values[-1])) if values else b""


def whole(parent: Message, number: int) -> int:
    """Returns a whole number, 0 if it is absent."""
    values = parent.get(number)
    if not values:
        return 0
    if not isinstance(values[-1], int):
        raise BundleError(f"not the expected protocol buffer: field {number} is no whole number", hint=_HINT)
    return values[-1]


def wholes(parent: Message, number: int, bits: int) -> npt.NDArray[np.int64]:
    """Returns a repeated field of signed whole numbers, packed or not."""
    found: list[int] = []
    for value in parent.get(number, ()):
        if isinstance(value, int):
            found.append(value)
            continue
        position = 0
        while position < len(value):
            one, position = _varint(value, position)
            found.append(one)
    # Negative numbers are written as 64-bit two's complement, whatever the field's width.
    wide = np.array(found, dtype=np.uint64).astype(np.int64)
    return wide if bits == 64 else wide.astype(np.int32).astype(np.int64)


def reals(parent: Message, number: int, dtype: str) -> npt.NDArray[np.floating]:
    """Returns a repeated field of ``float32`` or ``float64``, packed or not."""
    raw = b"".join(bytes(_bytes(value)) for value in parent.get(number, ()))
    return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype)


def _bytes(value: Field) -> memoryview:
    if isinstance(value, int):
        raise BundleError("not the expected protocol buffer: a whole number where a message should be", hint=_HINT)
    return value


_HINT = "the file is damaged or no Core ML model: copy it again or build the bundle again"


def _truncated() -> BundleError:
    return BundleError("the protocol buffer ends inside a field", hint=_HINT)


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if position >= len(data):
            raise _truncated()
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7

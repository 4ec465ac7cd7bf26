"""Weight files (``weight.bin``, format version 2): a header, then metadata and data of each blob.

Offsets and sizes were taken from files that coremltools wrote; all numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fewstep.errors import BundleError
from fewstep.runtimes.coreml.mil.dtypes import STORED, Array, DType, by_number

_HEADER = struct.Struct("<II56x")  # how many blobs, format version
_METADATA = struct.Struct("<IIQQQ32x")  # sentinel, data type, bytes, offset of the data, padding in bits
_SENTINEL = 0xDEADBEEF
_VERSION = 2
# Metadata and data begin at multiples of this.
_ALIGNED = 64


@dataclass(frozen=True)
class Blob:
    """A blob as it is stored: the number of its data type, its bytes, and how many bits at their end are padding."""

    number: int
    data: bytes
    padding: int


class BlobFile:
    """A weight file, from which each blob is read when it is wanted and not kept."""

    def __init__(self, path: Path) -> None:
        """Checks the header.

        Raises:
            BundleError: the file is missing, cut off or of another format version.
        """
        self.path = path
        header = self._read(0, _HEADER.size)
        _, version = _HEADER.unpack(header)
        if version != _VERSION:
            raise BundleError(f"{path}: weight file version {version}, expected {_VERSION}", hint=_HINT)

    def read(self, offset: int, dtype: DType, count: int) -> Array:
        """Returns the ``count`` elements of the blob whose metadata is at ``offset``, a new flat array.

        Raises:
            BundleError: no blob there, of another type or size, or the file is cut off.
        """
        number, size, start, padding = self._metadata(offset)
        where = f"{self.path}: blob at {offset}"
        stored = by_number(STORED, number, where)
        # Booleans are stored as bytes, without a type of their own.
        if stored != dtype and not (dtype.name == "bool" and stored.bits == 8):
            raise BundleError(f"{where} is {stored.name}, the program says {dtype.name}", hint=_HINT)
        if size != dtype.packed_bytes(count) or 8 * size - padding * (dtype.bits < 8) != dtype.bits * count:
            raise BundleError(f"{where} has {size} bytes, expected {dtype.packed_bytes(count)}", hint=_HINT)
        return dtype.decode(self._read(start, size), count)

    def blob(self, offset: int) -> Blob:
        """Returns the blob whose metadata is at ``offset`` as it is stored.

        Raises:
            BundleError: no blob there, or the file is cut off.
        """
        number, size, start, padding = self._metadata(offset)
        return Blob(number, self._read(start, size), padding)

    def _metadata(self, offset: int) -> tuple[int, int, int, int]:
        sentinel, number, size, start, padding = _METADATA.unpack(self._read(offset, _METADATA.size))
        if sentinel != _SENTINEL:
            raise BundleError(f"{self.path}: blob at {offset} has no metadata", hint=_HINT)
        return number, size, start, padding

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with self.path.open("rb") as stream:
                stream.seek(offset)
                data = stream.read(size)
        except OSError as error:
            raise BundleError(f"{self.path}: cannot read it: {error.strerror}", hint=_HINT) from error
        if len(data) != size:
            raise BundleError(
                f"{self.path} is cut off: it ends {size - len(data)} bytes before the blob at {offset} does",
                hint=_HINT,
            )
        return data


class BlobWriter:
    """Writes a weight file, in which equal blobs are one. A context manager; the file is whole once it is closed.

    Args:
        path: of the file, which is overwritten.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._stream.write(_HEADER.pack(0, _VERSION))
        self._places: dict[bytes, int] = {}

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._stream.tell()

    def place(self, blob: Blob) -> int:
        """Returns where the metadata of a blob is, which is written unless an equal one has been."""
        key = hashlib.sha256(struct.pack("<IQ", blob.number, blob.padding) + blob.data).digest()
        if key not in self._places:
            offset = self._places[key] = self._stream.tell()
            start = offset + _METADATA.size
            self._stream.write(_METADATA.pack(_SENTINEL, blob.number, len(blob.data), start, blob.padding))
            self._stream.write(blob.data + bytes(-len(blob.data) % _ALIGNED))
        return self._places[key]

    def close(self) -> None:
        """Writes how many blobs there are, and closes the file; closing twice is fine."""
        if self._stream.closed:
            return
        self._stream.seek(0)
        self._stream.write(_HEADER.pack(len(self._places), _VERSION))
        self._stream.close()

    def __enter__(self) -> Self:
        """Returns the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self.close()


_HINT = "copy the package again or build the bundle again"

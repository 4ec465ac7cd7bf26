"""Reads weight files (``weight.bin``, format version 2): a header, then metadata and data of each blob.

Offsets and sizes were taken from files that coremltools wrote; all numbers are little-endian.
"""

from __future__ import annotations

import struct
from pathlib import Path

from fewstep.errors import BundleError
from fewstep.runtimes.mil.dtypes import STORED, Array, DType, by_number

_HEADER = struct.Struct("<II56x")  # how many blobs, format version
_METADATA = struct.Struct("<IIQQQ32x")  # sentinel, data type, bytes, offset of the data, padding in bits
_SENTINEL = 0xDEADBEEF
_VERSION = 2


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
        sentinel, number, size, start, padding = _METADATA.unpack(self._read(offset, _METADATA.size))
        where = f"{self.path}: blob at {offset}"
        if sentinel != _SENTINEL:
            raise BundleError(f"{where} has no metadata", hint=_HINT)
        stored = by_number(STORED, number, where)
        # Booleans are stored as bytes, without a type of their own.
        if stored != dtype and not (dtype.name == "bool" and stored.bits == 8):
            raise BundleError(f"{where} is {stored.name}, the program says {dtype.name}", hint=_HINT)
        if size != dtype.packed_bytes(count) or 8 * size - padding * (dtype.bits < 8) != dtype.bits * count:
            raise BundleError(f"{where} has {size} bytes, expected {dtype.packed_bytes(count)}", hint=_HINT)
        return dtype.decode(self._read(start, size), count)

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


_HINT = "copy the package again or build the bundle again"

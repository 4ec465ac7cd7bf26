"""The seven functions of the CUDA runtime that running an engine takes, through ctypes."""

from __future__ import annotations

import ctypes
import ctypes.util
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.errors import RuntimeMissingError
from fewstep.runtimes.base import Array

_TO_DEVICE, _TO_HOST = 1, 2
_MAJORS = (13, 12, 11)


class Cuda:
    """The CUDA runtime of this machine.

    Raises:
        RuntimeMissingError: there is no CUDA runtime, or no GPU that it can use.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = library if library is not None else _load()
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        self._check("cudaGetDeviceCount", ctypes.byref(count))
        if count.value == 0:
            raise RuntimeMissingError("no NVIDIA GPU", hint="run on a machine that has one")

    def allocate(self, size: int) -> int:
        """Returns the address of so many bytes of the GPU's memory."""
        pointer = ctypes.c_void_p()
        self._check("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(1, size)))
        assert pointer.value is not None, "cudaMalloc succeeded"
        return pointer.value

    def free(self, address: int) -> None:
        """Gives memory back."""
        self._check("cudaFree", ctypes.c_void_p(address))

    def upload(self, array: Array, address: int) -> None:
        """Copies a contiguous array to the GPU."""
        self._copy(address, array.ctypes.data, array.nbytes, _TO_DEVICE)

    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Returns an array from the GPU."""
        array = np.empty(shape, dtype)
        self._copy(array.ctypes.data, address, array.nbytes, _TO_HOST)
        return array

    def stream(self) -> int:
        """Returns a new stream."""
        handle = ctypes.c_void_p()
        self._check("cudaStreamCreate", ctypes.byref(handle))
        return handle.value or 0

    def wait(self, stream: int) -> None:
        """Waits until a stream has done all it was given."""
        self._check("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def destroy(self, stream: int) -> None:
        """Gives a stream back."""
        self._check("cudaStreamDestroy", ctypes.c_void_p(stream))

    def _copy(self, to: int, source: int, size: int, kind: int) -> None:
        self._check("cudaMemcpy", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), kind)

    def _check(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            said = (self._library.cudaGetErrorString(status) or b"").decode()
            raise RuntimeMissingError(
                f"{function} failed: {said} ({status})", hint="is there an NVIDIA GPU with its driver, and memory left?"
            )


def _load() -> ctypes.CDLL:
    """Returns the CUDA runtime: the system's, or that of NVIDIA's Python packages."""
    names = [f"libcudart.so.{major}" for major in _MAJORS]
    names += [found] if (found := ctypes.util.find_library("cudart")) else []
    package = util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        names += [str(path) for path in sorted(Path(folder).glob("*/lib/libcudart.so.*"), reverse=True)]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue  # the next place; what none of them has is told below
    raise RuntimeMissingError(
        "no CUDA runtime (libcudart) here", hint="pip install nvidia-cuda-runtime, on a machine with an NVIDIA GPU"
    )

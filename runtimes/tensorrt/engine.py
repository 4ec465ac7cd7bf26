"""Engines: built once for this machine's TensorRT and GPU, loaded, run and looked into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.bundle.contract import ComponentSpec, TensorSpec
from fewstep.cache import default_root
from fewstep.errors import ContractError, ExportError
from fewstep.hashing import file_sha256, value_sha256
from fewstep.runtimes.base import Array
from fewstep.runtimes.tensorrt.build_engine import TIMING_CACHE, build_engine
from fewstep.runtimes.tensorrt.cudart import Cuda


def engine_of(model: Path) -> Path:
    """Returns the engine of an ONNX model for this machine, from the user's cache folder or built now.

    Raises:
        ExportError: TensorRT refuses the model.
    """
    import tensorrt

    data = model.with_name(f"{model.name}.data")
    key = {
        "model": file_sha256(model),
        "data": file_sha256(data) if data.is_file() else None,
        "tensorrt": tensorrt.__version__,
        "gpu": gpu_name(),
    }
    folder = default_root() / "tensorrt"
    engine = folder / value_sha256(key)[:32] / "model.engine"
    if not engine.is_file():
        engine.parent.mkdir(parents=True, exist_ok=True)
        try:
            build_engine(model, engine, folder / TIMING_CACHE)
        except RuntimeError as error:
            raise ExportError(str(error), hint="report it with the model: it was lint-clean") from error
    return engine


def gpu_name() -> str:
    """Returns the name of the first GPU, as its driver calls it."""
    path = next(iter(sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))), None)
    lines = [] if path is None else path.read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")), "NVIDIA GPU")


class EngineSession:
    """An engine with memory for its inputs and outputs.

    Raises:
        ContractError: the engine is of another TensorRT, or its tensors are not those of the manifest.
        RuntimeMissingError: no GPU.
    """

    def __init__(self, path: Path, spec: ComponentSpec, cuda: Cuda | None = None) -> None:
        import tensorrt

        self._cuda = cuda or Cuda()
        self._spec = spec
        self._logger = tensorrt.Logger(tensorrt.Logger.WARNING)
        self._engine = tensorrt.Runtime(self._logger).deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ContractError(f"{path}: TensorRT cannot load it", hint=f"delete {path.parent}: it is built again")
        self._context = self._engine.create_execution_context()
        self._stream = self._cuda.stream()
        self._memory: dict[str, int] = {}
        given = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        wanted = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        if given != wanted:
            raise ContractError(f"{path}: the engine has {sorted(given)}, the manifest has {sorted(wanted)}")
        for tensor in (*spec.inputs, *spec.outputs):
            self._check(tensor, path)
            size = int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
            self._memory[tensor.name] = self._cuda.allocate(size)
            self._context.set_tensor_address(tensor.name, self._memory[tensor.name])

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name."""
        if self._context is None:
            raise ContractError("the session is closed")
        for name, array in feeds.items():
            self._cuda.upload(array, self._memory[name])
        if not self._context.execute_async_v3(self._stream):
            raise ContractError("TensorRT could not start the engine", hint="its own messages are above")
        self._cuda.wait(self._stream)
        return {
            t.name: self._cuda.download(self._memory[t.name], t.shape, np.dtype(t.dtype)) for t in self._spec.outputs
        }

    def layers(self) -> list[dict[str, Any]]:
        """Returns what the builder made of the network: its layers, with their precisions and kernels."""
        import tensorrt

        inspector = self._engine.create_engine_inspector()
        told = json.loads(inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON))
        return list(told["Layers"])

    def close(self) -> None:
        """Frees the memory on the GPU; closing twice is fine."""
        if self._context is None:
            return
        for address in self._memory.values():
            self._cuda.free(address)
        self._cuda.destroy(self._stream)
        self._memory, self._context, self._engine = {}, None, None

    def _check(self, tensor: TensorSpec, path: Path) -> None:
        import tensorrt

        shape = tuple(self._engine.get_tensor_shape(tensor.name))
        dtype = np.dtype(tensorrt.nptype(self._engine.get_tensor_dtype(tensor.name))).name
        tensor.check(shape, dtype, str(path))

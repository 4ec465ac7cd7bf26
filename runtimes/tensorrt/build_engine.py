"""Builds a TensorRT engine from ``model.onnx``: python build_engine.py [model.onnx [model.engine]].

It needs the tensorrt package (10 or later) and an NVIDIA GPU, and nothing else: bundles carry this file. An engine fits
the version of TensorRT and the kind of GPU that it was built with; ``model.engine.json`` beside it says which.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

TIMING_CACHE = "timing.cache"


def build_engine(model: Path, engine: Path, timing_cache: Path) -> dict[str, Any]:
    """Returns what is known of an engine, after building it and writing it with ``<engine>.json`` beside it.

    The network is strongly typed: its precision is what the model says, with Cast, QuantizeLinear and DequantizeLinear.
    Single precision is single precision: TF32, which keeps 10 bits of 23, is off.

    Args:
        model: an ONNX model with static shapes.
        engine: file to write.
        timing_cache: measurements of kernels, read if it is there and written; the next build is faster.

    Raises:
        RuntimeError: TensorRT refuses the model or finds no engine for it.
    """
    import tensorrt

    started = time.perf_counter()
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    # TensorRT 11 ignores the flag: all of its networks are strongly typed.
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RuntimeError(f"{model}: TensorRT's parser refuses it: {'; '.join(said) or 'it does not say why'}")
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"{model}: TensorRT finds no engine for it; its own messages are above")
    _write(timing_cache, bytes(config.get_timing_cache().serialize()))
    _write(engine, bytes(plan))
    known = {
        "tensorrt": tensorrt.__version__,
        "layers": network.num_layers,
        "bytes": engine.stat().st_size,
        "build_seconds": round(time.perf_counter() - started, 1),
    }
    _write(engine.with_name(f"{engine.name}.json"), json.dumps(known, indent=1).encode())
    return known


def _write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(data)
    partial.replace(path)


def main(arguments: list[str]) -> None:
    """Builds the engine that the arguments name, by default beside this file."""
    here = Path(__file__).resolve().parent
    model = Path(arguments[0]) if arguments else here / "model.onnx"
    engine = Path(arguments[1]) if len(arguments) > 1 else model.with_suffix(".engine")
    sys.stdout.write(f"{json.dumps(build_engine(model, engine, engine.with_name(TIMING_CACHE)))}\n")


if __name__ == "__main__":
    main(sys.argv[1:])

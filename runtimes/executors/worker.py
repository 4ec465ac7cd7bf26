"""Runs artifacts where fewstep is not installed: started there as a script, it needs numpy and one runtime.

It takes requests on its standard input and answers on its standard output. A message is a prefix with two lengths, a
JSON header, and the bytes of the arrays that the header describes. `fewstep.runtimes.executors.remote` is the other
end.

A further runtime is a function like `_onnxruntime` and a line in `_OPENERS`.
"""

from __future__ import annotations

import json
import os
import platform
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array], "Sequence[str] | None"], "dict[str, Array]"]
"""(inputs, names of outputs or None for all) -> outputs by name."""
Open = Callable[[str, "int | None", Mapping[str, str]], Run]
"""(path, threads, settings of the session) -> what runs the artifact."""

PREFIX = struct.Struct("<QQ")


def encode(values: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """Returns a message: JSON-ready values and arrays by name."""
    described = [[name, str(a.dtype), list(a.shape)] for name, a in arrays.items()]
    body = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays.values())
    header = json.dumps({**values, "arrays": described}).encode()
    return PREFIX.pack(len(header), len(body)) + header + body


def decode(header: bytes, body: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """Returns what `encode` was given, from the two parts behind the prefix."""
    values, arrays, at = json.loads(header), {}, 0
    for name, dtype, shape in values.pop("arrays"):
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        arrays[name] = np.frombuffer(body[at : at + size], kind).reshape(shape)
        at += size
    return values, arrays


def serve(opener: Open, version: str, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answers requests until there are no more: ``open`` a path, ``run`` what is open, ``close`` it."""
    opened: dict[int, Run] = {}

    def answer(values: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        answers.write(encode(values, arrays))
        answers.flush()

    answer({"version": version, "machine": platform.machine(), "python": platform.python_version()}, {})
    while prefix := requests.read(PREFIX.size):
        values, arrays = decode(*(requests.read(length) for length in PREFIX.unpack(prefix)))
        results: dict[str, Array] = {}
        try:
            if values["do"] == "open":
                opened[values["id"]] = opener(values["path"], values["threads"], values["settings"])
            elif values["do"] == "run":
                results = opened[values["id"]](arrays, values["outputs"])
            else:
                opened.pop(values["id"], None)
        except Exception as error:  # whatever a runtime raises: the other end says where it was
            answer({"error": f"{type(error).__name__}: {error}"}, {})
        else:
            answer({}, results)


def _onnxruntime() -> tuple[str, Open]:
    import onnxruntime

    def opened(path: str, threads: int | None, settings: Mapping[str, str]) -> Run:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        for name, value in settings.items():
            options.add_session_config_entry(name, value)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        every = [output.name for output in session.get_outputs()]

        def run(feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> dict[str, Array]:
            names = list(outputs or every)
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))

        return run

    return str(onnxruntime.__version__), opened


def _litert() -> tuple[str, Open]:
    from importlib import metadata

    from ai_edge_litert.interpreter import Interpreter

    def opened(path: str, threads: int | None, _: Mapping[str, str]) -> Run:
        interpreter = Interpreter(model_path=path, num_threads=threads)
        interpreter.allocate_tensors()
        signature = interpreter.get_signature_runner("serving_default")
        dtypes = {name: details["dtype"] for name, details in signature.get_input_details().items()}

        def run(feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> dict[str, Array]:
            # Its interface has whole numbers of 32 bits.
            results = signature(**{name: array.astype(dtypes[name]) for name, array in feeds.items()})
            return {name: results[name] for name in outputs or results}

        return run

    return metadata.version("ai-edge-litert"), opened


_OPENERS: dict[str, Callable[[], tuple[str, Open]]] = {"onnxruntime": _onnxruntime, "litert": _litert}


def main() -> None:
    """Serves the runtime that the first argument names."""
    # What libraries print must not get between the messages.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    version, opener = _OPENERS[sys.argv[1]]()
    serve(opener, version, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()

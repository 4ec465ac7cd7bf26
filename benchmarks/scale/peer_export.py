"""Exports a diffusers folder with optimum-onnx, in its own environment, and prints what that took as JSON.

.venv-interop/bin/python -m benchmarks.scale.peer_export FOLDER OUT
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from pathlib import Path


def main(source: str, out: str) -> None:
    """Exports and prints seconds, CPU seconds, the peak of resident memory, sizes and versions."""
    start = time.perf_counter()
    from optimum.exporters.onnx import main_export

    main_export(source, out, task="text-to-image", do_validation=False, local_files_only=True)
    seconds = time.perf_counter() - start
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sizes: dict[str, int] = {}
    for path in Path(out).rglob("model.onnx*"):
        sizes[path.parent.name] = sizes.get(path.parent.name, 0) + path.stat().st_size
    figures = {
        "seconds": seconds,
        "cpu_seconds": time.process_time(),
        "peak_bytes": int(lines["VmHWM"].split()[0]) * 1024,
        "files_bytes": sizes,
        "versions": {name: metadata.version(name) for name in ("optimum-onnx", "torch", "diffusers", "transformers")},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])

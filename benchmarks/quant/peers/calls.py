"""Recorded network calls, as the peers' scripts read them: one array for each input, calls along its first axis.

Runs in the environments of the peers: numpy and the standard library only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def read_calls(path: str) -> dict[str, np.ndarray]:
    """Returns every input of the calls, [calls, ...shape of the input]."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def each_call(path: str) -> Iterator[dict[str, np.ndarray]]:
    """Yields the inputs of one call after the other."""
    calls = read_calls(path)
    for i in range(len(next(iter(calls.values())))):
        yield {name: array[i] for name, array in calls.items()}


def run_job(quantize: Callable[[dict[str, Any]], None]) -> None:
    """Runs a script's function on the job whose JSON file the command line names, and checks that it left a model."""
    job = json.loads(Path(sys.argv[1]).read_text())
    quantize(job)
    if not Path(job["out"]).is_file():
        raise SystemExit(f"{sys.argv[0]}: no model was written to {job['out']}")

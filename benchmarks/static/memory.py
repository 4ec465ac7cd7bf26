"""Memory and time of the ways to hold N graphs on one file of weights, against one graph of the table form."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from fewstep.run_in_subprocess import run_isolated

# What is tried: a name, what it is, and the function of ONNX Runtime's session options that it differs by.
WAYS = {
    "step": "the step form: one graph, its weights beside it",
    "table": "the table form: one graph, its weights beside it",
    "one file": "the table form with its weights in the graph's own file",
    "mapped": "all graphs open: no packing, weights and their layout as in the mapped file, one arena",
    "unpacked": "all graphs open, no packing (`session.disable_prepacking`)",
    "packed": "all graphs open, ONNX Runtime's defaults",
    "shared values": "all graphs open, every weight given as one shared value (`add_initializer`), no packing",
    "one": "one graph open at a time, ONNX Runtime's defaults",
}
_RUNS = 10
_MIB = 1 << 20


def measure(step: Path, table: Path, graphs: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Returns memory in MiB beyond that of the bare process and times in ms of every way, each in its own process.

    Args:
        step: the graph of the step form.
        table: that of the table form.
        graphs: those of the rows.
    """
    found = {}
    with tempfile.TemporaryDirectory(dir=table.parent) as folder:
        one_file = Path(folder) / "one-file.onnx"
        ir.save(ir.load(table), one_file)
        alone = {"step": [step], "table": [table], "one file": [one_file]}
        for way in WAYS:
            paths = [str(path) for path in alone.get(way, graphs)]
            found[way] = run_isolated(hold, {"paths": paths, "way": way}).result
    return found


def hold(paths: list[str], way: str) -> dict[str, float]:
    """Returns what it takes to run the graphs in turn: PSS and RSS in MiB at the end, and CPU time in ms.

    PSS counts a page of the file once, however often it is mapped; RSS counts it each time.
    """
    before = _memory()
    held, values = [], _values(paths[0]) if way == "shared values" else {}
    opened, ran = [], []
    for path in paths:
        if way == "one":
            held.clear()
        held.append(_timed(opened, lambda: _session(path, way, values)))  # noqa: B023
        _run(held[-1])
    for _ in range(_RUNS):
        for session in held:
            _timed(ran, lambda: _run(session))  # noqa: B023
    gc.collect()
    after = _memory()
    return {
        **{kind: round(after[kind] - before[kind], 1) for kind in after},
        "open_ms": round(min(opened), 1),
        "run_ms": round(min(ran), 2),
    }


def _session(path: str, way: str, values: Mapping[str, Any] | None = None) -> onnxruntime.InferenceSession:
    from fewstep.runtimes.onnxruntime.runtime import session_options

    options = session_options(threads=1, mapped=way == "mapped")
    if way in ("unpacked", "shared values"):
        options.add_session_config_entry("session.disable_prepacking", "1")
    for name, value in (values or {}).items():
        options.add_initializer(name, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _values(path: str) -> dict[str, Any]:
    """Returns the weights of a graph as values that sessions can share."""
    model = ir.load(path)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, ir.ExternalTensor):
            found[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(tensor.numpy()))
            tensor.release()
    return found


def _run(session: onnxruntime.InferenceSession) -> None:
    session.run(None, random_feeds(session))


def random_feeds(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """Returns inputs of a session: noise, and zeros for whole numbers."""
    random = np.random.default_rng(0)
    return {
        value.name: random.standard_normal(value.shape or 1, np.float32).reshape(value.shape)
        if value.type == "tensor(float)"
        else np.zeros(value.shape, np.int64)
        for value in session.get_inputs()
    }


def _timed(times_ms: list[float], call: Callable[[], Any]) -> Any:
    """Returns what a call returns, and notes its CPU time: the machine may be shared, and one thread is used."""
    start = time.process_time()
    result = call()
    times_ms.append(1e3 * (time.process_time() - start))
    return result


def _memory() -> dict[str, float]:
    """Returns this process's PSS and RSS in MiB, as Linux counts them."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    kib = {line.split(":")[0].lower(): int(line.split()[1]) for line in lines[1:]}
    return {f"{kind}_mib": kib[kind] / 1024 for kind in ("pss", "rss")}


def markdown(figures: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a table."""
    lines = []
    for recipe, found in figures.items():
        table = found["ways"]["table"]
        lines += [
            f"{recipe}: {found['graphs']} graphs of the built-in generator's denoiser, "
            f"{found['bytes']['specialized'] / _MIB:.2f} MiB on disk, "
            f"{found['bytes']['specialized'] / found['bytes']['table']:.3f} of the table form's "
            f"{found['bytes']['table'] / _MIB:.2f} MiB; the step form takes {found['bytes']['step'] / _MIB:.2f} MiB.",
            "",
            "| way | PSS, MiB | / table | RSS, MiB | open a graph, ms | a step, ms | / table |",
            "|---" * 7 + "|",
        ]
        for way, v in found["ways"].items():
            cells = [
                f"{way}: {WAYS[way]}",
                f"{v['pss_mib']:.1f}",
                f"{v['pss_mib'] / table['pss_mib']:.2f}",
                f"{v['rss_mib']:.1f}",
                f"{v['open_ms']:.0f}",
                f"{v['run_ms']:.2f}",
                f"{v['run_ms'] / table['run_ms']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines

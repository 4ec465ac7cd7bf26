"""Where the time of each int8 model goes in ONNX Runtime, and what of it stays in float.

    python -m benchmarks.quant.operators [ROW ...]

Writes ``results/operators.md`` from cells that are measured once for each model. Rows must have been made by
``python -m benchmarks.quant`` before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quant.cells import Cells, sources_sha256
from fewstep.bundle.bundle import Bundle
from fewstep.bundle.samples import load_samples
from fewstep.errors import BundleError
from fewstep.run_in_subprocess import run_isolated

HERE = Path(__file__).parent
RESULTS, WORK = HERE / "results", Path("build/quant")
CALLS, WARM_UP = 30, 5
COMPONENTS = ("denoiser", "decoder", "text_encoder")
# Operators that multiply weights or activations, in ONNX Runtime's optimized graphs.
FLOAT_PRODUCTS = ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
INT8_PRODUCTS = (
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "ConvInteger",
    "DynamicQuantizeMatMul",
)
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


def profile_model(model: str, samples: str, component: str) -> dict[str, Any]:
    """Returns time and count of each operator of a model as ONNX Runtime runs it, one thread.

    Times are the least of all calls: what a node takes when nothing interferes. ``operators`` maps an operator to its
    nodes and the sum of their ms; ``float_products`` lists the convolutions and matrix products that run in float with
    their ms; ``call_ms`` is a whole call without the profiler.
    """
    import onnx
    import onnxruntime

    feeds = [f for s in load_samples(Path(samples))[:8] for f in s.feeds if f.component == component]
    inputs = dict(feeds[0].inputs)

    def session(profiled: Path | None) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if profiled is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profiled / "profile")
            options.optimized_model_filepath = str(profiled / "optimized.onnx")
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    plain, calls_ms = session(None), []
    for i in range(WARM_UP + CALLS):
        start = time.perf_counter()
        plain.run(None, inputs)
        if i >= WARM_UP:
            calls_ms.append(1e3 * (time.perf_counter() - start))
    with tempfile.TemporaryDirectory(prefix="fewstep-profile-") as folder:
        profiled = session(Path(folder))
        for _ in range(WARM_UP + CALLS):
            profiled.run(None, inputs)
        events = json.loads(Path(profiled.end_profiling()).read_text())
        optimized = onnx.load(Path(folder, "optimized.onnx"), load_external_data=False)
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    by_node: dict[str, list[float]] = defaultdict(list)
    operator = {}
    for event in kernels:
        name = event["name"].removesuffix("_kernel_time")
        by_node[name].append(event["dur"] / 1e3)
        operator[name] = event["args"]["op_name"]
    node_ms = {name: min(times[WARM_UP:]) for name, times in by_node.items()}
    counts = Counter(operator.values())
    total: dict[str, float] = defaultdict(float)
    for name, ms in node_ms.items():
        total[operator[name]] += ms
    operators = {op: {"nodes": counts[op], "ms": round(ms, 4)} for op, ms in total.items()}
    return {
        "call_ms": round(min(calls_ms), 3),
        "kernel_ms": round(sum(node_ms.values()), 3),
        "nodes": len(node_ms),
        "graph_nodes": len(optimized.graph.node),
        "operators": dict(sorted(operators.items(), key=lambda item: -item[1]["ms"])),
        "float_products": {n: round(ms, 4) for n, ms in node_ms.items() if operator[n] in FLOAT_PRODUCTS},
    }


def measure(row: str, bundle: Bundle, cells: Cells) -> dict[str, Any]:
    """Returns the profiles of a row's components, measured unless they have been."""
    found = {}
    for component in COMPONENTS:
        path = bundle.manifest.artifact("onnxruntime", component).path
        key = {"network": bundle.manifest.files[path].sha256[:16], **sources_sha256(HERE / "operators.py")}
        arguments = {"model": str(bundle.file(path)), "samples": str(WORK / "reference"), "component": component}
        found[component] = cells.get_or_make(
            f"operators/{row}.{component}",
            key,
            lambda arguments=arguments: run_isolated(profile_model, arguments).result,  # type: ignore[misc]
        )
    return found


def markdown(profiles: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the page: a table of ms by operator for each component, then what stays in float."""
    lines = [
        "# Where the time goes, operator by operator",
        "",
        f"ms of one call by operator of ONNX Runtime's optimized graph (nodes in brackets), one thread, the least of "
        f"{CALLS} calls, from ONNX Runtime's profiler; *call* is measured without it. Written by `python -m "
        "benchmarks.quant.operators`. The machine was shared: compare within a column.",
    ]
    for component in COMPONENTS:
        columns = {row: parts[component] for row, parts in profiles.items() if "error" not in parts[component]}
        lines += ["", f"## {component}", "", *_operator_table(columns), "", *_groups(columns), ""]
        lines += [f"- {row}: {_float_products(values)}" for row, values in columns.items()]
    return "\n".join(lines) + "\n"


def _operator_table(columns: Mapping[str, Any]) -> list[str]:
    most: dict[str, float] = defaultdict(float)
    for values in columns.values():
        for operator, figures in values["operators"].items():
            most[operator] = max(most[operator], figures["ms"])
    shown = [op for op, ms in sorted(most.items(), key=lambda item: -item[1]) if ms >= 0.05]
    lines = [f"| operator | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for operator in shown:
        cells = [_cell(values["operators"].get(operator)) for values in columns.values()]
        lines.append(f"| {operator} | {' | '.join(cells)} |")
    rest = []
    for values in columns.values():
        others = [figures for op, figures in values["operators"].items() if op not in shown]
        rest.append(_cell({"ms": sum(f["ms"] for f in others), "nodes": sum(f["nodes"] for f in others)}))
    lines.append(f"| others | {' | '.join(rest)} |")
    totals = [f"**{values['kernel_ms']:.2f}** ({values['nodes']})" for values in columns.values()]
    lines.append(f"| all | {' | '.join(totals)} |")
    calls = [f"{values['call_ms']:.2f}" for values in columns.values()]
    lines.append(f"| call | {' | '.join(calls)} |")
    return lines


def _groups(columns: Mapping[str, Any]) -> list[str]:
    """Returns products in int8, products in float, conversions, and everything else, in ms."""
    lines = ["| ms | int8 products | float products | Q and DQ | everything else |", "|---|---|---|---|---|"]
    for row, values in columns.items():
        sums = [
            sum(f["ms"] for op, f in values["operators"].items() if op in group)
            for group in (INT8_PRODUCTS, FLOAT_PRODUCTS, CONVERSIONS)
        ]
        other = values["kernel_ms"] - sum(sums)
        lines.append(f"| {row} | {' | '.join(f'{ms:.2f}' for ms in (*sums, other))} |")
    return lines


def _float_products(values: Mapping[str, Any]) -> str:
    left = values["float_products"]
    products = sum(figures["nodes"] for op, figures in values["operators"].items() if op in INT8_PRODUCTS)
    if not left:
        return f"no convolution or matrix product in float, {products} in int8"
    longest = sorted(left, key=lambda name: -left[name])[:6]
    named = ", ".join(f"`{name}` {left[name]:.2f}" for name in longest)
    more = f" and {len(left) - len(longest)} more" if len(left) > len(longest) else ""
    return (
        f"{len(left)} products in float ({sum(left.values()):.2f} ms), {products} in int8; the longest: {named}{more}"
    )


def _cell(figures: Mapping[str, Any] | None) -> str:
    return "" if figures is None or not figures["nodes"] else f"{figures['ms']:.2f} ({figures['nodes']})"


def main() -> None:
    """Profiles the rows that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quant.operators", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: fp32 and every row that replaces all")
    parser.add_argument("--bundle", type=Path, default=Path("build/stickers"), help="the fp32 bundle of stickers")
    options = parser.parse_args()
    write(options.bundle, options.rows)


def write(reference: Path, rows: Sequence[str] = ()) -> None:
    """Writes the page of the named rows, or of fp32 and all whole rows that have been made."""
    cells = Cells(RESULTS / "cells")
    made = WORK / "bundles"
    names = list(rows) or ["fp32", *sorted(p.name for p in made.iterdir() if p.is_dir() and not p.name.startswith("."))]
    profiles = {}
    for name in names:
        folder = reference if name == "fp32" else made / name
        if not folder.is_dir():
            raise BundleError(f"{folder} is missing", hint=f"python -m benchmarks.quant {name}")
        if not name.endswith(".part"):
            profiles[name] = measure(name, Bundle.open(folder), cells)
    (RESULTS / "operators.md").write_text(markdown(profiles), encoding="utf-8")


if __name__ == "__main__":
    from benchmarks.quant import operators  # under its own name: an isolated process cannot import from __main__

    operators.main()

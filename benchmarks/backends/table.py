"""The figures as a page: one table of rows, and for every recipe a matrix of who agrees with whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.backends.rows import ORIGINAL, RECIPES, pictures_of
from fewstep.numerics.metrics import psnr_db
from fewstep.runtimes.executors import NATIVE

PYTORCH = "PyTorch"
Pictures = Mapping[str, npt.NDArray[Any]]


def markdown(figures: Mapping[str, Any], command: str) -> str:
    """Returns the page."""
    rows: list[dict[str, Any]] = sorted(figures["rows"].values(), key=_place)
    lines = [
        "# The built-in generator on every runtime",
        "",
        f"Written by `{command}`, on {_machine(figures['machine'])}.",
        "",
        "*Lowering* is the least SQNR of a network's output, each call fed with the inputs of the PyTorch network that "
        "was compiled; *picture* the mean PSNR of free-running pictures to that network's; *recipe* the mean PSNR of "
        "its pictures to the original's. Whole numbers are judged by their noise floor, not by these "
        "(docs/quantization.md). Milliseconds are of a picture on this machine, one thread; where it was busy they are "
        "not given (`--untimed`). *Time* is that of a picture over ONNX Runtime's in fp32, both drawn "
        "in turn in one process. Emulated times say nothing. *Peak* is the growth of the process from before its "
        "runtime is loaded; ExecuTorch's Python bindings load torch.",
        "",
        "| runtime | recipe | executor | verified | lowering dB | picture dB | recipe dB | MB | ms | time | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in rows if row["error"] is None]
    failed = [row for row in rows if row["error"] is not None]
    if failed:
        lines += ["", "Nothing to measure:", ""]
        lines += [f"- {row['runtime']}, {row['recipe']}, {row['executor']}: {row['error']}" for row in failed]
    lines += ["", "## What ran, and how much of it", ""]
    for row in rows:
        if row["error"] is None:
            lines.append(f"- {row['executor_text']}: {'; '.join(row['notes'])}")
    for recipe in RECIPES:
        lines += _matrix(recipe, rows, figures["agreement"].get(recipe, {}))
    return "\n".join(lines) + "\n"


def agreement(pictures: Sequence[Pictures]) -> list[list[float | None]]:
    """Returns the mean PSNR of the pictures that each two have in common; None where they have none.

    Equal pictures count as 150 dB, beyond float32.
    """
    return [[_agree(a, b) for b in pictures] for a in pictures]


def _agree(a: Pictures, b: Pictures) -> float | None:
    values = [min(psnr_db(a[name], b[name]), 150.0) for name in a if name in b]
    return float(np.mean(values)) if values else None


def _place(row: Mapping[str, Any]) -> tuple[int, str, bool]:
    """Returns what rows are ordered by: recipe, runtime, this machine first."""
    return RECIPES.index(row["recipe"]), row["runtime"], row["executor"] != NATIVE


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB: {versions}"


def measured(rows: Mapping[str, Mapping[str, Any]], work: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the agreement in dB by recipe and by the two that agree, of all whose pictures are in ``work``."""
    golden = work / "-".join(ORIGINAL)
    found: dict[str, dict[str, Pictures]] = {}
    for key, row in sorted(rows.items()):
        path = pictures_of(work, key)
        if row["error"] is None and path.is_file():
            with np.load(path, allow_pickle=False) as stored:
                of_recipe = found.setdefault(row["recipe"], {PYTORCH: _golden(golden)} if golden.is_dir() else {})
                of_recipe[f"{row['runtime']}, {row['executor']}"] = {name: stored[name] for name in stored.files}
    return {
        recipe: {
            a: {b: value for b, value in zip(pictures, values, strict=True) if value is not None}
            for a, values in zip(pictures, agreement(list(pictures.values())), strict=True)
        }
        for recipe, pictures in found.items()
    }


def _matrix(recipe: str, rows: Sequence[dict[str, Any]], agreements: Mapping[str, Mapping[str, float]]) -> list[str]:
    of_recipe = [f"{row['runtime']}, {row['executor']}" for row in rows if row["recipe"] == recipe]
    names = [name for name in (PYTORCH, *of_recipe) if name in agreements]
    if len(names) < 2:
        return []
    lines = ["", f"## Who agrees with whom: {recipe}", "", f"Mean PSNR in dB. {PYTORCH} is the original in float.", ""]
    lines += [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for name in names:
        values = [agreements[name].get(other) for other in names]
        cells = ["" if v is None else "equal" if v == 150.0 else f"{v:.1f}" for v in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _golden(bundle: Path) -> Pictures:
    from fewstep.bundle.samples import load_samples
    from fewstep.runtimes.parity.harness import label

    return {label(sample): sample.output for sample in load_samples(bundle / "golden")}


def _line(row: Mapping[str, Any]) -> str:
    cells = [
        f"{row['runtime']} {row['version']}".strip(),
        row["recipe"],
        row["executor"],
        "yes" if row["passed"] else "**no**",
        _number(row["lowering_db"], 1),
        _number(row["picture_db"], 1),
        _number(row["original_db"], 1),
        _number(row["size_bytes"], 1, 1e6),
        _number(row["latency_ms"], 0),
        _number(row["ratio"], 2),
        _number(row["memory_bytes"], 0, 1e6),
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"

"""The cells as a page: quality, size and speed of every row, and what was promised."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.quant.cells import Cells
from benchmarks.quant.plot import Point
from benchmarks.quant.rows import OURS, PEER, Row

Values = dict[str, Any]
# Peers of up to this many times the size of w8a8 are "at the same size".
SAME_SIZE = 1.15


def points(rows: Sequence[Row], cells: Cells) -> list[Point]:
    """Returns size and PSNR of every row whose components all are the tool's own."""
    found = []
    for row in rows:
        quality, size = _values(cells, "quality", row), _values(cells, "size", row)
        if row.components is None and quality and size and quality["psnr_db"] is not None:
            found.append(Point(row.label, row.kind == OURS, _total(size) / 1e6, quality["psnr_db"]["mean"]))
    return found


DEFAULT_FORM = "default-form"
"""Name of the cell with the sizes of bundles in the form that a build takes by default."""


def markdown(rows: Sequence[Row], cells: Cells, machine: Values) -> str:
    """Returns the page."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# Quantized generators: fewstep and other tools",
        "",
        "The built-in generator at 4 steps, written by `make bench-quant`. 64 held-out prompts x 2 seeds, the same "
        "noise for all; every tool calibrates on the same 32 other prompts, all steps (128 denoiser calls), on the "
        "same ONNX files. PSNR and SSIM are against the fp32 bundle's pictures: mean ± standard deviation over 128 "
        "pictures. Step SQNR: the denoiser's output at each step, given the fp32 bundle's inputs; trajectory: the "
        "latent after each step, free-running.",
        "",
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB; {machine['system']}, "
        f"Python {machine['python']}, {versions}.",
        "",
        "![PSNR against size](psnr-size.svg)",
        "",
        "## What was promised",
        "",
        *(f"- {text}" for text in verdicts(rows, cells)),
        "",
        "## Quality",
        "",
        "| generator | PSNR, dB | least | SSIM | step SQNR, dB | trajectory SQNR, dB | decoder, dB | text encoder, "
        "dB | own | subgroup | Frechet |",
        "|---|" + "---|" * 10,
        *(_quality_row(row, cells) for row in rows),
        "",
        "*own*, *subgroup* and *Frechet* are those of the built-in evaluation, here for these 128 pictures: so few "
        "that Frechet distances compare with each other only.",
        "",
        "## Size and speed in ONNX Runtime",
        "",
        "One thread. Each row is timed in turn with fp32 in one process: medians (10th to 90th percentile) of 50 "
        "calls, 15 pictures; *ratio* is to fp32's median in the same run. Ratios compare between rows; ms do not, on "
        "a machine that other work shares. Memory is what resident memory grows by.",
        "",
        "| generator | files, MB | of fp32 | denoiser, ms | ratio | decoder ratio | text encoder ratio | picture, ms | "
        "ratio | peak memory, MiB |",
        "|---|" + "---|" * 9,
        *(_speed_row(row, rows, cells) for row in rows),
        "",
        "Peers' quantization took (CPU of this machine, shared): "
        + "; ".join(f"{row.name} {seconds:.0f} s" for row, seconds in _seconds(rows, cells))
        + ".",
    ]
    return "\n".join(lines) + "\n"


def verdicts(rows: Sequence[Row], cells: Cells) -> list[str]:
    """Returns what the recipes promised, and whether it is so."""
    qualities = {row.name: q for row in rows if (q := _values(cells, "quality", row))}
    sizes = {row.name: _total(s) for row in rows if (s := _values(cells, "size", row))}
    texts = []
    if "w8a8" in qualities:
        near = [
            row.name
            for row in rows
            if row.kind == PEER
            and row.components is None
            and row.name in qualities
            and sizes[row.name] <= SAME_SIZE * sizes["w8a8"]
        ]
        if near:
            best = max(near, key=lambda name: qualities[name]["psnr_db"]["mean"])
            margin, error = paired(qualities["w8a8"], qualities[best])
            texts.append(
                f"w8a8 at least 3 dB above the best peer at its size ({best}): {margin:+.2f} ± {error:.2f} dB: "
                f"{_kept(margin >= 3)}"
            )
    texts += _at_least(qualities, "w8a8", 30.0) + _at_least(qualities, "w4a8", 25.0)
    if "mixed" in qualities and "w4" in qualities:
        margin, error = paired(qualities["mixed"], qualities["w4"])
        texts.append(f"mixed at 5 bits at least 3 dB above w4: {margin:+.2f} ± {error:.2f} dB: {_kept(margin >= 3)}")
    speed = next((_values(cells, "latency", row) for row in rows if row.name == "w8a8"), None)
    if speed:
        ratio = speed["times"]["denoiser"]["ratio"]
        texts.append(f"one w8a8 denoiser call at most 0.6 of fp32's: {ratio:.3f}: {_kept(ratio <= 0.6)}")
        slower = [name for name, times in speed["times"].items() if times["ratio"] > 1]
        texts.append(f"no w8a8 component slower than fp32: {', '.join(slower) or 'none is'}: {_kept(not slower)}")
    default = cells.read(f"size/{DEFAULT_FORM}")
    if default is not None and "w8a8" in sizes and "fp32" in sizes:
        share, in_step_form = default["values"]["w8a8"] / default["values"]["fp32"], sizes["w8a8"] / sizes["fp32"]
        texts.append(
            f"w8a8 at most 0.27 of fp32's size, as `fewstep build` makes both by default: {share:.4f}: "
            f"{_kept(share <= 0.27)} ({in_step_form:.3f} in step form, where the time path takes part in float)"
        )
    missing = [row.name for row in rows if row.kind == OURS and row.name not in qualities]
    return texts + ([f"without figures, for the reasons in the tables: {', '.join(missing)}"] if missing else [])


def paired(a: Values, b: Values) -> tuple[float, float]:
    """Returns the mean difference of two rows' PSNR, picture by picture, and its standard error, in dB."""
    pairs = zip(a["psnr_db_each"], b["psnr_db_each"], strict=True)
    gaps = [x - y for x, y in pairs if x is not None and y is not None]
    return statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def _at_least(qualities: Values, name: str, limit_db: float) -> list[str]:
    if name not in qualities:
        return []
    value = qualities[name]["psnr_db"]["mean"]
    return [f"{name} at least {limit_db:.0f} dB: {value:.2f}: {_kept(value >= limit_db)}"]


def _quality_row(row: Row, cells: Cells) -> str:
    quality = _values(cells, "quality", row)
    if quality is None:
        return f"| {row.label} | {_why(row, cells)} |" + " |" * 9
    parts, score = quality["component_sqnr_db"], _values(cells, "evaluation", row)
    cells_ = [
        row.label,
        _mean_std(quality["psnr_db"]),
        _number(quality["psnr_db"], "min", 1),
        _number(quality["ssim"], "mean", 4),
        " / ".join(_number(step, "mean", 1) for step in quality["step_sqnr_db"]),
        " / ".join(_number(step, "mean", 1) for step in quality["trajectory_sqnr_db"]),
        _number(parts["decoder"], "mean", 1),
        _number(parts["text_encoder"], "mean", 1),
        *([f"{score['own']:.1%}", f"{score['subgroup']:.1%}", f"{score['frechet']:.2f}"] if score else [""] * 3),
    ]
    return f"| {' | '.join(cells_)} |"


def _speed_row(row: Row, rows: Sequence[Row], cells: Cells) -> str:
    speed, size = _values(cells, "latency", row), _values(cells, "size", row)
    if speed is None or size is None:
        return f"| {row.label} | {_why(row, cells)} |" + " |" * 8
    fp32 = _values(cells, "size", rows[0])
    times = speed["times"]
    cells_ = [
        row.label,
        f"{_total(size) / 1e6:.2f}",
        f"{_total(size) / _total(fp32):.3f}" if fp32 else "",
        _time(times["denoiser"]),
        _ratio(times["denoiser"]),
        _ratio(times["decoder"]),
        _ratio(times["text_encoder"]),
        _time(times["picture"]),
        _ratio(times["picture"]),
        f"{speed['peak_memory_bytes'] / (1 << 20):.0f}",
    ]
    return f"| {' | '.join(cells_)} |"


def _seconds(rows: Sequence[Row], cells: Cells) -> list[tuple[Row, float]]:
    found = []
    for row in rows:
        if row.kind == PEER and row.components is None:
            made = [cells.read(f"make/{row.name}.{part}") for part in ("text_encoder", "denoiser", "decoder")]
            seconds = [cell["values"]["seconds"] for cell in made if cell and "seconds" in cell["values"]]
            if len(seconds) == len(made):
                found.append((row, sum(seconds)))
    return found


def _values(cells: Cells, stage: str, row: Row) -> Values | None:
    cell = cells.read(f"{stage}/{row.name}")
    return None if cell is None or "error" in cell["values"] else dict(cell["values"])


def _why(row: Row, cells: Cells) -> str:
    """Returns why a row has no figures."""
    names = [f"make/{row.name}", f"quality/{row.name}", f"latency/{row.name}"]
    if row.method is not None:
        names = [f"make/{row.method.name}.{part}" for part in ("text_encoder", "denoiser", "decoder")] + names
    for name in names:
        cell = cells.read(name)
        if cell is not None and "error" in cell["values"]:
            text = cell["values"]["error"].splitlines()[0].replace("|", "\\|")
            return f"absent: {text}"
    return "absent: not measured yet"


def _total(size: Values) -> int:
    return sum(size["bytes"].values())


def _mean_std(value: Values | None) -> str:
    return "identical" if value is None else f"{value['mean']:.2f} ± {value['std']:.2f}"


def _number(value: Values | None, which: str, digits: int) -> str:
    return "=" if value is None else f"{value[which]:.{digits}f}"


def _time(times: Values) -> str:
    return f"{times['ms']['median']:.2f} ({times['ms']['low']:.2f} to {times['ms']['high']:.2f})"


def _ratio(times: Values) -> str:
    return f"{times['ratio']:.2f}"


def _kept(kept: bool) -> str:
    return "kept" if kept else "**not kept**"

"""The figures as a page."""

from __future__ import annotations

from typing import Any

_MIB = 1 << 20


def markdown(figures: dict[str, Any]) -> str:
    """Returns the page."""
    lines = [
        "# Static steps",
        "",
        "Written by `python -m benchmarks.static --stickers`.",
        "",
        "## What leaves the loop",
        "",
        "Denoisers of full size, traced without values and specialized for a table of 4 steps. Millions of parameters, "
        "and G multiply-adds of linear layers, convolutions and attention. *Once* runs once for a picture, for all 4 "
        "steps together; *gone* is folded into tables, in thousands of numbers.",
        "",
        "| network | parameters, step form | in every step | once | gone | tables, k | in every step / step form | "
        "G MACs of a step, step form | table form | once |",
        "|---" * 10 + "|",
        *(_counts(case, figure["parts"]) for case, figure in figures["counts"].items()),
    ]
    if "stickers" in figures:
        lines += ["", "## The built-in generator", "", *_stickers(figures["stickers"], figures["machine"])]
    return "\n".join(lines) + "\n"


def _counts(case: str, parts: dict[str, dict[str, int]]) -> str:
    nothing = {"parameters": 0, "tables": 0, "macs": 0}
    was, now, once = parts["step form"], parts["in every step"], parts.get("once for a picture", nothing)
    gone = was["parameters"] - now["parameters"] - once["parameters"]
    cells = [
        case,
        *(f"{value / 1e6:.1f}" for value in (was["parameters"], now["parameters"], once["parameters"], gone)),
        f"{(now['tables'] + once['tables']) / 1e3:.0f}",
        f"{now['parameters'] / was['parameters']:.3f}",
        *(f"{part['macs'] / 1e9:.2f}" for part in (was, now, once)),
    ]
    return f"| {' | '.join(cells)} |"


def _stickers(figures: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    lines = [
        f"ONNX Runtime, fp32, one thread of {machine['processor']}, which was shared: both forms in turns, median "
        "(least) ms of a picture.",
        "",
        "| steps | step form | table form | table / step, medians | least |",
        "|---" * 5 + "|",
    ]
    for steps, forms in figures["picture_ms"].items():
        (step, least_step), (table, least_table) = forms["step"], forms["table"]
        ratios = f"{table / step:.3f} | {least_table / least_step:.3f}"
        lines.append(f"| {steps} | {step} ({least_step}) | {table} ({least_table}) | {ratios} |")
    sizes = {form: sum(found.values()) for form, found in figures["bytes"].items()}
    lines += [
        "",
        f"All components: {sizes['step'] / _MIB:.1f} MiB in step form, {sizes['table'] / _MIB:.1f} MiB in table form "
        f"({sizes['table'] / sizes['step']:.3f}).",
        "",
        "Where the time of a picture goes (table form, default steps, least ms of a call):",
        "",
        "| component | calls | ms | together |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {n} | {ms} | {n * ms:.1f} |" for name, (n, ms) in figures["where_ms"].items()]
    return lines

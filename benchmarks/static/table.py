"""The figures as a page."""

from __future__ import annotations

from typing import Any

from benchmarks.static import latency, memory, step_bits, step_grids, stickers


def markdown(figures: dict[str, Any]) -> str:
    """Returns the page."""
    lines = [
        "# Static steps",
        "",
        "Written by `python -m benchmarks.static --latency --stickers --memory --step-grids --step-bits`.",
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
    parts = {
        "latency": ("Time of networks of full size", lambda f: latency.markdown(f, 4)),
        "stickers": ("The built-in generator", lambda f: stickers.markdown(f, figures["machine"])),
        "memory": ("A graph for each step", memory.markdown),
        "step_grids": ("A grid for each step", step_grids.markdown),
        "step_bits": ("More bits in one step", step_bits.markdown),
    }
    for name, (title, tell) in parts.items():
        if name in figures:
            lines += ["", f"## {title}", "", *tell(figures[name])]
    return "\n".join(lines).rstrip() + "\n"


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

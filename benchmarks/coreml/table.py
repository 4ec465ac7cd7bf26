"""The rows as a page, and as points of a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quant.plot import Point

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One way of compressing, with what was measured; None where nothing was."""

    name: str
    values: Values | None

    @property
    def failed(self) -> str:
        """What stopped it, empty if nothing did."""
        return "not measured yet" if self.values is None else str(self.values.get("error", ""))


def points(rows: Sequence[Row]) -> list[Point]:
    """Returns size and PSNR of every row whose pictures differ from the original's."""
    return [
        Point(row.name, True, _total(row.values) / 1e6, row.values["psnr_db"]["mean"])
        for row in rows
        if row.values is not None and not row.failed and row.values["psnr_db"] and _finite(row.values["psnr_db"])
    ]


def markdown(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """Returns the page."""
    names = ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("coremltools", "torch"))
    plain = next((row for row in rows if row.name == "fp16" and not row.failed), None)
    lines = [
        "# Compression for Core ML",
        "",
        "The built-in generator at 4 steps, compiled for iOS 18 by `python -m benchmarks.coreml` and evaluated from "
        f"its packages ({names}). *PSNR*: mean and least over *pictures* of the compressed network against "
        "the original's, same noise. "
        "*Lowering*: the least SQNR of a network's package against the compressed network in PyTorch, in fp32 "
        "arithmetic and with every result rounded to fp16. *Integers*: the least share of equal values in a quantized "
        "tensor, each operation fed with PyTorch's own. The row fp16 is the network as it was, so it has no PSNR but "
        "that of the picture in fp16.",
        "",
        "![PSNR against size](psnr-size.svg)",
        "",
        "| row | packages, MB | of fp16 | pictures | PSNR, dB | least | lowering, dB | in fp16, dB | "
        "picture in fp16, dB | integers |",
        "|---|" + "---|" * 9,
    ]
    for row in rows:
        if row.failed or row.values is None:
            lines.append(f"| {row.name} | {row.failed} |" + " |" * 8)
            continue
        v, psnr = row.values, row.values["psnr_db"]
        share = "" if plain is None or plain.values is None else f"{_total(v) / _total(plain.values):.3f}"
        mean, least = (_db(psnr["mean"]), _db(psnr["least"])) if psnr else ("", "")
        pictures = str(psnr["pictures"]) if psnr else ""
        figures = [_db(v[key]) for key in ("component_db", "component_fp16_db", "picture_fp16_db")]
        equal = "" if v["equal_integers"] is None else f"{v['equal_integers']:.5f}"
        cells = [row.name, f"{_total(v) / 1e6:.2f}", share, pictures, mean, least, *figures, equal]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _total(values: Values) -> int:
    return sum(values["bytes"].values())


def _finite(psnr: Values) -> bool:
    return math.isfinite(psnr["mean"])


def _db(value: float | None) -> str:
    return "" if value is None else "identical" if math.isinf(value) else f"{value:.1f}"

"""Picture PSNR against size, as an SVG that needs nothing else."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 460, 56, 480, 20, 410
_OURS, _PEERS, _INK, _GRID = "#0b6e4f", "#b4531a", "#222222", "#dddddd"
_SIZES_MB = (5.0, 10.0, 20.0, 50.0)
_STEP_DB = 5.0


@dataclass(frozen=True)
class Point:
    """One generator: whose it is, the size of its files and the mean PSNR of its pictures."""

    label: str
    ours: bool
    size_mb: float
    psnr_db: float


def scatter(points: Sequence[Point]) -> str:
    """Returns the plot: size on a logarithmic axis, one numbered mark for each generator, names in the key.

    fp32 has no point: its pictures are the reference.
    """
    svg = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {_WIDTH} {_HEIGHT}",
            "font-family": "sans-serif",
            "font-size": "11",
        },
    )
    _add(svg, "title", {}, "Picture PSNR against size")
    _add(svg, "rect", {"width": str(_WIDTH), "height": str(_HEIGHT), "fill": "white"})
    values = [p.psnr_db for p in points] or [0.0]
    low = _STEP_DB * math.floor(min(values) / _STEP_DB)
    high = _STEP_DB * (math.floor(max(values) / _STEP_DB) + 1)

    def x(size_mb: float) -> float:
        share = math.log(size_mb / _SIZES_MB[0]) / math.log(_SIZES_MB[-1] / _SIZES_MB[0])
        return _LEFT + share * (_RIGHT - _LEFT)

    def y(psnr_db: float) -> float:
        return _BOTTOM - (psnr_db - low) / (high - low) * (_BOTTOM - _TOP)

    for k in range(round((high - low) / _STEP_DB) + 1):
        value = low + k * _STEP_DB
        _line(svg, _LEFT, y(value), _RIGHT, y(value))
        _text(svg, _LEFT - 6, y(value) + 4, f"{value:.0f}", anchor="end")
    for size in _SIZES_MB:
        _line(svg, x(size), _TOP, x(size), _BOTTOM)
        _text(svg, x(size), _BOTTOM + 16, f"{size:.0f}", anchor="middle")
    _text(svg, (_LEFT + _RIGHT) / 2, _BOTTOM + 36, "size of all components, MB", anchor="middle")
    _text(svg, _LEFT, _TOP - 7, "picture PSNR against fp32, dB")
    for number, point in enumerate(sorted(points, key=lambda p: (-p.psnr_db, p.label)), start=1):
        colour = _OURS if point.ours else _PEERS
        fill = colour if point.ours else "white"
        place = {"cx": f"{x(point.size_mb):.1f}", "cy": f"{y(point.psnr_db):.1f}"}
        mark = _add(svg, "circle", {**place, "r": "4", "fill": fill, "stroke": colour, "stroke-width": "1.5"})
        _add(mark, "title", {}, f"{point.label}: {point.size_mb:.1f} MB, {point.psnr_db:.1f} dB")
        # Numbers alternate between the sides, so that neighbours of about the same value can be read.
        beside, anchor = (7, "start") if number % 2 else (-7, "end")
        _text(svg, x(point.size_mb) + beside, y(point.psnr_db) + 4, str(number), anchor=anchor, colour=colour)
        row = _TOP + 8 + 17 * (number - 1)
        _text(svg, _RIGHT + 42, row, f"{number}", anchor="end", colour=colour)
        _text(svg, _RIGHT + 50, row, f"{point.label} ({point.size_mb:.1f} MB, {point.psnr_db:.1f} dB)", colour=colour)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _add(parent: ElementTree.Element, tag: str, attributes: dict[str, str], text: str = "") -> ElementTree.Element:
    element = ElementTree.SubElement(parent, tag, attributes)
    element.text = text or None
    return element


def _line(svg: ElementTree.Element, x1: float, y1: float, x2: float, y2: float) -> None:
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    _add(svg, "line", {**ends, "stroke": _GRID})


def _text(
    svg: ElementTree.Element, x: float, y: float, text: str, *, anchor: str = "start", colour: str = _INK
) -> None:
    _add(svg, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": colour}, text)

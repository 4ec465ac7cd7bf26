"""Pictures and captions of the stickers data set, read from a font and from Unicode's own tables.

Pictures: the bitmaps of Noto Color Emoji (its ``CBDT`` table; licence OFL-1.1). Names, groups and subgroups:
``emoji-test.txt``; keywords: CLDR ``annotations/en.xml`` (Unicode licence v3). All three are Debian packages:
``fonts-noto-color-emoji``, ``unicode-data``, ``unicode-cldr-core``.
"""

from __future__ import annotations

import io
import random
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
ANNOTATIONS = (
    Path("/usr/share/unicode/cldr/common/annotations/en.xml"),
    Path("/usr/share/unicode/cldr/common/annotationsDerived/en.xml"),
)
PICTURE_SIZE = 64

_SKIN_TONES = {chr(c) for c in range(0x1F3FB, 0x1F400)}
_VARIATION_SELECTOR = "\ufe0f"
_LINE = re.compile(r"^([0-9A-F ]+?)\s*;\s*fully-qualified\s*#\s*\S+\s+E[\d.]+\s+(.+)$")


@dataclass(frozen=True)
class Sticker:
    """One picture of the data set: its text, its place in Unicode's groups, and its pixels."""

    text: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    pixels_HWC: np.ndarray
    """uint8 [64, 64, 3], on white."""


def read_stickers(size: int = PICTURE_SIZE) -> list[Sticker]:
    """Returns every emoji without a skin tone that the font can draw, in the order of ``emoji-test.txt``."""
    from fontTools.ttLib import TTFont

    keywords = _read_keywords()
    draw = _GlyphPictures(TTFont(FONT), size)
    stickers = []
    group = subgroup = ""
    for line in EMOJI_TEST.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.removeprefix("# subgroup:").strip()
        elif match := _LINE.match(line):
            text = "".join(chr(int(code, 16)) for code in match[1].split())
            if _SKIN_TONES & set(text):
                continue
            pixels = draw(text)
            if pixels is not None:
                bare = text.replace(_VARIATION_SELECTOR, "")
                stickers.append(Sticker(text, match[2], keywords.get(bare, ()), group, subgroup, pixels))
    return stickers


def caption(sticker: Sticker, rng: random.Random) -> str:
    """Returns one training caption: the name, the name with keywords, or keywords alone."""
    if not sticker.keywords:
        return sticker.name
    kind = rng.random()
    if kind < 0.8:
        return sticker.name
    chosen = rng.sample(sticker.keywords, k=min(len(sticker.keywords), rng.randint(1, 3)))
    if kind < 0.95:
        return " ".join([sticker.name, *chosen])
    return " ".join(chosen)


def _read_keywords() -> dict[str, tuple[str, ...]]:
    keywords = {}
    for path in ANNOTATIONS:
        for node in ElementTree.parse(path).iter("annotation"):
            if node.get("type") is None and node.text:
                words = tuple(word.strip() for word in node.text.split("|"))
                keywords[node.attrib["cp"].replace(_VARIATION_SELECTOR, "")] = words
    return keywords


class _GlyphPictures:
    """Draws an emoji sequence: its glyph by cmap and ligature substitution, its bitmap by CBDT."""

    def __init__(self, font: Any, size: int) -> None:
        self._cmap = font.getBestCmap()
        self._bitmaps = font["CBDT"].strikeData[0]
        self._size = size
        self._ligatures: dict[tuple[str, ...], str] = {}
        for lookup in font["GSUB"].table.LookupList.Lookup:
            for table in lookup.SubTable:
                table = getattr(table, "ExtSubTable", table)
                if table.LookupType == 4:
                    for first, entries in table.ligatures.items():
                        for entry in entries:
                            self._ligatures[(first, *entry.Component)] = entry.LigGlyph

    def __call__(self, text: str) -> np.ndarray | None:
        for sequence in (text, text.replace(_VARIATION_SELECTOR, "")):
            glyphs = tuple(self._cmap.get(ord(c), "") for c in sequence)
            glyph = glyphs[0] if len(glyphs) == 1 else self._ligatures.get(glyphs)
            if glyph in self._bitmaps:
                return self._pixels(self._bitmaps[glyph].imageData)
        return None

    def _pixels(self, png: bytes) -> np.ndarray:
        from PIL import Image

        picture = Image.open(io.BytesIO(png)).convert("RGBA")
        side = max(picture.size)
        canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return np.asarray(canvas.convert("RGB").resize((self._size, self._size), Image.Resampling.LANCZOS))

"""The same emoji in other styles: vector sets from npm packages, their captions, and compositions that are held out.

Every set is an Iconify package: ``icons.json`` with the drawings, ``chars.json`` from code points to their names,
``info.json`` with author and licence. Sets whose licence asks that what is derived from them carries the same licence
(OpenMoji, CC BY-SA 4.0) are left out: the weights memorise, and are under the licence of the font.

A caption names the object and, for a set, its style ("red apple, flat"). For some objects one style is never trained
on (`held_out`): whether text composes is measured there, on a style and an object that were only seen apart.

``python -m fewstep.stickers.sets`` fetches the packages, at fixed versions, into ``build/stickers-sets``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.errors import SourceError
from fewstep.stickers.data import Sticker, caption, read_stickers
from fewstep.stickers.variant import Variant, variant

FOLDER = Path(os.environ.get("STICKERS_SETS", "build/stickers-sets"))
HELD_OUT_SHARE = 0.05
"""The share of objects of which one style is held out: about 90 compositions, a standard error of 5 points."""
PLAIN_SHARE = 0.5
"""How often a caption of the font's own images says its style: those of the other sets always do."""


@dataclass(frozen=True)
class EmojiSet:
    """One npm package of emoji drawings, pinned, and the words that captions call its style."""

    package: str
    version: str
    sha512: str
    """As npm's registry states it (base64 of the archive's digest)."""
    licence: str
    styles: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The folder that the package is unpacked to."""
        return FOLDER / self.package.rpartition("/")[2]


SETS = (
    EmojiSet(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        ("flat",),
    ),
    EmojiSet(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        ("soft flat", "fluent"),
    ),
    EmojiSet(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT",
        ("black and white", "high contrast"),
    ),
)
FONT_STYLES = ("glossy", "noto")
"""What captions may call the style of the font's own images."""


@dataclass(frozen=True)
class StyledSticker:
    """One image of the data set with the words for its style, none where the data set has one style."""

    sticker: Sticker
    styles: tuple[str, ...]
    licence: str
    held_out: bool


def styled_stickers(stickers: Sequence[Sticker], sets: Sequence[EmojiSet] = SETS) -> list[StyledSticker]:
    """Returns the font's images and those of each set that draws the same emoji, in the order of ``stickers``.

    Raises:
        SourceError: a package is not there, or is under another licence than the one recorded here.
    """
    # All images of one set have the size of the font's.
    drawn = [(each, SetImages(each, stickers[0].pixels_HWC.shape[0])) for each in sets]
    found = []
    for sticker in stickers:
        found.append(StyledSticker(sticker, FONT_STYLES, "OFL-1.1", held_out=False))
        images = [(each, draw(sticker.text)) for each, draw in drawn]
        present = [(each, pixels) for each, pixels in images if pixels is not None]
        withheld = held_out(sticker.name, [each.package for each, _ in present])
        for each, pixels in present:
            other = Sticker(
                sticker.text, sticker.name, sticker.keywords, sticker.group, sticker.subgroup, pixels_HWC=pixels
            )
            found.append(StyledSticker(other, each.styles, each.licence, held_out=each.package == withheld))
    return found


def training_images(chosen: Variant | None = None) -> list[StyledSticker]:
    """Returns the images that a variant trains on: those of the font, or of the font and all sets less the held out."""
    chosen = chosen or variant()
    stickers = read_stickers(chosen.size)
    if not chosen.styles:
        return [StyledSticker(sticker, (), "OFL-1.1", held_out=False) for sticker in stickers]
    return [styled for styled in styled_stickers(stickers) if not styled.held_out]


def held_out(name: str, packages: Sequence[str]) -> str | None:
    """Returns the set of which the object of a name is held out, or None for most; the same on every machine.

    An object that only one set draws stays: it would have been seen in no style but the font's.
    """
    digest = hashlib.sha256(name.encode()).digest()
    if len(packages) < 2 or digest[0] >= HELD_OUT_SHARE * 256:
        return None
    return sorted(packages)[digest[1] % len(packages)]


def styled_caption(styled: StyledSticker, rng: random.Random) -> str:
    """Returns one training caption: that of the object, then the style, which the font's own may leave out."""
    words = caption(styled.sticker, rng)
    if not styled.styles:
        return words
    if styled.styles == FONT_STYLES and rng.random() < PLAIN_SHARE:
        return words
    return f"{words}, {rng.choice(styled.styles)}"


class SetImages:
    """Draws the emoji of one set on white, uint8 [size, size, 3]."""

    def __init__(self, emoji_set: EmojiSet, size: int) -> None:
        """Reads the package.

        Raises:
            SourceError: it is not there, or its licence is not the recorded one.
        """
        info = _read(emoji_set, "info.json")
        if info["license"]["spdx"] != emoji_set.licence:
            raise SourceError(
                f"{emoji_set.package}: the licence is {info['license']['spdx']}, expected {emoji_set.licence}",
                hint="leave the set out, or record its licence in apps/stickers/sets.py and NOTICE",
            )
        self._icons = _read(emoji_set, "icons.json")
        self._names = {_bare(code): name for code, name in _read(emoji_set, "chars.json").items()}
        self._size = size

    def __call__(self, text: str) -> np.ndarray | None:
        """Returns the image of an emoji sequence, or None where the set has none."""
        name = self._names.get(_bare("-".join(f"{ord(c):x}" for c in text)))
        if name is None:
            return None
        icon = self._icons["icons"].get(name) or self._icons["icons"][self._icons["aliases"][name]["parent"]]
        width = icon.get("width", self._icons.get("width", 16))
        height = icon.get("height", self._icons.get("height", 16))
        return render(icon["body"], width, height, self._size)


def render(body: str, width: int, height: int, size: int) -> np.ndarray:
    """Returns SVG drawing instructions on white, uint8 [size, size, 3], the view box centred in the square."""
    import resvg_py
    from PIL import Image

    side = max(width, height)
    box = f"{(width - side) / 2:g} {(height - side) / 2:g} {side} {side}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000"'
        f' viewBox="{box}" width="{4 * size}" height="{4 * size}">{body}</svg>'
    )
    # Four times too large, then reduced as the font's bitmaps are: the renderer's own edges are harder.
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
    canvas.alpha_composite(image)
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def fetch(emoji_set: EmojiSet) -> None:
    """Downloads a package with npm, checks its digest, and unpacks it; does nothing where it is there.

    Raises:
        SourceError: npm is missing or fails, or the archive is not the recorded one.
    """
    if (emoji_set.path / "info.json").is_file():
        return
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError(
            "npm is not installed", hint="install Node, or unpack the package into " + str(emoji_set.path)
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = f"{emoji_set.package}@{emoji_set.version}"
    done = subprocess.run([npm, "pack", "--silent", wanted], cwd=FOLDER, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SourceError(
            f"npm pack {wanted} failed: {done.stderr.strip()}", hint="check the network and npm's registry"
        )
    archive = FOLDER / done.stdout.split()[-1]
    unpack(archive, emoji_set)
    archive.unlink()


def unpack(archive: Path, emoji_set: EmojiSet) -> None:
    """Unpacks the files that are read from a package's archive.

    Raises:
        SourceError: the archive's digest is not the recorded one.
    """
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != emoji_set.sha512:
        raise SourceError(f"{archive.name}: the digest is {digest}, expected {emoji_set.sha512}")
    emoji_set.path.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        # info.json last: its presence says that the folder is complete.
        for name in ("icons.json", "chars.json", "info.json"):
            member = tar.extractfile(f"package/{name}")
            assert member is not None
            (emoji_set.path / name).write_bytes(member.read())


def _read(emoji_set: EmojiSet, name: str) -> Any:
    path = emoji_set.path / name
    if not path.is_file():
        raise SourceError(f"{path} is missing", hint="run python -m fewstep.stickers.sets")
    return json.loads(path.read_text(encoding="utf-8"))


def _bare(codes: str) -> str:
    """Returns code points without variation selectors, which sets write or leave out."""
    return "-".join(code for code in codes.split("-") if code != "fe0f")


def main() -> None:
    """Fetches every set and says what it holds."""
    for emoji_set in SETS:
        fetch(emoji_set)
    styled = styled_stickers(read_stickers(variant().size))
    for emoji_set in SETS:
        count = sum(s.styles == emoji_set.styles for s in styled)
        print(f"{emoji_set.package} {emoji_set.version}: {count} images, {emoji_set.licence}", file=sys.stderr)
    print(f"{sum(s.held_out for s in styled)} of {len(styled)} images are held out", file=sys.stderr)


if __name__ == "__main__":
    main()

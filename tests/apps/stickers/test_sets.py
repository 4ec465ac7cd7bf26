"""Sets of emoji in other styles: what is downloaded is what was recorded, and what is held out stays so."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewstep.errors import SourceError
from fewstep.stickers import sets
from fewstep.stickers.data import Sticker
from fewstep.stickers.sets import EmojiSet, StyledSticker, held_out, styled_caption, styled_stickers, unpack

RED = '<path fill="red" d="M0 0h16v16H0z"/>'
BLUE = '<path fill="#00f" d="M0 0h16v16H0z"/>'


def _set(package: str, body: str, **info: object) -> tuple[EmojiSet, bytes]:
    """Returns a set of one red-apple icon and its archive, as npm packs it."""
    files = {
        "icons.json": {"icons": {"red-apple": {"body": body}}, "width": 16, "height": 16},
        "chars.json": {"1f34e": "red-apple"},
        "info.json": {"license": {"spdx": "MIT"}, **info},
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    archive = buffer.getvalue()
    digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    return EmojiSet(f"@test/{package}", "1.0.0", digest, "MIT", (package,)), archive


def _apple(name: str = "red apple") -> Sticker:
    return Sticker("\U0001f34e\ufe0f", name, (), "Food", "food-fruit", np.full((8, 8, 3), 255, np.uint8))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sets, "FOLDER", tmp_path)
    return tmp_path


def _unpacked(folder: Path, package: str, body: str, **info: object) -> EmojiSet:
    emoji_set, archive = _set(package, body, **info)
    (folder / f"{package}.tgz").write_bytes(archive)
    unpack(folder / f"{package}.tgz", emoji_set)
    return emoji_set


def test_each_set_gives_its_own_image_of_the_same_emoji(folder: Path) -> None:
    pytest.importorskip("resvg_py")
    chosen = [_unpacked(folder, "flat", RED), _unpacked(folder, "outline", BLUE)]
    found = styled_stickers([_apple()], chosen)
    assert [s.styles for s in found] == [sets.FONT_STYLES, ("flat",), ("outline",)]
    assert found[1].sticker.pixels_HWC[4, 4].tolist() == [255, 0, 0]
    assert found[2].sticker.pixels_HWC[4, 4].tolist() == [0, 0, 255]


def test_archive_of_another_digest_is_refused(folder: Path) -> None:
    emoji_set, archive = _set("flat", RED)
    (folder / "flat.tgz").write_bytes(archive[:-1] + bytes([archive[-1] ^ 1]))
    with pytest.raises(SourceError, match=r"the digest is .*, expected"):
        unpack(folder / "flat.tgz", emoji_set)
    assert not emoji_set.path.exists()


def test_set_of_another_licence_is_refused(folder: Path) -> None:
    emoji_set = _unpacked(folder, "flat", RED, license={"spdx": "CC-BY-SA-4.0"})
    with pytest.raises(SourceError, match=r"the licence is CC-BY-SA-4.0, expected MIT"):
        styled_stickers([_apple()], [emoji_set])


def test_set_that_was_not_fetched_is_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"info\.json is missing"):
        styled_stickers([_apple()], [replace(_set("flat", RED)[0])])


def test_held_out_share_is_the_stated_one_and_one_style_of_each() -> None:
    chosen = [held_out(f"name {i}", ["a", "b", "c"]) for i in range(4000)]
    share = sum(c is not None for c in chosen) / len(chosen)
    # Three standard errors of a share of 5 % of 4,000 names.
    assert share == pytest.approx(sets.HELD_OUT_SHARE, abs=0.011)
    assert set(chosen) == {None, "a", "b", "c"}
    assert [held_out(f"name {i}", ["c", "a", "b"]) for i in range(4000)] == chosen


def test_object_of_one_set_is_never_held_out() -> None:
    assert {held_out(f"name {i}", ["a"]) for i in range(1000)} == {None}


def test_captions_of_other_sets_always_say_the_style_and_those_of_the_font_half_the_time() -> None:
    rng = random.Random(0)
    flat = StyledSticker(_apple(), ("flat", "plain"), "MIT", held_out=False)
    assert {styled_caption(flat, rng) for _ in range(50)} == {"red apple, flat", "red apple, plain"}
    font = [
        styled_caption(StyledSticker(_apple(), sets.FONT_STYLES, "OFL-1.1", held_out=False), rng) for _ in range(400)
    ]
    assert sum(text == "red apple" for text in font) / 400 == pytest.approx(0.5, abs=0.1)
    assert styled_caption(StyledSticker(_apple(), (), "OFL-1.1", held_out=False), rng) == "red apple"

"""The built-in generator: 64x64 pictures in the style of emoji, from a prompt, in one to eight steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.stickers.prompts import CALIBRATION_PROMPTS, PROMPTS

if TYPE_CHECKING:
    from fewstep.export import Generator

WEIGHTS = Path(__file__).resolve().parent / "weights"
# In the middle of the scales that the student was distilled with.
GUIDANCE = 3.0
LICENCES = {
    "weights": "SIL Open Font License 1.1, as derived from the training pictures, which the network memorises",
    "training pictures": "Noto Color Emoji, SIL Open Font License 1.1, Copyright Google LLC",
    "training captions": "Unicode emoji-test.txt and CLDR annotations, Unicode License v3, Copyright Unicode, Inc.",
}


def generator() -> Generator:
    """Returns the generator of the committed weights."""
    from fewstep.bundle.source import SourceInfo
    from fewstep.export.source.load import from_folder  # needs torch, which importing fewstep does not

    loaded = from_folder(WEIGHTS)
    source = SourceInfo("stickers", "built-in", loaded.source.sha256)
    return replace(
        loaded,
        name="stickers",
        source=source,
        guidance=GUIDANCE,
        default_steps=4,
        prompts=PROMPTS,
        calibration_prompts=CALIBRATION_PROMPTS,
        licences=LICENCES,
    )

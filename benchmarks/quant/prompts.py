"""The prompts: those that every tool calibrates on, and those that every result is judged on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from fewstep.errors import SourceError

FOLDER = Path(__file__).parent / "prompts"
CALIBRATION, HELD_OUT = FOLDER / "calibration.txt", FOLDER / "held-out.txt"
CALIBRATION_COUNT, HELD_OUT_COUNT = 32, 64
# Noise of the calibration samples: seeds that no judged picture has.
CALIBRATION_SEED = 1 << 20
HELD_OUT_SEEDS = (0, 1)


def read_prompts(path: Path) -> list[str]:
    """Returns the prompts of a text file, one a line."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line]


def choose() -> tuple[list[str], list[str]]:
    """Returns the calibration prompts and the held-out prompts.

    Held-out prompts are the first captions of the built-in evaluation; calibration prompts are drawn from the names
    that the built-in evaluation does not use at all.
    """
    from fewstep.stickers.data import read_stickers
    from fewstep.stickers.evaluate import CAPTION_COUNT, fixed_captions

    stickers = read_stickers()
    evaluated = fixed_captions(stickers, CAPTION_COUNT)
    judged = {stickers[i].pixels_HWC.tobytes() for i in evaluated}
    others = [s.name for s in stickers if s.pixels_HWC.tobytes() not in judged]
    calibration = random.Random(CALIBRATION_COUNT).sample(others, k=CALIBRATION_COUNT)
    return calibration, [stickers[i].name for i in evaluated[:HELD_OUT_COUNT]]


def check_disjoint(calibration: Sequence[str], held_out: Sequence[str]) -> None:
    """Raises SourceError if a prompt is judged that something was calibrated on."""
    common = sorted(set(calibration) & set(held_out))
    if common:
        raise SourceError(
            f"{len(common)} prompts are both calibrated on and judged: {', '.join(common[:3])}",
            hint="take them out of one of the two files in benchmarks/quant/prompts",
        )


def main() -> None:
    """Writes both files again."""
    FOLDER.mkdir(exist_ok=True)
    for path, prompts in zip((CALIBRATION, HELD_OUT), choose(), strict=True):
        path.write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

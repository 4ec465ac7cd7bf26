"""The prompts: those that every tool calibrates on, and those that every result is judged on."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.calibration.samplers import prompt_order
from fewstep.errors import SourceError
from fewstep.recipe.quantization import Quantization
from fewstep.stickers.prompts import CALIBRATION_PROMPTS, HELD_OUT_PROMPTS

STEPS = 4
_COUNT, _SEED = Quantization().samples, Quantization().seed
# Those that fewstep's own recipes draw from the generator's list.
_ORDER = prompt_order(_COUNT, len(CALIBRATION_PROMPTS), STEPS, seed=_SEED, in_order=False)
CALIBRATION = tuple(CALIBRATION_PROMPTS[i] for i in _ORDER)
HELD_OUT = HELD_OUT_PROMPTS
HELD_OUT_SEEDS = (0, 1)
# Noise of the calibration samples: seeds that no judged picture has.
CALIBRATION_SEED = 1 << 20


def held_out_requests(prompts: Sequence[str] = HELD_OUT) -> list[tuple[str, int]]:
    """Returns every prompt with every seed that results are judged on."""
    return [(prompt, seed) for prompt in prompts for seed in HELD_OUT_SEEDS]


def check_disjoint(calibration: Sequence[str], held_out: Sequence[str]) -> None:
    """Raises SourceError if a prompt is judged that something was calibrated on."""
    common = sorted(set(calibration) & set(held_out))
    if common:
        raise SourceError(
            f"{len(common)} prompts are both calibrated on and judged: {', '.join(common[:3])}",
            hint="take them out of one of the two lists",
        )

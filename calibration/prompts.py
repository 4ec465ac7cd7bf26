"""Which texts a calibration runs with."""

from __future__ import annotations

from pathlib import Path

from fewstep.bundle.contract import TEXT
from fewstep.errors import CalibrationError
from fewstep.export import Generator

# For generators that bring none of their own: things, places, people, styles, long and short, with and without text.
GENERAL_PROMPTS = (
    "a glass of orange juice beside a croissant",
    "portrait of a young woman with freckles, soft window light",
    "a steam train crossing a stone bridge in the mountains",
    "three penguins walking on ice",
    "an empty street at night after rain, neon signs reflected in puddles",
    "close-up of a dragonfly on a blade of grass",
    "a watercolour painting of a harbour town",
    "a red bicycle leaning against a blue wall",
    "a plate of spaghetti with tomatoes and basil, from above",
    "an old lighthouse in a storm, dramatic clouds",
    "a group of children playing football on a beach",
    "pencil sketch of an old oak tree",
    "a golden retriever puppy asleep on a sofa",
    "interior of a modern library with tall windows",
    "a hot air balloon over green hills at dawn",
    "a shop sign that reads bakery",
    "a wooden chess set on a table, shallow depth of field",
    "an astronaut's glove holding a small plant",
    "a snowy village with lit windows at dusk",
    "a black and white photograph of a jazz trio on a stage",
    "a bowl of blueberries",
    "a knight in shining armour standing in a field of poppies",
    "isometric drawing of a small workshop",
    "a tropical fish in a coral reef",
    "hands kneading dough on a floured table",
    "a skyscraper seen from below, blue sky",
    "an oil painting of a stormy sea in heavy brush strokes",
    "a cactus in a yellow pot",
    "a tram in a city street on an autumn day, fallen leaves",
    "a robot watering flowers in a greenhouse",
    "pattern of overlapping circles in pastel colours",
    "a mountain lake with perfect reflections, no wind, early morning, very wide view",
)


def calibration_prompts(generator: Generator) -> tuple[str, ...]:
    """Returns the generator's own calibration prompts, or general ones that it is not checked with."""
    if not any(spec.kind == TEXT for spec in generator.inputs):
        return ("",)
    return generator.calibration_prompts or tuple(p for p in GENERAL_PROMPTS if p not in generator.prompts)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Returns the prompts of a text file, one on each line; empty lines are skipped, repeated ones count once.

    Raises:
        CalibrationError: the file cannot be read, is not UTF-8 or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{path} cannot be read as a list of prompts: {error}", hint="give a UTF-8 text file, one prompt on a line"
        ) from error
    prompts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise CalibrationError(f"{path} holds no prompt, expected one on each line")
    return prompts

"""Which orderings of the papers hold on our generator: calibration, ranges, rounding, mixed precision, corrections.

    python -m benchmarks.quant.orderings [ORDERING ...]

Each variant is a recipe: a preset with some keys changed. It is built once and compared with the fp32 bundle on the
held-out prompts; orderings share variants. Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 4


@dataclass(frozen=True)
class Variant:
    """One way of quantizing.

    Attributes:
        name: unique; names its files.
        base: the preset that it changes.
        changes: keys of the recipe's ``[quantization]`` table.
        steps: N that it is calibrated for and judged at.
        size_of: another variant, whose size in bytes becomes ``max_bytes``.
        form: of the networks of the loop; None is the step form, which is told of every call that was recorded.
        missing: why it cannot be made; None if it can.
    """

    name: str
    base: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    size_of: str | None = None
    form: str | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Claim:
    """That pictures of one variant are nearer to fp32's than those of another, and who says so."""

    better: str
    worse: str
    source: str


@dataclass(frozen=True)
class Ordering:
    """A question, and the claims that answer it."""

    name: str
    question: str
    claims: tuple[Claim, ...]


_PTQ4DM = "Shang et al. (2023), arXiv:2211.15736"
_Q_DIFFUSION = "Li et al. (2023), arXiv:2302.04304"
_TFMQ = "Huang et al. (2024), arXiv:2311.16503"
_EDA = "Liu et al. (2024), arXiv:2401.04585"
_PTQD = "He et al. (2023), arXiv:2305.10657"
_MIXDQ = "Zhao et al. (2024), arXiv:2405.17873"
_ADAROUND = "Nagel et al. (2020), arXiv:2004.10568"

_CALIBRATION = ("first", "qsample", "random", "single", "uniform", "ndtc", "tdac")
_RANGES = ("lp", "minmax", "kl", "cosine", "l1")
_COUNTS = (1, 2, 4, 8)
# What all others change one key of; written out, so that another default of the preset changes no claim.
_W8A8: Mapping[str, Any] = {"sampler": "own", "ranges": "mse", "rounding": "gptq", "correction": False}


def _variants() -> dict[str, Variant]:
    listed = [
        Variant("w8a8-4", "w8a8", _W8A8),
        *(Variant(f"calibration-{name}", "w8a8", {**_W8A8, "sampler": name}) for name in _CALIBRATION),
        *(Variant(f"ranges-{name}", "w8a8", {**_W8A8, "ranges": name}) for name in _RANGES),
        *(Variant(f"w4-{name}", "w4", {"rounding": name}) for name in ("nearest", "gptq", "adaround")),
        *(Variant(f"w4a8-{name}", "w4a8", {"rounding": name}) for name in ("nearest", "gptq", "adaround")),
        Variant("mixed-as-w4", "w4", {"rounding": "gptq"}, size_of="w4-gptq"),
        *(Variant(f"w4a8-{n}", "w4a8", steps=n) for n in _COUNTS),
        *(Variant(f"corrected-{n}", "w4a8", {"correction": True}, steps=n) for n in _COUNTS),
        # Networks in step form do not know which step it is.
        *(
            Variant(f"steps-{grids}", "w8a8", {**_W8A8, "step_grids": grids}, form="table")
            for grids in ("shared", "grouped", "each")
        ),
        Variant("time-exact", "w4", {"exact_time": True}),
        Variant("time-quantized", "w4", {"exact_time": False}),
        *(Variant(f"float-{share:g}", "w8a8", {**_W8A8, "float_products": share}) for share in (0.05, 0.2)),
        Variant("split-off", "w8a8", {**_W8A8, "split": False}),
    ]
    return {variant.name: variant for variant in listed}


VARIANTS = _variants()

ORDERINGS = (
    Ordering(
        "calibration source",
        "Do the generator's own trajectories calibrate better than other inputs?",
        (
            Claim("w8a8-4", "calibration-first", "what deployable tools do, see docs"),
            Claim("w8a8-4", "calibration-qsample", _PTQ4DM),
            Claim("calibration-qsample", "calibration-random", _PTQ4DM),
        ),
    ),
    Ordering(
        "time steps",
        "Which steps of the trajectory are worth keeping?",
        (
            Claim("w8a8-4", "calibration-single", _PTQ4DM),
            Claim("calibration-uniform", "calibration-single", _PTQ4DM),
            Claim("calibration-ndtc", "calibration-uniform", _PTQ4DM),
            Claim("calibration-uniform", "calibration-ndtc", _Q_DIFFUSION),
            Claim("calibration-tdac", "calibration-uniform", _EDA),
        ),
    ),
    Ordering(
        "range metric",
        "Which measure should choose a tensor's range?",
        (
            Claim("w8a8-4", "ranges-minmax", _PTQ4DM),
            Claim("ranges-lp", "ranges-minmax", _PTQ4DM),
            Claim("w8a8-4", "ranges-cosine", _PTQ4DM),
            Claim("ranges-cosine", "ranges-kl", _PTQ4DM),
            Claim("ranges-kl", "ranges-l1", _PTQ4DM),
        ),
    ),
    Ordering(
        "rounding at 4 bits",
        "Does learned rounding of weights beat nearest?",
        (
            Claim("w4-adaround", "w4-nearest", _ADAROUND),
            Claim("w4-gptq", "w4-nearest", "Frantar et al. (2023), arXiv:2210.17323"),
            Claim("w4a8-adaround", "w4a8-nearest", _Q_DIFFUSION),
            Claim("w4a8-gptq", "w4a8-nearest", "Frantar et al. (2023), arXiv:2210.17323"),
        ),
    ),
    Ordering(
        "ranges for each step",
        "Is a range for each step better than one for all?",
        (Claim("steps-each", "steps-shared", _TFMQ), Claim("steps-each", "steps-grouped", _TFMQ)),
    ),
    Ordering(
        "time path",
        "Does an exact time path matter?",
        (Claim("time-exact", "time-quantized", f"{_TFMQ}; {_MIXDQ} finds few-step networks insensitive"),),
    ),
    Ordering(
        "split shortcuts",
        "Should the two halves of a concatenation have grids of their own?",
        (Claim("w8a8-4", "split-off", _Q_DIFFUSION),),
    ),
    Ordering(
        "mixed precision",
        "Does the integer program beat uniform bits at equal size?",
        (Claim("mixed-as-w4", "w4-gptq", _MIXDQ),),
    ),
    Ordering(
        "activations",
        "Does it help to compute the most sensitive 5 % (20 %) of the products in float?",
        (Claim("float-0.05", "w8a8-4", _MIXDQ), Claim("float-0.2", "float-0.05", _MIXDQ)),
    ),
    Ordering(
        "output correction",
        "Does the closed-form correction of the output help, and at which step counts?",
        tuple(Claim(f"corrected-{n}", f"w4a8-{n}", f"{_PTQD}, N = {n}") for n in _COUNTS),
    ),
)


def main() -> None:
    """Measures the orderings that the command line names."""
    from benchmarks.quant.variants import measure_orderings

    known = {ordering.name: ordering for ordering in ORDERINGS}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quant.orderings", description=__doc__)
    parser.add_argument("orderings", nargs="*", metavar="ORDERING", help=f"of {', '.join(known)}; all by default")
    parser.add_argument(
        "--bundle", type=Path, default=Path("build/stickers-step"), help="stickers in fp32 and step form"
    )
    parser.add_argument("--table-only", action="store_true", help="write the table of what has been measured")
    parser.add_argument("--missing", action="store_true", help="keep what an earlier state of the code measured")
    options = parser.parse_args()
    if unknown := set(options.orderings) - known.keys():
        parser.error(f"unknown orderings: {', '.join(sorted(unknown))}")
    chosen = [known[name] for name in options.orderings or known]
    measure_orderings(chosen, VARIANTS, options.bundle, table_only=options.table_only, missing=options.missing)


if __name__ == "__main__":
    main()

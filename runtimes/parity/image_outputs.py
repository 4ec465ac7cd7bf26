"""Compares pictures of 8 bits, level by level: what a decoder gives that ends in an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from fewstep.bundle.contract import OutputSpec
from fewstep.bundle.samples import Sample
from fewstep.numerics.outputs import to_levels
from fewstep.runtimes.base import Session
from fewstep.runtimes.parity.harness import LOWERING_FP16, Check, label

# The limit of a component in fp16 is 50 dB: an error of 0.2 levels in a picture of usual contrast. A level that is off
# by two or more needs an error of more than one, five times that.
NEAR = 0.999
# Errors of rounding cancel in the mean. Levels that are truncated instead are 0.5 below.
CENTRED = 0.75


def compare_levels(
    samples: Iterable[Sample],
    session: Callable[[str], Session],
    component: str,
    picture: OutputSpec,
    *,
    limited: bool = True,
) -> list[Check]:
    """Returns the checks of a component that ends in an image, fed with the reference's own inputs.

    Args:
        samples: the recorded references.
        session: opens a component.
        component: the one whose outputs are images.
        picture: how its outputs become levels.
        limited: whether the checks have limits, or only inform.
    """
    checks = []
    for sample in samples:
        for feed in (f for f in sample.feeds if f.component == component):
            results = session(component).run(feed.inputs)
            for name, reference in feed.outputs.items():
                off = to_levels(results[name], picture).astype(np.int16) - to_levels(reference, picture)
                found = {
                    "share of levels off by 1 at most": (float(np.mean(np.abs(off) <= 1)), NEAR),
                    "1 - |mean difference| in levels": (1 - abs(float(off.mean())), CENTRED),
                }
                checks += [
                    Check(
                        LOWERING_FP16,
                        "component",
                        component,
                        feed.step,
                        label(sample),
                        name,
                        metric,
                        value,
                        limit if limited else None,
                    )
                    for metric, (value, limit) in found.items()
                ]
    return checks

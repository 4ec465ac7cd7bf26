"""How near a bundle's pictures and network calls are to those of the fp32 bundle, from the same noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quant.reference import draw
from fewstep.bundle.bundle import Bundle
from fewstep.bundle.samples import Sample, load_samples
from fewstep.runtimes.parity.harness import Check, compare_components, compare_samples
from fewstep.runtimes.sampling.sampler import open_sampler


def measure(bundle: str, reference: str, pictures: str) -> dict[str, Any]:
    """Returns `compare`, and saves the pictures for `benchmarks.quant.evaluation`."""
    found, results = compare(bundle, reference)
    Path(pictures).parent.mkdir(parents=True, exist_ok=True)
    stacked = np.stack([s.picture_HWC for s in results])
    np.savez(pictures, pictures=stacked, prompts=np.array([s.prompt for s in results]))
    return found


def compare(bundle: str, reference: str) -> tuple[dict[str, Any], list[Sample]]:
    """Returns how near a bundle's pictures are to the reference's, and the pictures.

    dB as numbers, ``null`` where two results are identical:

    - ``psnr_db``, ``ssim``: pictures, free-running, against the reference's; ``psnr_db_each`` lists them, so that two
      bundles can be compared picture by picture;
    - ``step_sqnr_db``: the denoiser's output at each step, given the reference's inputs;
    - ``trajectory_sqnr_db``: the latent after each step, free-running;
    - ``component_sqnr_db``: the outputs of the other components, given the reference's inputs.

    What is given the reference's inputs is left out where the bundle's networks are in another form, and take others.
    """
    opened = Bundle.open(bundle)
    references = load_samples(Path(reference))
    sampler = open_sampler(opened, threads=1)
    results = draw(sampler, opened, [(r.prompt, r.seed) for r in references], references[0].steps)
    fits = _takes(opened, references[0])
    calls = compare_components(references, sampler.session, lambda _: None) if fits else []  # nothing is gated here
    sampler.close()
    free = compare_samples(references, results, None)
    others = [c.component for c in calls if c.component != "denoiser"]
    each = [c.value for c in free if c.metric == "PSNR dB"]
    return {
        "pictures": len(results),
        "psnr_db_each": [None if math.isinf(value) else round(value, 3) for value in each],
        "psnr_db": spread(each),
        "ssim": spread(c.value for c in free if c.metric == "SSIM"),
        "step_sqnr_db": _by_step(calls, "component"),
        "trajectory_sqnr_db": _by_step(free, "trajectory"),
        "component_sqnr_db": {
            name: spread(c.value for c in calls if c.component == name) for name in dict.fromkeys(others)
        },
    }, results


def _takes(bundle: Bundle, sample: Sample) -> bool:
    """Returns whether a bundle's networks take the calls that were recorded of a sample."""
    given = {feed.component: {*feed.inputs} for feed in sample.feeds}
    return given == {name: {x.name for x in spec.inputs} for name, spec in bundle.manifest.components.items()}


def spread(values: Iterable[float]) -> dict[str, float | int] | None:
    """Returns mean, standard deviation, least value and 10th percentile; None if all are infinite (identical).

    Some infinite values among finite ones are left out of the mean and counted as ``identical``.
    """
    listed = list(values)
    finite = [v for v in listed if v != math.inf]
    if not finite:
        return None
    return {
        "mean": round(statistics.fmean(finite), 4),
        "std": round(statistics.pstdev(finite), 4),
        "min": round(min(finite), 4),
        "p10": round(float(np.percentile(finite, 10)), 4),
        "identical": len(listed) - len(finite),
    }


def _by_step(checks: Sequence[Check], level: str) -> list[dict[str, float | int] | None]:
    chosen = [c for c in checks if c.level == level and c.component == "denoiser" and c.step is not None]
    steps = sorted({c.step for c in chosen if c.step is not None})
    return [spread(c.value for c in chosen if c.step == k) for k in steps]

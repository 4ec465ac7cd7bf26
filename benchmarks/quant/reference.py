"""Pictures of the fp32 bundle, which all others are compared with, and the network calls that peers calibrate on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.quant.prompts import CALIBRATION_SEED, STEPS, held_out_requests
from fewstep.bundle.bundle import Bundle
from fewstep.bundle.samples import Sample, save_samples
from fewstep.runtimes.sampling.sampler import Sampler, open_sampler

ALL, FIRST = "all", "first"


def draw(sampler: Sampler, bundle: Bundle, requests: Iterable[tuple[str, int]], steps: int = STEPS) -> list[Sample]:
    """Returns a bundle's samples of (prompt, seed)."""
    schedule = bundle.manifest.schedule(steps)
    return [sampler(prompt, seed, schedule) for prompt, seed in requests]


def record_reference(bundle: str, prompts: Sequence[str], out: str, steps: int = STEPS) -> None:
    """Writes the fp32 samples of the held-out prompts, with every network call."""
    opened = Bundle.open(bundle)
    sampler = open_sampler(opened, threads=1)
    samples = draw(sampler, opened, held_out_requests(prompts), steps)
    sampler.close()
    save_samples(samples, Path(out), with_feeds=len(samples))


def record_calls(bundle: str, prompts: Sequence[str], out: str) -> None:
    """Writes ``all/<component>.npz`` and ``first/<component>.npz``: what peers calibrate on.

    Each array has the calls along its first axis, in the order in which the pipeline makes them. ``first`` has the
    first call of every component for every prompt: of the denoiser's calls those at the first step.
    """
    opened = Bundle.open(bundle)
    sampler = open_sampler(opened, threads=1)
    samples = draw(sampler, opened, [(p, CALIBRATION_SEED + i) for i, p in enumerate(prompts)])
    sampler.close()
    for which in (ALL, FIRST):
        folder = Path(out) / which
        folder.mkdir(parents=True)
        for component in opened.manifest.components:
            feeds = [f for s in samples for f in s.feeds if f.component == component]
            chosen = [f for f in feeds if which == ALL or not f.step]
            arrays = {name: np.stack([f.inputs[name] for f in chosen]) for name in chosen[0].inputs}
            np.savez(folder / f"{component}.npz", **arrays)

"""The pictures of a bundle in Python, for the tests of the web app."""

from __future__ import annotations

import json

from safetensors.numpy import save_file

from fewstep.bundle.bundle import Bundle
from fewstep.runtimes.sampling.sampler import open_sampler


def write(bundle: str, out: str, *, prompts: int = 8, seeds: int = 2) -> None:
    """Writes the pictures of the bundle's prompts as safetensors, by number, with what they are of."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    schedule = manifest.schedule(manifest.default_steps)
    pictures, cases = {}, []
    sampler = open_sampler(opened)
    for prompt in manifest.prompts[:prompts]:
        for seed in range(seeds):
            pictures[str(len(cases))] = sampler(prompt, seed, schedule).output
            cases.append({"prompt": prompt, "seed": str(seed)})
    sampler.close()
    worst = manifest.artifact("onnxruntime", "denoiser")
    head = {"cases": cases, "precision": f"{worst.weights} weights, {worst.compute} compute"}
    save_file(pictures, out, metadata={"fewstep": json.dumps(head)})

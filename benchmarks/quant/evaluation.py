"""Retrieval and Frechet distance of the built-in evaluation, for the pictures of all rows at once.

Encoding the data set takes most of the time, so it is done once for all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fewstep.stickers.evaluate import Gallery, load_student_pipeline
from fewstep.stickers.package import FOLDER
from fewstep.stickers.sets import training_images


def evaluate(pictures: Mapping[str, str], steps: int) -> dict[str, dict[str, float]]:
    """Returns the scores of each row, by name, of the pictures that `benchmarks.quant.quality.measure` saved.

    Args:
        pictures: file of each row: ``pictures`` float32 [B, H, W, C] in [0, 1] and ``prompts``, names of stickers.
        steps: N of the sampler.
    """
    torch.set_num_threads(1)
    gallery = Gallery(training_images(), load_student_pipeline(FOLDER).vae)
    places = {gallery.stickers[i].name: i for i in gallery.plain}
    found = {}
    for row, path in pictures.items():
        with np.load(Path(path), allow_pickle=False) as saved:
            images_BHWC, prompts = torch.from_numpy(saved["pictures"]), [str(p) for p in saved["prompts"]]
        images = images_BHWC.permute(0, 3, 1, 2).contiguous() * 2 - 1
        score = gallery.score(row, steps, [places[prompt] for prompt in prompts], images, 0.0)
        found[row] = {"own": score.own, "subgroup": score.subgroup, "frechet": score.frechet}
    return found

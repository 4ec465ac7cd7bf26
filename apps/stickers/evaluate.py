"""Measures how well teacher and student draw what a caption names: retrieval, a Frechet distance, picture grids.

The features of a picture are its latents (the autoencoder's encoding, 16x16x4 numbers at unit spread). For 300 fixed
captions, all of them names of the font's images, a sampler's picture is encoded and the nearest of all training
pictures found:

- ``own``: it is the caption's own (or one that equals it pixel for pixel: France has the same flag as Clipperton);
- ``subgroup``: it is of the same Unicode subgroup, e.g. "food-fruit";
- ``frechet``: the distance between the Gaussians of the sampler's and of all training features (Heusel et al. (2017),
  arXiv:1706.08500), after a projection on the first 64 principal components of the training features, since 300
  pictures cannot fill a covariance of 1024 dimensions. So few pictures bias it: compare rows, the ``data`` row first.

The ``data`` row is the captions' own training pictures through the autoencoder: the best that any sampler can do.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, LatentConsistencyModelPipeline
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from fewstep.errors import SourceError
from fewstep.stickers.autoencoder import as_tensor
from fewstep.stickers.compositions import (
    Composition,
    CompositionScore,
    colour_compositions,
    score_compositions,
    style_compositions,
)
from fewstep.stickers.data import read_stickers
from fewstep.stickers.distill import Teacher, guide, load_teacher
from fewstep.stickers.package import FOLDER, load_final_autoencoder
from fewstep.stickers.sets import FONT_STYLES, StyledSticker, styled_stickers, training_images
from fewstep.stickers.teacher import Captions, make_scheduler
from fewstep.stickers.training import WORK
from fewstep.stickers.variant import variant

CAPTION_COUNT = 300
TEACHER_STEPS = 25
STUDENT_STEPS = (1, 2, 4, 8)
COMPOSERS = (("teacher", TEACHER_STEPS), ("student", 4))
"""The samplers that the composition test is run on: it needs captions of its own."""
COMPONENTS = 64
BATCH = 25
GRID_ROWS = 16
OTHER_CAPTIONS = (
    "fruit",
    "a smiling cat",
    "bird blue",
    "red flower",
    "sad",
    "music",
    "a house in the snow",
    "robot with a heart",
    "green car",
    "flag: red and yellow",
    "ninja eating pizza",
    "purple elephant",
)
"""Captions that are no picture's name: keywords, and things the data set does not have."""


class Sampler(Protocol):
    """Draws pictures, float32 [B, 3, 64, 64] in [-1, 1], for captions; one seed for each."""

    def __call__(self, captions: list[str], seeds: list[int]) -> Tensor:
        """Returns one picture for each caption."""
        ...


@dataclass(frozen=True)
class Score:
    """One row of the evaluation."""

    sampler: str
    steps: int
    own: float
    subgroup: float
    frechet: float
    seconds_per_picture: float


class StudentSampler:
    """The packaged pipeline, as a user runs it."""

    def __init__(self, pipeline: LatentConsistencyModelPipeline, steps: int, guidance: float) -> None:
        self._pipeline, self._steps, self._guidance = pipeline, steps, guidance

    def __call__(self, captions: list[str], seeds: list[int]) -> Tensor:
        """Returns one picture for each caption."""
        images: Tensor = self._pipeline(
            captions,
            num_inference_steps=self._steps,
            guidance_scale=self._guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
        return images * 2 - 1


class TeacherSampler:
    """The teacher with classifier-free guidance, DPM-Solver++ 2M (Lu et al. (2022), arXiv:2211.01095)."""

    def __init__(self, teacher: Teacher, autoencoder: AutoencoderTiny, steps: int, guidance: float) -> None:
        self._teacher, self._autoencoder, self._steps, self._guidance = teacher, autoencoder, steps, guidance
        self._scheduler = DPMSolverMultistepScheduler.from_config(make_scheduler().config)
        self._tokens = Captions()

    @torch.no_grad()
    def __call__(self, captions: list[str], seeds: list[int]) -> Tensor:
        """Returns one picture for each caption, from the noise the student would get."""
        ids = self._tokens([*captions, *[""] * len(captions)])
        text = self._teacher.text_encoder(ids).last_hidden_state
        config = self._teacher.unet.config
        shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
        x = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        w = torch.full((len(captions),), self._guidance)
        self._scheduler.set_timesteps(self._steps)
        for t in self._scheduler.timesteps:
            v = self._teacher.unet(torch.cat([x, x]), t, text).sample
            x = self._scheduler.step(guide(v[: len(x)], v[len(x) :], w), t, x).prev_sample
        decoded: Tensor = self._autoencoder.decode(x / self._teacher.latent_factor).sample
        return decoded.clamp(-1, 1)


class Gallery:
    """The training pictures and their features, to compare a sampler's pictures with."""

    def __init__(self, images: Sequence[StyledSticker], autoencoder: AutoencoderTiny) -> None:
        self.stickers = stickers = [image.sticker for image in images]
        self.plain = [i for i, image in enumerate(images) if image.styles in ((), FONT_STYLES)]
        """The font's images, whose names are captions of their own."""
        self.pixels = as_tensor(stickers)
        self._autoencoder = autoencoder
        self._features_PD = self.features(self.pixels)
        self._mean_D = self._features_PD.mean(axis=0)
        # Rows of `axes` are the principal components, in the order of their variance.
        _, _, axes = np.linalg.svd(self._features_PD - self._mean_D, full_matrices=False)
        self._axes_KD = axes[:COMPONENTS]
        self._equal = [s.pixels_HWC.tobytes() for s in stickers]

    @torch.no_grad()
    def features(self, pixels: Tensor) -> NDArray[np.float64]:
        """Returns the latents of pictures [B, 3, 64, 64], float64 [B, 1024]."""
        factor = self._autoencoder.config["scaling_factor"]
        z = torch.cat([self._autoencoder.encode(part).latents for part in pixels.split(64)])
        return (z * factor).flatten(1).double().numpy()

    def nearest(self, features_BD: NDArray[np.float64]) -> list[int]:
        """Returns the index of the training picture at the least Euclidean distance from each row."""
        squares = (self._features_PD**2).sum(axis=1)
        distance_BP = squares - 2 * features_BD @ self._features_PD.T
        return [int(i) for i in distance_BP.argmin(axis=1)]

    def retrieval(self, indices: Sequence[int], features_BD: NDArray[np.float64]) -> tuple[float, float]:
        """Returns the shares of pictures that are nearest to their own training picture, and to one of its subgroup."""
        found = list(zip(indices, self.nearest(features_BD), strict=True))
        own = sum(self._equal[i] == self._equal[j] for i, j in found)
        subgroup = sum(self.stickers[i].subgroup == self.stickers[j].subgroup for i, j in found)
        return own / len(found), subgroup / len(found)

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Returns pictures after encoding and decoding, float32 [B, 3, 64, 64]."""
        decoded: Tensor = self._autoencoder.decode(self._autoencoder.encode(pixels).latents).sample
        return decoded.clamp(-1, 1)

    def score(self, sampler: str, steps: int, indices: Sequence[int], images: Tensor, seconds: float) -> Score:
        """Returns the scores of one sampler's pictures for the captions at ``indices``."""
        features = self.features(images)
        return Score(sampler, steps, *self.retrieval(indices, features), self.frechet(features), seconds)

    def composition(self, kind: str, compositions: Sequence[Composition], sampler: Sampler) -> CompositionScore:
        """Returns how often a sampler composes what the captions ask for."""
        images = draw(sampler, [c.caption for c in compositions])
        return score_compositions(
            compositions,
            kind=kind,
            trained=self.stickers,
            features_PD=self._features_PD,
            features=lambda stickers: self.features(as_tensor(stickers)),
            results_BD=self.features(images),
        )

    def frechet(self, features_BD: NDArray[np.float64]) -> float:
        """Returns the Frechet distance to all training pictures, in 64 principal components."""
        project = [(f - self._mean_D) @ self._axes_KD.T for f in (features_BD, self._features_PD)]
        return frechet_distance(*project)


def frechet_distance(a_NK: NDArray[np.float64], b_MK: NDArray[np.float64]) -> float:
    """Returns |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of the Gaussians of two samples."""
    mean_gap = a_NK.mean(axis=0) - b_MK.mean(axis=0)
    cov_a, cov_b = np.cov(a_NK, rowvar=False), np.cov(b_MK, rowvar=False)
    # tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2): no square root of an unsymmetric matrix.
    roots = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False)
    return float(mean_gap @ mean_gap + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    rooted: NDArray[np.float64] = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return rooted


def fixed_captions(plain: Sequence[int], limit: int) -> list[int]:
    """Returns the indices of the images whose names are the captions: a prefix of a fixed choice of 300.

    ``plain`` has the indices of the font's images: the same names whatever other sets are in the gallery.
    """
    return random.Random(300).sample(plain, k=CAPTION_COUNT)[:limit]


def compositions() -> dict[str, list[Composition]]:
    """Returns the held-out compositions by kind: colours for every variant, styles where they were trained on."""
    chosen = variant()
    stickers = read_stickers(chosen.size)
    found = {"colour": colour_compositions(stickers)}
    if chosen.styles:
        found["style"] = style_compositions(styled_stickers(stickers))
    return found


def draw(sampler: Sampler, captions: list[str]) -> Tensor:
    """Returns a sampler's pictures for captions, float32 [B, 3, 64, 64]; caption k has seed 1000 + k."""
    parts = []
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        parts.append(sampler(part, [1000 + start + i for i in range(len(part))]))
    return torch.cat(parts)


def save_grid(path: Path, names: list[str], columns: dict[str, Tensor], *, scale: int = 1) -> None:
    """Writes a PNG: a row for each caption, a column for each sampler, headings above and captions at the left."""
    side = scale * next(iter(columns.values())).shape[-1]
    cell, left, top = side + 4, 190, 18
    font = ImageFont.load_default(size=11)
    sheet = Image.new("RGB", (left + cell * len(columns), top + cell * len(names)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        pen.text((4, top + row * cell + cell // 2 - 6), name if len(name) <= 32 else name[:31] + "…", "black", font)
    for column, (heading, images) in enumerate(columns.items()):
        pen.text((left + column * cell, 2), heading, "black", font)
        for row in range(len(names)):
            pixels = images[row].clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + column * cell, top + row * cell))
    sheet.save(path)


def load_student_pipeline(folder: Path) -> LatentConsistencyModelPipeline:
    """Returns the packaged pipeline in float32, without progress bars."""
    pipeline = LatentConsistencyModelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_samplers(
    pipeline: LatentConsistencyModelPipeline | None,
    teacher: Teacher | None,
    *,
    guidance: float,
    student_steps: Sequence[int] = STUDENT_STEPS,
) -> tuple[dict[tuple[str, int], Sampler], AutoencoderTiny]:
    """Returns the samplers by name and steps, and the autoencoder they share (the pipeline's, where there is one)."""
    if pipeline is not None:
        autoencoder = pipeline.vae
    elif teacher is not None:
        autoencoder = load_final_autoencoder(teacher.latent_factor)
    else:
        raise SourceError("there is neither a student nor a teacher to evaluate", hint="run make stickers-train")
    samplers: dict[tuple[str, int], Sampler] = {}
    if teacher is not None:
        samplers["teacher", TEACHER_STEPS] = TeacherSampler(teacher, autoencoder, TEACHER_STEPS, guidance)
    if pipeline is not None:
        samplers |= {("student", steps): StudentSampler(pipeline, steps, guidance) for steps in student_steps}
    return samplers, autoencoder


def compose(samplers: dict[tuple[str, int], Sampler], gallery: Gallery) -> list[dict[str, object]]:
    """Returns the composition scores of the samplers that take the test, as the report has them, and prints them."""
    rows: list[dict[str, object]] = []
    for kind, asked in compositions().items():
        for name, steps in COMPOSERS:
            if (name, steps) not in samplers:
                continue
            result = gallery.composition(kind, asked, samplers[name, steps])
            shares = f"object {result.object:.1%}, both {result.both:.1%}"
            print(f"{name} {steps}: {result.count} captions with a held-out {kind}: {shares}")
            rows.append({"sampler": name, "steps": steps} | asdict(result))
    return rows


def evaluate(
    samplers: dict[tuple[str, int], Sampler], gallery: Gallery, out: Path, *, limit: int, guidance: float
) -> list[Score]:
    """Returns the scores of every sampler; writes ``evaluation.json``, ``grid-names.png`` and ``grid-others.png``."""
    out.mkdir(parents=True, exist_ok=True)
    indices = fixed_captions(gallery.plain, limit)
    names = [gallery.stickers[i].name for i in indices]
    columns, others = {"picture": gallery.pixels[indices]}, {}
    reconstructed = gallery.reconstruct(columns["picture"])
    scores = [gallery.score("data", 0, indices, reconstructed, 0.0)]
    for (name, steps), sampler in samplers.items():
        started = time.perf_counter()
        images = draw(sampler, names)
        seconds = (time.perf_counter() - started) / len(names)
        scores.append(gallery.score(name, steps, indices, images, seconds))
        columns[f"{name} {steps}"] = images
        others[f"{name} {steps}"] = draw(sampler, list(OTHER_CAPTIONS))
    composed = compose(samplers, gallery)
    save_grid(out / "grid-names.png", names[:GRID_ROWS], columns)
    save_grid(out / "grid-others.png", list(OTHER_CAPTIONS), others)
    report: dict[str, object] = {"captions": len(names), "guidance": guidance, "rows": [asdict(row) for row in scores]}
    report["reconstruction_psnr_db"] = -10 * float(torch.log10(F.mse_loss(reconstructed, columns["picture"]) / 4))
    report["compositions"] = composed
    (out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    return scores


def main() -> None:
    """Runs the evaluation from the command line; the table goes to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the packaged generator")
    parser.add_argument("--teacher-only", action="store_true", help="leave the student out (before it exists)")
    parser.add_argument("--steps", type=int, nargs="+", default=STUDENT_STEPS, help="steps of the student")
    parser.add_argument("--out", type=Path, default=Path("build/stickers-eval"))
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--limit", type=int, default=CAPTION_COUNT, help="use only the first captions")
    options = parser.parse_args()
    teacher = None
    if (WORK / "teacher.pt").exists():
        teacher = load_teacher()
    else:
        print(f"no teacher rows: {WORK / 'teacher.pt'} is missing", file=sys.stderr)
    pipeline = None if options.teacher_only else load_student_pipeline(options.folder)
    samplers, autoencoder = make_samplers(pipeline, teacher, guidance=options.guidance, student_steps=options.steps)
    gallery = Gallery(training_images(), autoencoder)
    scores = evaluate(samplers, gallery, options.out, limit=options.limit, guidance=options.guidance)
    print("sampler  steps    own  subgroup  frechet  s/picture")
    for s in scores:
        shares = f"{s.own:6.1%}   {s.subgroup:6.1%}"
        print(f"{s.sampler:8} {s.steps:4}  {shares}  {s.frechet:7.2f}  {s.seconds_per_picture:9.3f}")


if __name__ == "__main__":
    main()

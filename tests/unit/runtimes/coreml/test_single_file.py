"""One Core ML package that samples: its picture is the stepwise one, its weights are there once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

import fewstep
from fewstep.errors import BundleError
from fewstep.pipeline import stages
from fewstep.progress import Silent
from fewstep.runtimes.coreml.mil import open_package
from tests.support import tiny

pytest.importorskip("coremltools")


@functools.cache
def bundle(recipe: str) -> fewstep.Bundle:
    """Returns the bundle of a tiny generator for Core ML; tests must not change it."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-coreml-loop-"))
    source = str(tiny.turbo_folder(folder / "source"))
    options = fewstep.Options(prompts=1, seeds=1, cache_root=folder / "cache", profile=False)
    return fewstep.build(source, recipe, ("coreml",), folder / "bundle", steps=[1, 4], options=options)


def same_picture(recipe: str, steps: int, path: Path) -> int:
    """Checks a package of a bundle, and returns the bytes of its weights."""
    made = stages.loop(bundle(recipe), path, steps=steps, runtime=None, progress=Silent())
    assert made.output_psnr_db >= 100  # the same operations: only the sampler's sums are the package's own
    program = open_package(path)
    names = {feature.name for feature in program.inputs[program.default]}
    assert {"tokens_tokenizer", "noise_0"} <= names
    assert [feature.name for feature in program.outputs[program.default]] == ["picture"]
    return (path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size


def test_one_package_draws_the_same_and_has_its_weights_once(tmp_path: Path) -> None:
    one, four = (same_picture("fp32", n, tmp_path / f"{n}.mlpackage") for n in (1, 4))
    assert one == four > 100_000


@pytest.mark.slow
def test_a_package_in_halves(tmp_path: Path) -> None:
    assert same_picture("fp16", 4, tmp_path / "x.mlpackage") > 50_000


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"expected a name in \.mlpackage"):
        stages.loop(bundle("fp32"), tmp_path / "x.onnx", steps=1, runtime=None, progress=Silent())
    (tmp_path / "x.mlpackage").mkdir()
    with pytest.raises(BundleError, match="exists"):
        stages.loop(bundle("fp32"), tmp_path / "x.mlpackage", steps=1, runtime=None, progress=Silent())

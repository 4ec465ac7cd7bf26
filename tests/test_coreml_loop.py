"""One Core ML package that samples: its picture is the stepwise one, its weights are there once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

import fewstep
from fewstep import stages
from fewstep.errors import BundleError
from fewstep.progress import Silent
from fewstep.runtimes.mil import open_package
from tests.bundles import plain_generator
from tests.quantized import painter

pytest.importorskip("coremltools")


@functools.cache
def bundle(recipe: str) -> fewstep.Bundle:
    """Returns a small bundle for Core ML; tests must not change it."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-coreml-loop-"))
    options = fewstep.Options(prompts=1, seeds=1, cache_root=folder / "cache", profile=False)
    generator = painter() if recipe == "fp32" else plain_generator()
    return fewstep.build(generator, recipe, ("coreml",), folder / "bundle", steps=[1, 2, 4], options=options)


@pytest.mark.parametrize(("recipe", "steps"), [("fp32", 4), ("fp16", 2)])
def test_same_picture_from_one_package(recipe: str, steps: int, tmp_path: Path) -> None:
    made = stages.loop(bundle(recipe), tmp_path / "x.mlpackage", steps=steps, runtime=None, progress=Silent())
    assert made.output_psnr_db >= 100  # the same operations: only the sampler's sums are the package's own
    program = open_package(tmp_path / "x.mlpackage")
    names = [feature.name for feature in program.inputs[program.default]]
    assert "noise_0" in names and "input_class_label" in names
    assert [feature.name for feature in program.outputs[program.default]] == ["picture"]


def test_weights_are_stored_once(tmp_path: Path) -> None:
    sizes = []
    for steps in (1, 4):
        made = stages.loop(
            bundle("fp32"), tmp_path / f"{steps}.mlpackage", steps=steps, runtime=None, progress=Silent()
        )
        sizes.append((made.path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size)
    assert sizes[0] == sizes[1] > 100_000


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"expected a name in \.mlpackage"):
        stages.loop(bundle("fp32"), tmp_path / "x.onnx", steps=1, runtime=None, progress=Silent())
    (tmp_path / "x.mlpackage").mkdir()
    with pytest.raises(BundleError, match="exists"):
        stages.loop(bundle("fp32"), tmp_path / "x.mlpackage", steps=1, runtime=None, progress=Silent())

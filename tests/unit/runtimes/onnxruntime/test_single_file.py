"""One ONNX file that samples: its picture is the stepwise one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

import fewstep
from fewstep.bundle.manifest import Manifest
from fewstep.bundle.tiles import Tiles
from fewstep.errors import ContractError, ParityError, RuntimeMissingError
from fewstep.pipeline import stages
from fewstep.progress import Silent
from fewstep.runtimes.sampling.single_file import loop_feeds
from fewstep.runtimes.sampling.unrolled_graph import check_unrolls
from tests.support.bundles import STEPS, built, plain, plain_generator


@pytest.mark.parametrize("kind", ["lcm", "turbo"])
@pytest.mark.parametrize("steps", STEPS)
def test_same_picture_from_one_file(kind: str, steps: int, tmp_path: Path) -> None:
    made = stages.loop(built(kind).bundle, tmp_path / "x.onnx", steps=steps, runtime=None, progress=Silent())
    assert made.output_psnr_db >= 100  # the same kernels: only the sampler's sums are ONNX Runtime's own
    onnx.checker.check_model(str(tmp_path / "x.onnx"))


def test_weights_are_stored_once(tmp_path: Path) -> None:
    bundle = built("lcm").bundle
    one, four = (
        stages.loop(bundle, tmp_path / f"{n}.onnx", steps=n, runtime=None, progress=Silent()).bytes for n in (1, 4)
    )
    # Steps are calls of one function; a copy of these tiny weights for each would be megabytes.
    assert four - one < 50_000


def test_a_generator_without_a_prompt(tmp_path: Path) -> None:
    made = stages.loop(plain(), tmp_path / "x.onnx", steps=2, runtime=None, progress=Silent())
    assert made.output_psnr_db >= 100


def test_weights_beside_the_components_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.runtimes.onnxruntime.compile.lower._ONE_FILE_BYTES", 0)
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    bundle = fewstep.build(plain_generator(), out=tmp_path / "bundle", options=options)
    assert [*bundle.path.glob("onnxruntime/*/model.onnx.data")]
    made = stages.loop(bundle, tmp_path / "one" / "x.onnx", steps=2, runtime=None, progress=Silent())
    assert made.output_psnr_db >= 100
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["x.onnx"]


def test_weights_of_a_large_loop_keep_their_place_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.runtimes.onnxruntime.compile.single_file._ONE_FILE_BYTES", 0)
    made = stages.loop(plain(), tmp_path / "x.onnx", steps=2, runtime=None, progress=Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.onnx", "x.onnx.data"]
    assert made.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    onnx.checker.check_model(str(tmp_path / "x.onnx"))  # it looks for the weights where the graph says


def test_a_file_that_draws_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_noise(*arguments: Any) -> dict[str, Any]:
        return {name: -array if name == "noise_0" else array for name, array in loop_feeds(*arguments).items()}

    monkeypatch.setattr("fewstep.runtimes.sampling.single_file.loop_feeds", other_noise)
    with pytest.raises(ParityError, match="one file of 2 steps draws a picture at"):
        stages.loop(built("turbo").bundle, tmp_path / "x.onnx", steps=2, runtime=None, progress=Silent())
    assert list(tmp_path.iterdir()) == []


def test_two_passes_are_refused(tmp_path: Path) -> None:
    bundle = built("turbo").bundle
    contract = bundle.manifest.contract
    guided = replace(contract, guidance=replace(contract.guidance, kind="two_pass", scale=2.0))
    changed = replace(bundle, manifest=replace(bundle.manifest, contract=guided))
    with pytest.raises(ContractError, match="guided with two passes"):
        stages.loop(changed, tmp_path / "x.onnx", steps=1, runtime=None, progress=Silent())


def test_other_runtimes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeMissingError, match="litert has no file that samples on its own"):
        stages.loop(built("turbo").bundle, tmp_path / "x", steps=1, runtime="litert", progress=Silent())


def test_a_component_in_tiles_is_refused() -> None:
    manifest = built("turbo").bundle.manifest
    decoder = manifest.components["decoder"]
    latent = decoder.inputs[0].shape[2]

    def tiled(size: int) -> Manifest:
        tiles = Tiles(size=size, stride=size, scale=2, blend=0, keep=2 * size)
        return replace(manifest, components={**manifest.components, "decoder": replace(decoder, tiles=tiles)})

    check_unrolls(tiled(latent))
    with pytest.raises(ContractError, match=r"runs its decoder in tiles, .*\n\nhint: build it without --decoder-tile"):
        check_unrolls(tiled(latent // 2))

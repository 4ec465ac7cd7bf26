"""Generators whose steps call different networks: a large one first and a small one last, for instance."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.bundle.contract import LATENT
from fewstep.errors import BundleError, ExportError
from fewstep.export import Generator, describe
from fewstep.pipeline import stages
from fewstep.progress import Silent
from tests.support.zoo.nets import TimeUNet

SHAPE = (1, 4, 8, 8)


def network(seed: int) -> TimeUNet:
    torch.manual_seed(seed)
    return TimeUNet(4, 4, scale=0.01).eval()


class Renamed(nn.Module):
    """Takes the latent by another name than the network whose place it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network(2)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(z, t=t))


def relay(nets: Any, inputs: Any, *, steps: int, guidance: float, noise: Any) -> Tensor:
    """The first network in all steps but the last one."""
    x = noise(SHAPE)
    for k in range(steps):
        net = nets["denoiser" if k < steps - 1 or steps == 1 else "denoiser_last"]
        x = x - net(x, t=torch.tensor([1 - k / steps])) / steps
    return torch.as_tensor(x)


def generator(last: nn.Module | None = None, **changes: Any) -> Generator:
    networks = {"denoiser": network(1), "denoiser_last": last or network(2)}
    return Generator.assemble("relay", networks, relay, kind="depth", **{"steps": (1, 2, 4), **changes})


@cache
def built(form: str) -> fewstep.Bundle:
    folder = Path(mkdtemp(prefix="fewstep-relay-"))
    options = fewstep.Options(prompts=1, seeds=2, profile=True, cache_root=folder / "cache")
    return fewstep.build(generator(), "fp32", form=form, out=folder / form, options=options)


@pytest.mark.parametrize("form", ["step", "table", "specialized"])
def test_every_form_verifies_and_draws_the_same(form: str) -> None:
    bundle = built(form)
    assert {n: s.networks for n, s in bundle.manifest.schedules.items()} == {
        1: (),
        2: ("denoiser", "denoiser_last"),
        4: ("denoiser", "denoiser", "denoiser", "denoiser_last"),
    }
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity["failed"] == 0
    for steps in (1, 2, 4):
        made, other = (b.generate("", seed=3, steps=steps) for b in (bundle, built("step")))
        np.testing.assert_allclose(made.output, other.output, atol=1e-4)  # depth in [0, 1]: 80 dB
        called = [feed.component for feed in made.feeds if feed.step is not None]
        assert called == [bundle.manifest.schedule(steps).network(k) for k in range(steps)]


def test_a_graph_for_each_step_that_calls_the_network() -> None:
    rows = {"denoiser": set[float](), "denoiser_last": set[float]()}
    manifest = built("specialized").manifest
    for artifact in manifest.artifacts:
        row = int(artifact.variant.removeprefix("row-"))
        rows[artifact.component].add(manifest.contract.rows[row]["timestep"])
    assert rows == {"denoiser": {1.0, 0.75, 0.5}, "denoiser_last": {0.5, 0.25}}


def test_one_file_of_all_steps(tmp_path: Path) -> None:
    made = stages.loop(built("table"), tmp_path / "x.onnx", steps=4, runtime=None, progress=Silent())
    assert made.output_psnr_db >= 100


@pytest.mark.parametrize("grids", [pytest.param("shared", marks=pytest.mark.slow), "each"])
def test_networks_are_calibrated_with_the_steps_that_call_them(grids: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    limits = "[limits]\ncompression_psnr_db = -100.0\n"  # random networks: what it costs says nothing
    recipe.write_text(f'base = "w8a8"\n{limits}[quantization]\nstep_grids = "{grids}"\n')
    options = fewstep.Options(prompts=1, seeds=4, profile=False, cache_root=tmp_path / "cache")
    bundle = fewstep.build(generator(), str(recipe), out=tmp_path / "bundle", options=options)
    plan = json.loads((bundle.path / "quantization" / "plan.json").read_text())
    assert {"denoiser", "denoiser_last"} <= plan["components"].keys()


def test_a_base_run_that_misses_a_network_is_not_used() -> None:
    described = describe(generator(default_steps=1), [1, 2])
    assert [spec.phase for spec in described.components.values()] == ["loop", "loop"]
    assert all(LATENT in spec.bindings.values() for spec in described.components.values())


def test_networks_must_take_the_latent_by_one_name() -> None:
    with pytest.raises(ExportError, match="denoiser_last is told of a step by z, t, expected x, t as denoiser is"):
        describe(generator(Renamed()), [4])


def test_a_network_that_is_none_of_the_loop_is_refused(tmp_path: Path) -> None:
    manifest = built("table").manifest
    wrong = dataclasses.replace(manifest.schedule(2), networks=("denoiser", "decoder"))
    schedules = {**manifest.schedules, 2: wrong}
    values = dataclasses.replace(manifest, schedules=schedules).to_json()
    with pytest.raises(BundleError, match="schedules/2/networks: 'decoder' is no network of the loop, expected one of"):
        fewstep.bundle.manifest.Manifest.from_json(values, where="manifest.json")

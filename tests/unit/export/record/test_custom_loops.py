"""Sampling loops in plain PyTorch become tables, or are refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep
from fewstep.bundle.contract import InputSpec
from fewstep.bundle.schedule import Schedule, sample_loop
from fewstep.errors import FewstepError, PipelineError, SourceError
from fewstep.export import Generator, describe
from fewstep.export.custom_loop import Draw, Loop, Networks, SampleFunction
from fewstep.export.describe import Description
from fewstep.export.trace.component_module import wired_module
from fewstep.numerics import noise
from fewstep.numerics.inputs import example_inputs

SHAPE = (1, 3, 8, 8)
Inputs = Mapping[str, torch.Tensor]


class Net(torch.nn.Module):
    """A convolution that sees up to two times."""

    def __init__(self, out: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Conv2d(3, out, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None, s: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.mix(x)
        for time in (t, s):
            y = y if time is None else y + time.reshape(-1, 1, 1, 1)
        return y.tanh()


def described(
    sample: SampleFunction, *, steps: tuple[int, ...] = (1, 2, 4), **networks: torch.nn.Module
) -> tuple[Generator, Description]:
    inputs = (InputSpec("image", "image", SHAPE),) if "encoder" in networks else ()
    generator = Generator.assemble("loop", {"denoiser": Net(), **networks}, sample, inputs=inputs, steps=steps)
    return generator, describe(generator, steps)


def assert_table_is_the_loop(generator: Generator, schedule: Schedule, steps: int) -> None:
    """Runs the loop and its table on the same numbers, both in float32."""
    rng = np.random.default_rng(steps)
    draws = [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(steps + 2)]
    given = {name: torch.from_numpy(a) for name, a in example_inputs(generator.inputs, 0).items()}
    queue = iter(draws)
    with torch.no_grad():
        expected = generator.pipeline(
            given, steps=steps, guidance=0.0, noise=lambda shape: torch.from_numpy(next(queue).reshape(shape))
        )
        encoder = getattr(generator.pipeline, "encoder", None)
        anchor = None if encoder is None else encoder(given["image"]).numpy()

    def denoise(k: int, x: np.ndarray) -> np.ndarray:
        times = {"t": schedule.timesteps[k], **{name: column[k] for name, column in schedule.times.items()}}
        with torch.no_grad():
            tensors = {n: torch.tensor([v]) for n, v in times.items()} if generator.parts["denoiser"] else {}
            result: np.ndarray = generator.module("denoiser")(torch.from_numpy(x.astype(np.float32)), **tensors).numpy()
        return result

    x = np.float32(schedule.init_scale) * draws[0]
    if anchor is not None:
        x = x + np.float32(schedule.init_anchor) * anchor
    found = sample_loop(schedule, x, denoise, lambda k: draws[k + 1], anchor=anchor)
    # Both round to float32 after every operation, but not in the same order.
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-6 * max(1.0, float(expected.abs().max())))


def euler(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    x = noise(SHAPE)
    for k in range(steps):
        x = x - nets["denoiser"](x, torch.tensor([1 - k / steps])) / steps
    return x


def mean_flow(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    x = noise(SHAPE)
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        x = x - (t - s) * nets["denoiser"](x, t=torch.tensor([t]), s=torch.tensor([s]))
    return x


def consistency(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    sigmas = [4.0 / 2**k for k in range(steps)]
    clean = torch.zeros(SHAPE)
    for k, sigma in enumerate(sigmas):
        x = sigma * noise(SHAPE) if k == 0 else clean + sigma * noise(SHAPE)
        clean = (0.1 * x + 2 * nets["denoiser"](x / sigma, torch.tensor([sigma]))).clamp(-1, 1)
    return clean


def anchored(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    start = nets["encoder"](inputs["image"])
    x = 0.5 * start + 2 * noise(SHAPE)
    for k in range(steps):
        x = x - nets["denoiser"](x, torch.tensor([1 - k / steps])) / steps + 0.1 * start
    return x


def test_euler_flow() -> None:
    generator, found = described(euler)
    schedule = found.schedules[4]
    assert schedule.timesteps == (1.0, 0.75, 0.5, 0.25)
    assert schedule.timestep_dtype == "float32"
    assert (schedule.a, schedule.c, schedule.clip) == ((1.0,) * 4, (0.0,) * 4, None)
    np.testing.assert_allclose(np.multiply(schedule.b, schedule.q), -0.25, rtol=1e-12)
    for n in (1, 2, 4):
        assert_table_is_the_loop(generator, found.schedules[n], n)


def test_two_times() -> None:
    generator, found = described(mean_flow)
    assert found.schedules[2].timesteps == (1.0, 0.5)
    assert found.schedules[2].times == {"s": (0.5, 0.0)}
    assert found.components["denoiser"].bindings == {"x": "latent", "t": "timestep", "s": "time:s"}
    for n in (1, 2, 4):
        assert_table_is_the_loop(generator, found.schedules[n], n)


def test_consistency_that_clips() -> None:
    generator, found = described(consistency)
    schedule = found.schedules[2]
    assert schedule.clip == 1.0
    # The latent of the table is what the network is given, x / sigma.
    assert schedule.s == (1.0, 1.0)
    np.testing.assert_allclose(schedule.p, [0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(schedule.c, [1.0, 0.0], rtol=1e-6)
    assert schedule.init_scale == pytest.approx(1.0)
    for n in (2, 4):
        assert_table_is_the_loop(generator, found.schedules[n], n)


def test_what_a_loop_makes_of_the_output_alone_goes_with_the_network() -> None:
    generator, found = described(mixture, denoiser=Net(8))
    assert found.components["denoiser"].outputs[0].shape == SHAPE
    wiring = found.wirings["denoiser"]
    assert wiring.after is not None and torch.ops.aten._softmax.default in [op for op, _, _ in wiring.after.steps]
    module = wired_module(generator, wiring)
    draw = noise.normal(0, 0, SHAPE)
    for n, schedule in found.schedules.items():

        def denoise(k: int, x: np.ndarray, table: Schedule = schedule) -> np.ndarray:
            with torch.no_grad():
                (output,) = module(torch.from_numpy(x), torch.tensor([table.timesteps[k]]))
            return np.asarray(output)

        with torch.no_grad():
            expected = generator.pipeline({}, steps=n, guidance=0.0, noise=lambda _: torch.from_numpy(draw))
        np.testing.assert_allclose(schedule.q, 1.0)
        np.testing.assert_allclose(schedule.b, -1 / n, rtol=1e-12)
        x = sample_loop(schedule, draw, denoise, lambda _: draw)
        np.testing.assert_allclose(x, expected.numpy(), rtol=0, atol=2e-6)


def test_a_step_draws_for_its_networks_too(tmp_path: Path) -> None:
    generator = Generator.assemble("gan", {"denoiser": Net()}, drawing_for_the_network, steps=(1, 3))
    options = fewstep.Options(prompts=1, seeds=1, profile=False, cache_root=tmp_path / "cache")
    bundle = fewstep.build(generator, out=tmp_path / "bundle", batch=2, options=options)
    assert bundle.manifest.components["denoiser"].bindings["s"] == "draw:1"
    for n in (1, 3):
        # As docs/bundle.md numbers the draws, in the order in which the loop asks for them.
        order = [offset for k in range(n) for offset in (k, 2**31 + 65536 * k)]
        for seed, sample in zip((4, 5), bundle.generate_batch([""] * 2, [4, 5], steps=n), strict=True):
            queue = iter(order)
            with torch.no_grad():
                expected = generator.pipeline(
                    {},
                    steps=n,
                    guidance=0.0,
                    noise=lambda shape, q=queue, s=seed: torch.from_numpy(noise.normal(s, next(q), shape)),
                )
            picture = (expected[0].permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1)
            np.testing.assert_allclose(sample.output, picture.numpy(), rtol=0, atol=2e-6)
            np.testing.assert_array_equal(sample.output, bundle.generate("", seed, steps=n).output)


def test_anchor() -> None:
    generator, found = described(anchored, encoder=Net())
    schedule = found.schedules[2]
    assert found.contract.anchor == "encoder.output.0"
    assert (schedule.init_scale, schedule.init_anchor) == pytest.approx((2.0, 0.5))
    assert schedule.g == pytest.approx((0.1, 0.1))
    for n in (1, 2, 4):
        assert_table_is_the_loop(generator, found.schedules[n], n)


# --- refusals


def squared(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    x = noise(SHAPE)
    for k in range(steps):
        x = x - (x + nets["denoiser"](x, torch.tensor([1 - k / steps]))) ** 2
    return x


def mixture(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    """Steps along the mean of two velocities whose weights the network gives too."""
    x = noise(SHAPE)
    for k in range(steps):
        output = nets["denoiser"](x, torch.tensor([1 - k / steps]))
        means, weights = output[:, :6].unflatten(1, (2, 3)), output[:, 6:].softmax(dim=1)
        x = x - (weights[:, :, None] * means).sum(dim=1) / steps
    return x


def drawing_for_the_network(
    nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw
) -> torch.Tensor:
    """Every step draws a number for the network before it, then noise for the latent."""
    x = noise(SHAPE)
    for k in range(steps):
        clean = nets["denoiser"](x, torch.tensor([1 - k / steps]), noise((1,))).tanh()
        x = 0.5 * clean + 0.25 * x
        if k < steps - 1:
            x = x + 0.125 * noise(SHAPE)
    return x


def drawing_for_some_steps(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    x = noise(SHAPE)
    for k in range(steps):
        x = x - nets["denoiser"](x, torch.tensor([1 - k / steps]), noise((1,)) if k == 1 else torch.ones(1))
    return x


def flipped(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    x = noise(SHAPE)
    for k in range(steps):
        x = x.flip(2) - nets["denoiser"](x, torch.tensor([1 - k / steps]))
    return x


def drawing_twice(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    x = noise(SHAPE)
    for k in range(steps):
        x = x - nets["denoiser"](x, torch.tensor([1 - k / steps])) + noise(SHAPE) + noise(SHAPE)
    return x


def with_another_network_at_the_end(
    nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw
) -> torch.Tensor:
    x = noise(SHAPE)
    for k in range(steps):
        x = x - nets["denoiser" if 2 * k < steps else "small"](x, torch.tensor([1 - k / steps]))
    return x


def with_another_network_in_the_middle(
    nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw
) -> torch.Tensor:
    x = noise(SHAPE)
    for k in range(steps):
        x = x - nets["denoiser"](nets["small"](x) if k == 1 else x, torch.tensor([1 - k / steps]))
    return x


def wide(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    """What is made of the output depends on the step."""
    x = noise(SHAPE)
    for k in range(steps):
        output = nets["denoiser"](x, torch.tensor([1 - k / steps]))
        x = x - (output[:, :3] if k == 0 else output[:, 3:])
    return x


def growing(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    x = noise(SHAPE)
    for k in range(steps):
        x = x.repeat(1, 1, 2, 2) if k == 1 else x
        x = x - nets["denoiser"](x, torch.tensor([1 - k / steps]))
    return x


@pytest.mark.parametrize(
    ("sample", "text", "networks"),
    [
        (squared, "loop: step 0 is not linear in latent, network output and noise", {}),
        (flipped, "a latent is not made element by element", {}),
        (drawing_twice, "step 0 draws noise more than once, expected at most one array for the latent", {}),
        (drawing_for_some_steps, "step 0 draws noise more than once", {}),
        (with_another_network_at_the_end, "small is called 2 times in a loop of 2 calls of denoiser", {"small": Net()}),
        (with_another_network_in_the_middle, "small runs after step 0 of 4", {"small": Net()}),
        (growing, "the latent of step 1 is [1, 3, 16, 16], expected [1, 3, 8, 8] as in step 0", {}),
        (wide, "denoiser: output output.0 is [1, 6, 8, 8], expected the latent's [1, 3, 8, 8]", {"denoiser": Net(6)}),
    ],
    ids=[
        "not linear",
        "mixes elements",
        "draws twice",
        "draws once",
        "other at the end",
        "other in the middle",
        "grows",
        "wide",
    ],
)
def test_loops_that_are_refused(sample: SampleFunction, text: str, networks: dict[str, torch.nn.Module]) -> None:
    with pytest.raises(FewstepError) as caught:
        described(sample, steps=(2, 4), **networks)
    assert text in caught.value.message
    assert caught.value.hint


def drawing_by_itself(nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
    x = torch.randn(SHAPE)
    for k in range(steps):
        x = x - nets["denoiser"](x, torch.tensor([1 - k / steps]))
    return x


class Counting:
    """A loop that keeps something from one call for the next."""

    calls = 0

    def __call__(self, nets: Networks, inputs: Inputs, *, steps: int, guidance: float, noise: Draw) -> torch.Tensor:
        self.calls += 1
        x = noise(SHAPE)
        for k in range(steps):
            x = x - (1 + 0.001 * self.calls) * nets["denoiser"](x, torch.tensor([1 - k / steps]))
        return x


class Dropping(Net):
    """A network with dropout that is never switched off."""

    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None, s: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(x, t, s), 0.1, training=True)


@pytest.mark.parametrize(
    ("sample", "network"),
    [(drawing_by_itself, Net()), (Counting(), Net()), (euler, Dropping())],
    ids=["own noise", "state", "dropout"],
)
def test_loops_that_cannot_be_repeated(sample: SampleFunction, network: torch.nn.Module) -> None:
    with pytest.raises(PipelineError, match="two runs of its loop on the same inputs and noise differ") as caught:
        described(sample, steps=(2,), denoiser=network)
    assert "noise(shape)" in str(caught.value.hint)


def test_networks_without_a_denoiser() -> None:
    with pytest.raises(SourceError, match="the networks are unet, expected one of them to be 'denoiser'"):
        Generator.assemble("x", {"unet": Net()}, euler)
    with pytest.raises(SourceError, match="'sample' cannot be the name of a network"):
        Loop({"denoiser": Net(), "sample": Net()}, euler)

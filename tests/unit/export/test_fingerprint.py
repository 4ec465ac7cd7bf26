"""One hash of all that a generator computes: whatever changes it changes the hash, and nothing else does."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.export import Generator, describe, fingerprint, load
from fewstep.export.custom_loop import Draw, Networks
from fewstep.export.fingerprint import code_and_weights
from tests.support import tiny

OFFSET = 0.0


@functools.cache
def turbo() -> Path:
    """Returns a tiny checkpoint; tests must not change it."""
    return tiny.turbo_folder(Path(tempfile.mkdtemp(prefix="fewstep-turbo-")) / "source")


class Net(torch.nn.Module):
    """A network with what networks have: weights, buffers, numbers, and modules in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("hidden", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.table = torch.arange(4.0)
        self.array = np.arange(3)
        self.plain = [torch.nn.Linear(2, 2)]
        self.settings: dict[str, Any] = {"factor": 1.0, "names": {"a", "b"}, "nested": [1, (2, "x")]}

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.mix(x)
        return torch.tanh(self.settings["factor"] * mixed + t[:, None, None, None]) + OFFSET


def flow(
    nets: Networks, inputs: Mapping[str, torch.Tensor], *, steps: int, guidance: float, noise: Draw
) -> torch.Tensor:
    """Returns the end of Euler's steps."""
    x = noise((1, 3, 8, 8))
    for k in range(steps):
        x = x - nets["denoiser"](x, torch.tensor([1 - k / steps])) / steps
    return x


def assembled(net: torch.nn.Module | None = None, **changes: Any) -> Generator:
    return Generator.assemble("net", {"denoiser": net or Net()}, flow, steps=(1, 2), **changes)


BASE = assembled()
BASE_MARK = fingerprint(BASE)


def tensors(net: Net) -> list[torch.Tensor]:
    return [*net.parameters(), *net.buffers(), net.table, torch.from_numpy(net.array), *net.plain[0].parameters()]


def test_the_same_generator_has_the_same_fingerprint() -> None:
    assert fingerprint(assembled()) == BASE_MARK
    assert assembled().source.sha256 == BASE.source.sha256
    describe(BASE, [1, 2])
    assert fingerprint(BASE) == BASE_MARK  # a run leaves no trace in it


@settings(max_examples=40)
@given(st.data())
def test_every_bit_of_every_tensor_counts(data: st.DataObject) -> None:
    net = Net()
    tensor = data.draw(st.sampled_from(range(len(tensors(net)))))
    values = tensors(net)[tensor].detach().view(-1).view(torch.uint8).numpy()
    bit = data.draw(st.integers(0, 8 * len(values) - 1))
    values[bit // 8] ^= 1 << bit % 8
    assert fingerprint(assembled(net)) != BASE_MARK


@settings(max_examples=40)
@given(
    st.sampled_from(["factor", "new", "names", "nested"]),
    st.one_of(st.integers(), st.floats(allow_nan=False), st.text(), st.booleans(), st.lists(st.integers()), st.none()),
)
def test_every_attribute_counts(name: str, value: Any) -> None:
    net = Net()
    before = net.settings.get(name, "nothing")
    net.settings[name] = value
    same = type(before) is type(value) and repr(before) == repr(value)
    assert (fingerprint(assembled(net)) == BASE_MARK) == same


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=3))
def test_every_option_counts(options: dict[str, Any]) -> None:
    assert (fingerprint(replace(BASE, options=options)) == BASE_MARK) == (not options)


def other_weights(net: Net) -> None:
    """The same sums: what the key of before took for the same."""
    with torch.no_grad():
        net.mix.weight.copy_(net.mix.weight.flip(0, 1, 2, 3))


def other_dtype(net: Net) -> None:
    net.hidden = net.hidden.view(torch.float64)


def other_shape(net: Net) -> None:
    net.table = net.table.reshape(2, 2)


def hook(net: Net) -> None:
    net.mix.register_forward_hook(lambda _, __, output: 2 * output)


def not_in_place(net: Net) -> None:
    net.late = Net()  # type: ignore[assignment]


@pytest.mark.parametrize("change", [other_weights, other_dtype, other_shape, hook, not_in_place])
def test_what_a_sum_does_not_see(change: Callable[[Net], None]) -> None:
    net = Net()
    change(net)
    assert fingerprint(assembled(net)) != BASE_MARK


def test_code_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.mix(x)
        return result

    monkeypatch.setattr(sys.modules[__name__], "OFFSET", 1.0)
    assert fingerprint(BASE) != BASE_MARK  # a global that forward reads
    monkeypatch.undo()
    assert fingerprint(BASE) == BASE_MARK
    monkeypatch.setattr(Net, "forward", forward)
    assert fingerprint(BASE) != BASE_MARK
    monkeypatch.undo()
    mark = code_and_weights({"sample": flow})
    assert code_and_weights({"sample": lambda *_, **__: None}) != mark

    def closing(factor: float) -> Callable[[float], float]:
        return lambda x: factor * x

    assert code_and_weights({"f": closing(1.0)}) != code_and_weights({"f": closing(2.0)})
    assert code_and_weights({"f": closing(1.0)}) == code_and_weights({"f": closing(1.0)})


def test_what_only_a_run_shows_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's function is not read; what it makes of a run is."""
    mark = describe(BASE, [1, 2]).fingerprint
    assert describe(BASE, [1, 2]).fingerprint == mark
    tanh = torch.tanh
    monkeypatch.setattr(torch, "tanh", lambda x: tanh(x) + 2**-20)
    assert fingerprint(BASE) == BASE_MARK
    assert describe(BASE, [1, 2]).fingerprint != mark


def test_options_and_changed_networks_of_a_folder_count(tmp_path: Path) -> None:
    generator = load(str(turbo()))
    mark = fingerprint(generator)
    assert fingerprint(replace(generator, options={"eta": 0.5})) != mark
    assert fingerprint(replace(generator, batch=2)) != mark
    assert fingerprint(generator.shaped(16, 24)) != mark
    moved = tmp_path / "elsewhere"
    moved.symlink_to(turbo())
    assert fingerprint(load(str(moved))) == mark
    scheduler = type(generator.pipeline.scheduler)
    generator.pipeline.scheduler = scheduler.from_config(generator.pipeline.scheduler.config, beta_end=0.02)
    assert fingerprint(generator) != mark


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    """Not hashed: addresses, the order of sets."""
    code = "from tests.unit.export.test_fingerprint import BASE_MARK; print(BASE_MARK)"
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout.strip().splitlines()[-1])
    assert found == {BASE_MARK}

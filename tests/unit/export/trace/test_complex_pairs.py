"""Networks with complex numbers and Fourier transforms, against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fewstep.errors import ExportError
from fewstep.export.trace import dft as fourier
from fewstep.export.trace.complex_pairs import Pair
from fewstep.export.trace.real_valued import complex_as_pairs, has_complex, in_real_numbers

# float64, sums of at most a hundred products: rounding only.
TOLERANCE = 1e-12
ONE_AXIS = ("fft", "ifft", "rfft", "irfft")
AXES = ("fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn", "rfftn", "irfftn")


def complex_array(*shape: int, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).standard_normal((2, *shape))
    return torch.complex(*torch.from_numpy(values))


def real_array(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape))


def whole(value: Pair | Tensor) -> Tensor:
    return torch.complex(value.real, value.imag) if isinstance(value, Pair) else value


def pair(value: Tensor) -> Pair | Tensor:
    return Pair(value.real, value.imag) if value.is_complex() else value


def assert_same(function: Callable[..., Tensor], *arguments: Tensor) -> None:
    expected = function(*arguments)
    with complex_as_pairs(nn.Module()):
        found = function(*map(pair, arguments))
    assert isinstance(found, Pair) == expected.is_complex()
    assert whole(found).shape == expected.shape
    assert whole(found).dtype == expected.dtype
    torch.testing.assert_close(whole(found), expected, rtol=TOLERANCE, atol=TOLERANCE)


@given(
    name=st.sampled_from(ONE_AXIS),
    length=st.integers(2, 17),
    n=st.none() | st.integers(2, 21),
    dim=st.integers(-2, 1),
    norm=st.sampled_from([None, "backward", "ortho", "forward"]),
)
def test_transforms_of_one_axis(name: str, length: int, n: int | None, dim: int, norm: str | None) -> None:
    x = real_array(length, length) if name == "rfft" else complex_array(length, length)
    assert_same(lambda x: getattr(torch.fft, name)(x, n, dim, norm), x)


@pytest.mark.parametrize("norm", [None, "ortho", "forward"])
@pytest.mark.parametrize("name", AXES)
def test_transforms_of_several_axes(name: str, norm: str | None) -> None:
    x = real_array(3, 4, 5) if name.startswith("rfft") else complex_array(3, 4, 5)
    assert_same(lambda x: getattr(torch.fft, name)(x, norm=norm), x)
    assert_same(lambda x: getattr(torch.fft, name)(x, s=(4, 6), dim=(0, 2), norm=norm), x)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sums": lambda a, b: a + b - 2.0 + (1 - a) + a.real,
    "products": lambda a, b: a * b * (0.5 - 2j) * b.real,
    "quotients": lambda a, b: a / b + 1 / b + a / 3.0 + a / (1 + 2j) + torch.div(a, b),
    "matmul": lambda a, b: a @ b.transpose(0, 1) + torch.matmul(a, b.T),
    "einsum": lambda a, b: torch.einsum("ij,kj,kl->il", a, b, a),
    "linear": lambda a, b: torch.nn.functional.linear(a, b, b[:, 0]),
    "join": lambda a, b: torch.cat([a, b.real, torch.stack([b[0], a[1]])]),
    "shapes": lambda a, b: torch.roll(a.reshape(2, -1).unsqueeze(1).expand(2, 2, -1), 1, -1).flatten().chunk(2)[0],
    "parts": lambda a, b: (
        torch.view_as_real(a.conj().resolve_conj()).sum(-1) + b.abs() + torch.angle(a) + torch.imag(b)
    ),
    "exponential": lambda a, b: torch.exp(a) + torch.polar(b.real, b.imag),
    "assignment": lambda a, b: assigned(a, b),
    "casts": lambda a, b: a.real.to(torch.complex128) * b + torch.ones_like(a) + a.new_zeros(a.shape),
    "padding": lambda a, b: torch.nn.functional.pad(a, (1, 2), value=3.0),
    "shifts": lambda a, b: torch.fft.ifftshift(torch.fft.fftshift(a) * b),
}


def assigned(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.shape[0], 7, dtype=torch.complex128)
    out[:, :2] = (a * b)[:, :2]
    out[:, -1] = 1.5
    return out


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_arithmetic(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert_same(function, complex_array(4, 4), complex_array(4, 4, seed=2))


class Rotary(nn.Module):
    """Rotation of pairs of features by complex numbers of a buffer, as language models write it."""

    def __init__(self) -> None:
        super().__init__()
        turns = torch.outer(torch.arange(6.0), 0.1 ** torch.arange(4))
        self.register_buffer("turns", torch.polar(torch.ones_like(turns), turns))
        self.mix = nn.Parameter(complex_array(4, 4).to(torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * self.turns
        return torch.view_as_real(pairs @ self.mix).flatten(-2)


def test_complex_weights_are_traced_as_two_real_ones_and_given_back() -> None:
    module, x = Rotary().eval(), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    expected, weight = module(x), module.mix
    with torch.no_grad(), complex_as_pairs(module):
        exported = torch.export.export(module, (x,))
    assert not has_complex(exported)
    assert {"turns_real", "turns_imag", "mix_real", "mix_imag"} <= exported.state_dict.keys()
    torch.testing.assert_close(exported.module()(x), expected)
    assert type(module) is Rotary
    assert module.mix is weight
    assert dict(module.named_buffers()).keys() == {"turns"}
    assert has_complex(torch.export.export(module, (x,)))


def test_only_what_is_complex_is_traced_again() -> None:
    times = []

    def export(module: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
        times.append(module)
        return torch.export.export(module, (x,))

    linear, rotary, x = nn.Linear(8, 8), Rotary(), torch.zeros(2, 6, 8)
    in_real_numbers(linear, lambda: export(linear, x))
    assert times == [linear]
    assert not has_complex(in_real_numbers(rotary, lambda: export(rotary, x)))
    assert times == [linear, rotary, rotary]


def test_complex_tensors_that_are_no_weights_are_refused() -> None:
    class Hidden(nn.Module):
        turns = torch.ones(4, dtype=torch.complex64)

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(x) * self.turns)

    module, x = Hidden(), torch.zeros(4, 2)
    with pytest.raises(ExportError, match="is a complex tensor that is no weight of Hidden") as caught:
        in_real_numbers(module, lambda: torch.export.export(module, (x,)))
    assert caught.value.hint == "register it as a buffer, or make it in forward"


def test_what_has_no_rule_is_named() -> None:
    with (
        complex_as_pairs(nn.Module()),
        pytest.raises(ExportError, match=r"^tanh of complex numbers has no form") as caught,
    ):
        torch.tanh(torch.fft.fft(torch.ones(4)))
    assert caught.value.hint is not None
    assert "view_as_real" in caught.value.hint


def test_long_transforms_are_refused() -> None:
    with pytest.raises(ExportError, match=rf"of length 5000 .* expected at most {fourier.LONGEST}"):
        fourier.transform(torch.ones(5000), None)

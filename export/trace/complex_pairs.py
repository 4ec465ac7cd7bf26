"""Complex numbers as pairs of real ones while a network is traced: few backends know complex tensors.

Within `ComplexAsPairs`, what would make a complex tensor makes a `Pair`, which follows the rules of complex
arithmetic in real operations. What it has no rule for is refused by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fewstep.errors import ExportError
from fewstep.export.trace import dft as fourier

Tensor = torch.Tensor
_PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


class Pair:
    """A complex tensor as its real and imaginary parts, two real tensors of one shape and type."""

    def __init__(self, real: Tensor, imag: Tensor) -> None:
        self.real, self.imag = real, imag

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _apply(func, args, kwargs or {})

    @property
    def shape(self) -> torch.Size:
        """The shape of each part."""
        return self.real.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.real.ndim

    @property
    def device(self) -> torch.device:
        """Where both parts are."""
        return self.real.device

    @property
    def dtype(self) -> torch.dtype:
        """The complex type."""
        return next(whole for whole, part in _PARTS.items() if part == self.real.dtype)

    @property
    def T(self) -> Pair:
        """The transpose of a matrix."""
        return Pair(self.real.T, self.imag.T)

    def __getattr__(self, name: str) -> Any:
        """Returns a tensor's method, of this pair."""
        method = getattr(Tensor, name, None)
        if not callable(method):
            raise AttributeError(f"a complex number has no {name} here")
        return lambda *args, **kwargs: _apply(method, (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Pair:
        return Pair(self.real[index], self.imag[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        real, imag = _parts(value)
        self.real[index] = real
        self.imag[index] = 0.0 if imag is None else imag

    def __len__(self) -> int:
        return len(self.real)

    def __neg__(self) -> Pair:
        return Pair(-self.real, -self.imag)

    def __add__(self, other: Any) -> Pair:
        return _add(self, other)

    def __sub__(self, other: Any) -> Pair:
        return _add(self, other, alpha=-1)

    def __rsub__(self, other: Any) -> Pair:
        return _add(-self, other)

    def __mul__(self, other: Any) -> Pair:
        return _multilinear(torch.mul, (self, other), {})

    def __truediv__(self, other: Any) -> Pair:
        return _divide(self, other)

    def __rtruediv__(self, other: Any) -> Pair:
        return _divide(other, self)

    def __matmul__(self, other: Any) -> Pair:
        return _multilinear(torch.matmul, (self, other), {})

    def __rmatmul__(self, other: Any) -> Pair:
        return _multilinear(torch.matmul, (other, self), {})

    __radd__, __rmul__ = __add__, __mul__


class ComplexAsPairs(TorchFunctionMode):
    """Takes over every function that makes complex numbers of real ones."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        asked = any(isinstance(value, torch.dtype) and value in _PARTS for value in (*args, *kwargs.values()))
        if name in _MAKERS or (asked and name in _RULES):
            return _apply(func, args, kwargs)
        return func(*args, **kwargs)


def is_complex(value: Any) -> bool:
    """Returns whether a value is a complex tensor."""
    return isinstance(value, Tensor) and value.dtype.is_complex


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func)).removeprefix("linalg_").removeprefix("special_")


def _parts(value: Any) -> tuple[Any, Any]:
    """Returns a value's real part and its imaginary one, None for a value that is real."""
    if isinstance(value, (Pair, complex)) or is_complex(value):
        return value.real, value.imag
    return value, None


def _apply(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = _name(func)
    if rule := _RULES.get(name):
        return rule(*args, **kwargs)
    if name in _BY_PARTS:
        return _by_parts(func, args, kwargs)
    if name in _MULTILINEAR:
        return _multilinear(func, args, kwargs)
    raise ExportError(
        f"{name} of complex numbers has no form in real ones here",
        hint="write this operation of the network with real tensors: torch.view_as_real gives the parts",
    )


def _by_parts(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the result of a function that moves numbers or adds them up: it does the same to each part."""
    joins = _name(func) in _JOINS

    def pick(value: Any, k: int) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(pick(item, k) for item in value)
        if isinstance(value, Pair):
            return (value.real, value.imag)[k]
        return torch.zeros_like(value) if joins and k == 1 and isinstance(value, Tensor) else value

    real, imag = (
        func(*(pick(arg, k) for arg in args), **{name: pick(value, k) for name, value in kwargs.items()})
        for k in (0, 1)
    )
    return Pair(real, imag) if isinstance(real, Tensor) else tuple(map(Pair, real, imag))


def _multilinear(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pair:
    """Returns the result of a function that is linear in each of its operands, from all products of their parts."""
    texts = [arg for arg in args if isinstance(arg, str)]  # einsum's equation, whose operands may be a list
    operands = [arg for given in args for arg in (given if isinstance(given, (list, tuple)) else [given])]
    operands = [arg for arg in operands if not isinstance(arg, str)]
    sums: list[Any] = [None, None]
    for chosen in itertools.product((0, 1), repeat=len(operands)):
        parts = [_parts(operand)[k] for operand, k in zip(operands, chosen, strict=True)]
        if any(part is None for part in parts):
            continue
        term, power = func(*texts, *parts, **kwargs), sum(chosen)  # of i
        term = -term if power % 4 >= 2 else term
        sums[power % 2] = term if sums[power % 2] is None else sums[power % 2] + term
    return Pair(sums[0], sums[1])


def _add(a: Any, b: Any, *, alpha: float = 1) -> Pair:
    (a_real, a_imag), (b_real, b_imag) = _parts(a), _parts(b)
    real = a_real + alpha * b_real
    if a_imag is None:
        imag = alpha * b_imag
    else:
        imag = a_imag if b_imag is None else a_imag + alpha * b_imag
    if not isinstance(imag, Tensor) or imag.shape != real.shape:  # that of a term which broadcasts
        imag = torch.zeros_like(real) + imag
    return Pair(real, imag)


def _divide(a: Any, b: Any) -> Pair:
    real, imag = _parts(b)
    if imag is None:
        return Pair(a.real / real, a.imag / real)
    square = real * real + imag * imag
    if isinstance(b, complex):
        return _multilinear(torch.mul, (a, complex(real, -imag) / square), {})
    return _multilinear(torch.mul, (a, Pair(real / square, -imag / square)), {})


def _polar(size: Tensor, angle: Tensor) -> Pair:
    return Pair(size * torch.cos(angle), size * torch.sin(angle))


def _linear(x: Any, weight: Any, bias: Any = None) -> Pair:
    product = _multilinear(torch.nn.functional.linear, (x, weight), {})
    return product if bias is None else product + bias


def _pad(x: Pair, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Pair:
    padded = partial(torch.nn.functional.pad, pad=pad, mode=mode)
    return Pair(padded(x.real, value=value), padded(x.imag))


def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns a value as complex numbers, or, as PyTorch does, its real part alone if a real type is asked for."""
    wanted = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), None)
    real, imag = _parts(x)
    if wanted is not None and not wanted.is_complex:
        return real.to(wanted)
    part = real.dtype if wanted is None else _PARTS[wanted]
    return Pair(real.to(part), torch.zeros_like(real, dtype=part) if imag is None else imag.to(part))


def _filled(real: Callable[..., Tensor], imag: Callable[..., Tensor]) -> Callable[..., Pair]:
    """Returns the rule of a function that makes a tensor of one number."""

    def make(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Pair:
        given = [arg.real if isinstance(arg, Pair) else arg for arg in args]
        type_ = {} if dtype is None else {"dtype": _PARTS[dtype]}
        return Pair(real(*given, **type_, **kwargs), imag(*given, **type_, **kwargs))

    return make


def _fft(
    x: Any, n: int | None = None, dim: int = -1, norm: str | None = None, *, inverse: bool = False, half: bool = False
) -> Pair:
    return Pair(*fourier.transform(*_parts(x), n, dim, norm, inverse=inverse, half=half))


def _irfft(x: Any, n: int | None = None, dim: int = -1, norm: str | None = None) -> Tensor:
    return fourier.inverse_of_half(x.real, x.imag, n, dim, norm)


_ifft, _rfft = partial(_fft, inverse=True), partial(_fft, half=True)
_Axes = Sequence[int] | None


def _axes(x: Any, s: _Axes, dim: _Axes) -> list[tuple[int | None, int]]:
    """Returns length and axis of each of the transforms that one over several axes consists of."""
    axes = [*dim] if dim is not None else [*range(-(x.ndim if s is None else len(s)), 0)]
    return [*zip([None] * len(axes) if s is None else s, axes, strict=True)]


def _fftn(x: Any, s: _Axes = None, dim: _Axes = None, norm: str | None = None, *, one: Any = _fft) -> Any:
    for n, axis in _axes(x, s, dim):
        x = one(x, n, axis, norm)
    return x


def _rfftn(x: Any, s: _Axes = None, dim: _Axes = None, norm: str | None = None) -> Any:
    *others, (n, axis) = _axes(x, s, dim)
    x = _rfft(x, n, axis, norm)
    for n, axis in others:
        x = _fft(x, n, axis, norm)
    return x


def _irfftn(x: Any, s: _Axes = None, dim: _Axes = None, norm: str | None = None) -> Any:
    *others, (n, axis) = _axes(x, s, dim)
    for m, other in others:
        x = _ifft(x, m, other, norm)
    return _irfft(x, n, axis, norm)


def _of_two_axes(rule: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, s=None, dim=(-2, -1), norm=None: rule(x, s, dim, norm)


_ifftn = partial(_fftn, one=_ifft)
_TRANSFORMS: Mapping[str, Callable[..., Any]] = {
    "fft_fft": _fft,
    "fft_ifft": _ifft,
    "fft_rfft": _rfft,
    "fft_irfft": _irfft,
    "fft_fftn": _fftn,
    "fft_ifftn": _ifftn,
    "fft_rfftn": _rfftn,
    "fft_irfftn": _irfftn,
    "fft_fft2": _of_two_axes(_fftn),
    "fft_ifft2": _of_two_axes(_ifftn),
    "fft_rfft2": _of_two_axes(_rfftn),
    "fft_irfft2": _of_two_axes(_irfftn),
}
_RULES: Mapping[str, Callable[..., Any]] = {
    **_TRANSFORMS,
    "complex": Pair,
    "polar": _polar,
    "view_as_complex": lambda x: Pair(x[..., 0], x[..., 1]),
    "view_as_real": lambda x: torch.stack([x.real, x.imag], dim=-1),
    "real": lambda x: x.real,
    "imag": lambda x: x.imag,
    "abs": lambda x: torch.sqrt(x.real * x.real + x.imag * x.imag),
    "angle": lambda x: torch.atan2(x.imag, x.real),
    "exp": lambda x: _polar(torch.exp(x.real), x.imag),
    "neg": lambda x: -x,
    "add": _add,
    "sub": lambda a, b, alpha=1: _add(a, b, alpha=-alpha),
    "div": _divide,
    "true_divide": _divide,
    **dict.fromkeys(("conj", "conj_physical"), lambda x: Pair(x.real, -x.imag)),
    "linear": _linear,
    "pad": _pad,
    "new_zeros": lambda x, *size: Pair(x.real.new_zeros(*size), x.real.new_zeros(*size)),
    **dict.fromkeys(("to", "type", "type_as"), _to),
    "is_complex": lambda x: True,
    **{name: _filled(getattr(torch, name), getattr(torch, name)) for name in ("zeros", "zeros_like")},
    "empty": _filled(torch.zeros, torch.zeros),
    "ones": _filled(torch.ones, torch.zeros),
    "ones_like": _filled(torch.ones_like, torch.zeros_like),
    **{name: (lambda x, *args, _name=name: getattr(x.real, _name)(*args)) for name in ("size", "dim", "numel")},
}
# What makes complex numbers where it is given real ones.
_MAKERS = frozenset({"complex", "polar", "view_as_complex"} | _TRANSFORMS.keys())
_JOINS = frozenset({"cat", "stack", "concat"})  # of which some may be real
_BY_PARTS = _JOINS | frozenset(
    "reshape view flatten unflatten permute transpose t movedim moveaxis swapaxes unsqueeze squeeze expand expand_as "
    "repeat repeat_interleave tile broadcast_to roll flip chunk split tensor_split unbind narrow select index_select "
    "gather sum mean cumsum diff contiguous clone detach resolve_conj resolve_neg diagonal tril triu "
    "fft_fftshift fft_ifftshift".split()
)
_MULTILINEAR = frozenset({"mul", "multiply", "matmul", "mm", "bmm", "einsum", "outer", "dot"})

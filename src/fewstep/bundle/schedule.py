"""The sampler of a few-step generator as a table of numbers, and the loop that runs it.

For step k, with x the latent, F the output of the network and n_k the noise of the step:

    F   = network(s_k * x, t_k, further times of the step)
    x0  = clip(p_k * x + q_k * F)
    x   = a_k * x + b_k * x0 + c_k * n_k + sum_j h_kj * x0_{k-j} + g_k * anchor

Every sampler that is linear in (initial noise, network outputs, step noises, one tensor that stays the same) has such a
table: `fewstep.export.schedule.probe_scheduler` finds it for a diffusers scheduler or a loop in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep.errors import ContractError, ScheduleError

Array = npt.NDArray[np.floating[Any]]

# The network whose output is F, unless a table names others.
DENOISER = "denoiser"
_DTYPES = ("int32", "int64", "float16", "float32", "float64")
_COLUMNS = ("s", "p", "q", "a", "b", "c", "g")


@dataclass(frozen=True)
class Schedule:
    """The table of one sampler at one number of steps.

    Attributes:
        timesteps: t_k as the network wants it, one per network call.
        timestep_dtype: numpy name of the type in which the network wants t_k.
        init_scale: the initial latent is `init_scale * normal noise`.
        s: scale of the network's input, per step.
        p: x0 = p x + q F, per step.
        q: see p. A sampler that forms no x0 has p = 0 and q = 1: its "x0" is F.
        a: coefficient of x in the next x, per step.
        b: coefficient of x0 in the next x, per step.
        c: coefficient of the step's noise in the next x, per step; 0: no noise is drawn.
        h: h[k][j - 1] multiplies x0 of step k - j in the next x of step k; at most k entries.
        clip: x0 is clipped to [-clip, clip]; None: not clipped.
        source: class name of the scheduler that the table was made from.
        times: further numbers that the network takes at each step, by name (a second time, for instance).
        g: coefficient of the anchor in the next x, per step.
        init_anchor: coefficient of the anchor in the initial latent.
        networks: which component's output is F at each step; empty: `DENOISER`'s at all of them.

    Raises:
        ScheduleError: the table is empty, or a column has the wrong length or a number that is not finite.
    """

    timesteps: tuple[float, ...]
    timestep_dtype: str
    init_scale: float
    s: tuple[float, ...]
    p: tuple[float, ...]
    q: tuple[float, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    h: tuple[tuple[float, ...], ...]
    clip: float | None
    source: str
    times: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    g: tuple[float, ...] = ()
    init_anchor: float = 0.0
    networks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks lengths and values; a column ``g`` that is left out is zero."""
        if not self.g:
            object.__setattr__(self, "g", (0.0,) * len(self.timesteps))
        if not self.timesteps:
            raise ScheduleError("schedule has no steps, expected at least one timestep")
        if self.timestep_dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ScheduleError(f"schedule.timestep_dtype is {self.timestep_dtype!r}, expected one of {known}")
        for name in (*_COLUMNS, "h"):
            if len(getattr(self, name)) != self.steps:
                raise ScheduleError(f"schedule.{name} has {len(getattr(self, name))} entries, expected {self.steps}")
        if self.networks and len(self.networks) != self.steps:
            raise ScheduleError(f"schedule.networks has {len(self.networks)} entries, expected {self.steps}")
        for name, values in self.times.items():
            if len(values) != self.steps:
                raise ScheduleError(f"schedule.times.{name} has {len(values)} entries, expected {self.steps}")
            _require_finite(f"schedule.times.{name}", values)
        for name in ("timesteps", *_COLUMNS):
            _require_finite(f"schedule.{name}", getattr(self, name))
        for k, row in enumerate(self.h):
            if len(row) > k:
                raise ScheduleError(f"schedule.h[{k}] has {len(row)} entries, expected at most {k}")
            _require_finite(f"schedule.h[{k}]", row)
        _require_finite("schedule.init_scale", (self.init_scale,))
        _require_finite("schedule.init_anchor", (self.init_anchor,))
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise ScheduleError(f"schedule.clip is {self.clip}, expected a positive number or None")

    @property
    def uses_anchor(self) -> bool:
        """Whether the table has a term for the anchor."""
        return self.init_anchor != 0.0 or any(self.g)

    @property
    def steps(self) -> int:
        """Number of network calls."""
        return len(self.timesteps)

    def network_input(self, k: int, x: Array) -> Array:
        """Returns s_k * x, what the network receives at step k."""
        return x if self.s[k] == 1.0 else self.s[k] * x

    def timestep(self, k: int) -> npt.NDArray[Any]:
        """Returns t_k as an array of shape [1] in the network's own type."""
        return np.array([self.timesteps[k]], dtype=self.timestep_dtype)

    def network(self, k: int) -> str:
        """Returns the component whose output is F at step k."""
        return self.networks[k] if self.networks else DENOISER

    def uses_noise(self, k: int) -> bool:
        """Returns whether step k adds noise."""
        return self.c[k] != 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the table as plain lists and numbers; `from_json` gives back an equal table.

        A column ``networks`` that names none is left out.
        """
        table = {f.name: _thaw(getattr(self, f.name)) for f in fields(self)}
        return table if self.networks else {name: value for name, value in table.items() if name != "networks"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """Returns the table that `to_json` wrote.

        Raises:
            ScheduleError: a key is missing or unknown, or a value is not a number where one is expected.
        """
        known = {f.name for f in fields(cls)}
        missing, unknown = sorted(known - {"networks"} - data.keys()), sorted(data.keys() - known)
        if missing or unknown:
            raise ScheduleError(f"schedule has missing keys {missing} and unknown keys {unknown}")
        columns = {name: _numbers(f"schedule.{name}", data[name]) for name in ("timesteps", *_COLUMNS)}
        rows = data["h"]
        if not isinstance(rows, list | tuple):
            raise ScheduleError(f"schedule.h is {type(rows).__name__}, expected a list of lists of numbers")
        return cls(
            **columns,
            h=tuple(_numbers(f"schedule.h[{k}]", row) for k, row in enumerate(rows)),
            init_scale=_number("schedule.init_scale", data["init_scale"]),
            init_anchor=_number("schedule.init_anchor", data["init_anchor"]),
            networks=_names("schedule.networks", data.get("networks", [])),
            times={str(n): _numbers(f"schedule.times.{n}", v) for n, v in data["times"].items()},
            clip=None if data["clip"] is None else _number("schedule.clip", data["clip"]),
            timestep_dtype=str(data["timestep_dtype"]),
            source=str(data["source"]),
        )


def advance(
    schedule: Schedule,
    k: int,
    x: Array,
    F: Array,
    noise: Array | None,
    history: Sequence[Array],
    anchor: Array | None = None,
) -> tuple[Array, Array]:
    """Returns the next latent and x0 of step k, both of x's shape and dtype.

    The arithmetic is done in the dtype of x with the coefficients rounded to it: float32 on every device. (float64
    serves to check a table.)

    Args:
        schedule: the table.
        k: index of the step.
        x: latent before the step, float32 or float64.
        F: output of the network, of x's shape and dtype.
        noise: normal noise of the step, of x's shape and dtype; None where the step uses none.
        history: x0 of the steps before, oldest first; only the last `len(schedule.h[k])` are read.
        anchor: of x's shape and dtype; None where the table has no term for it.

    Raises:
        ContractError: F, noise or anchor does not fit x, or one of them or the history is missing.
    """
    _check_arrays(schedule, k, x, F, noise, history, anchor)
    x0 = schedule.p[k] * x + schedule.q[k] * F if schedule.p[k] else schedule.q[k] * F
    if schedule.clip is not None:
        x0 = np.clip(x0, -schedule.clip, schedule.clip)
    following = schedule.b[k] * x0
    if schedule.a[k]:
        following = schedule.a[k] * x + following
    if noise is not None and schedule.uses_noise(k):
        following = following + schedule.c[k] * noise
    for j, coefficient in enumerate(schedule.h[k], start=1):
        following = following + coefficient * history[-j]
    if anchor is not None and schedule.g[k]:
        following = following + schedule.g[k] * anchor
    return following, x0


def sample_loop(
    schedule: Schedule,
    x_init: Array,
    denoise: Callable[[int, Array], Array],
    noise: Callable[[int], Array],
    on_step: Callable[[int, Array, Array], None] | None = None,
    *,
    anchor: Array | None = None,
) -> Array:
    """Returns the final latent: the ten lines that a device needs.

    Args:
        schedule: the table.
        x_init: the initial latent, `schedule.init_scale * normal noise`.
        denoise: (k, s_k * x) -> F, the network at step k with its conditions.
        noise: k -> normal noise of step k; called only for steps that use noise.
        on_step: called with (k, x after the step, x0 of the step).
        anchor: what the table's column g multiplies.
    """
    x = x_init
    history: list[Array] = []
    for k in range(schedule.steps):
        F = denoise(k, schedule.network_input(k, x))
        step_noise = noise(k) if schedule.uses_noise(k) else None
        x, x0 = advance(schedule, k, x, F, step_noise, history, anchor)
        history.append(x0)
        if on_step is not None:
            on_step(k, x, x0)
    return x


def _check_arrays(
    schedule: Schedule,
    k: int,
    x: Array,
    F: Array,
    noise: Array | None,
    history: Sequence[Array],
    anchor: Array | None,
) -> None:
    """Raises ContractError unless the inputs of a step fit together."""
    if x.dtype not in (np.float32, np.float64):
        raise ContractError(f"latent of step {k} is {x.dtype}, expected float32")
    for name, array in (("network output", F), ("noise", noise), ("anchor", anchor)):
        if array is not None and (array.shape != x.shape or array.dtype != x.dtype):
            raise ContractError(
                f"{name} of step {k} is {array.dtype} {list(array.shape)}, expected {x.dtype} {list(x.shape)}"
            )
    if noise is None and schedule.uses_noise(k):
        raise ContractError(f"noise of step {k} is missing, expected {x.dtype} {list(x.shape)}")
    if anchor is None and schedule.g[k]:
        raise ContractError(f"anchor of step {k} is missing, expected {x.dtype} {list(x.shape)}")
    if len(history) < len(schedule.h[k]):
        raise ContractError(f"history of step {k} has {len(history)} entries, expected at least {len(schedule.h[k])}")


def _require_finite(name: str, values: Sequence[float]) -> None:
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ScheduleError(f"{name} holds {value} at index {index}, expected a finite number")


def _thaw(value: Any) -> Any:
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ScheduleError(f"{name} is {value!r}, expected a number")
    return float(value)


def _names(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ScheduleError(f"{where} is {value!r}, expected a list of names of components")
    return tuple(value)


def _numbers(name: str, values: object) -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        raise ScheduleError(f"{name} is {values!r}, expected a list of numbers")
    return tuple(_number(name, value) for value in values)

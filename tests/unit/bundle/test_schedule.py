"""The table of steps: what it accepts, what it writes, and the loop that runs it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.bundle.schedule import Schedule, advance, sample_loop
from fewstep.errors import ContractError, ScheduleError

# Two steps with every feature: scaled input, clip, noise at the first step only, history at the second.
TWO_STEPS = Schedule(
    timesteps=(999.0, 499.0),
    timestep_dtype="int64",
    init_scale=2.0,
    s=(0.5, 1.0),
    p=(1.0, 0.0),
    q=(-2.0, 1.0),
    a=(0.25, 0.0),
    b=(0.5, 1.0),
    c=(3.0, 0.0),
    h=((), (0.125,)),
    clip=4.0,
    source="HandWritten",
)

finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    steps = draw(st.integers(1, 8))
    column = st.lists(finite, min_size=steps, max_size=steps).map(tuple)
    timesteps, s, p, q, a, b, c = (draw(column) for _ in range(7))
    h = tuple(tuple(draw(st.lists(finite, max_size=k))) for k in range(steps))
    clip = draw(st.none() | st.floats(0.1, 10))
    dtype = draw(st.sampled_from(["int64", "float32"]))
    return Schedule(timesteps, dtype, draw(finite), s, p, q, a, b, c, h, clip, "Drawn")


def test_sample_loop_by_hand() -> None:
    inputs: list[float] = []
    states: list[tuple[int, float, float]] = []

    def denoise(k: int, scaled: Any) -> Any:
        inputs.append(float(scaled[0]))
        return np.array([-10.0, 7.0][k : k + 1], dtype=np.float32)

    x = sample_loop(
        TWO_STEPS,
        np.array([2.0], dtype=np.float32),
        denoise,
        lambda k: np.array([{0: 1.5}[k]], dtype=np.float32),
        lambda k, x, x0: states.append((k, float(x[0]), float(x0[0]))),
    )
    # Step 0: x0 = clip(2 + 20) = 4, x = 0.25 * 2 + 0.5 * 4 + 3 * 1.5 = 7. Step 1: x0 = clip(7) = 4, x = 4 + 0.125 * 4.
    assert inputs == [1.0, 7.0]
    assert states == [(0, 7.0, 4.0), (1, 4.5, 4.0)]
    assert x.tolist() == [4.5]


def test_arithmetic_is_float32_on_devices() -> None:
    third = replace(TWO_STEPS, a=(1 / 3, 0.0), b=(0.0, 1.0), c=(0.0, 0.0))
    x = np.array([1.0], dtype=np.float32)
    following, x0 = advance(third, 0, x, x, None, [])
    assert (following.dtype, x0.dtype) == (np.float32, np.float32)
    assert following[0] == np.float32(1 / 3)
    wide, _ = advance(third, 0, x.astype(np.float64), x.astype(np.float64), None, [])
    assert wide[0] == 1 / 3


def test_uses_noise_network_input_and_timestep() -> None:
    assert [TWO_STEPS.uses_noise(k) for k in range(TWO_STEPS.steps)] == [True, False]
    assert TWO_STEPS.network_input(0, np.array([3.0], dtype=np.float32)).tolist() == [1.5]
    assert TWO_STEPS.timestep(1).dtype == np.int64
    assert TWO_STEPS.timestep(1).tolist() == [499]


@given(schedules())
def test_json_round_trip_is_exact(schedule: Schedule) -> None:
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"timesteps": ()}, "schedule has no steps, expected at least one timestep", id="empty"),
        pytest.param({"a": (1.0,)}, "schedule.a has 1 entries, expected 2", id="short column"),
        pytest.param({"h": ((), (), ())}, "schedule.h has 3 entries, expected 2", id="long history"),
        pytest.param({"h": ((1.0,), ())}, "schedule.h[0] has 1 entries, expected at most 0", id="history before start"),
        pytest.param({"c": (0.0, float("nan"))}, "schedule.c holds nan at index 1, expected a finite number", id="nan"),
        pytest.param(
            {"h": ((), (float("inf"),))}, "schedule.h[1] holds inf at index 0, expected a finite number", id="inf"
        ),
        pytest.param(
            {"init_scale": float("inf")},
            "schedule.init_scale holds inf at index 0, expected a finite number",
            id="init",
        ),
        pytest.param({"clip": 0.0}, "schedule.clip is 0.0, expected a positive number or None", id="clip"),
        pytest.param(
            {"timestep_dtype": "object"},
            "schedule.timestep_dtype is 'object', expected one of int32, int64, float16, float32, float64",
            id="dtype",
        ),
    ],
)
def test_broken_tables_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        replace(TWO_STEPS, **changes)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"typo": 1}, "schedule has missing keys [] and unknown keys ['typo']", id="unknown key"),
        pytest.param({"a": "12"}, "schedule.a is '12', expected a list of numbers", id="text"),
        pytest.param({"p": [True, 0.0]}, "schedule.p is True, expected a number", id="bool"),
        pytest.param({"clip": "4"}, "schedule.clip is '4', expected a number", id="clip as text"),
        pytest.param({"h": None}, "schedule.h is NoneType, expected a list of lists of numbers", id="no history"),
    ],
)
def test_broken_json_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_json(TWO_STEPS.to_json() | changes)
    assert caught.value.message == message


def test_missing_key_is_refused() -> None:
    data = TWO_STEPS.to_json()
    del data["q"]
    with pytest.raises(ScheduleError, match=r"^schedule has missing keys \['q'\] and unknown keys \[\]$"):
        Schedule.from_json(data)


ONE = np.ones((1,), dtype=np.float32)


@pytest.mark.parametrize(
    ("k", "x", "F", "noise", "message"),
    [
        pytest.param(0, ONE, ONE, None, "noise of step 0 is missing, expected float32 [1]", id="no noise"),
        pytest.param(1, ONE, ONE, None, "history of step 1 has 0 entries, expected at least 1", id="no history"),
        pytest.param(
            0,
            ONE,
            np.ones((2,), np.float32),
            ONE,
            "network output of step 0 is float32 [2], expected float32 [1]",
            id="F",
        ),
        pytest.param(
            0,
            ONE,
            ONE,
            ONE.astype(np.float64),
            "noise of step 0 is float64 [1], expected float32 [1]",
            id="noise dtype",
        ),
        pytest.param(
            0, ONE.astype(np.float16), ONE, ONE, "latent of step 0 is float16, expected float32", id="half latent"
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(k: int, x: Any, F: Any, noise: Any, message: str) -> None:
    with pytest.raises(ContractError) as caught:
        advance(TWO_STEPS, k, x, F, noise, [])
    assert caught.value.message == message

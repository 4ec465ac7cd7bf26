"""Ranges: exact extremes, histograms against numpy, what each method may promise, and clear refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fewstep.calibration.histogram import BINS, Histogram, bin_of, merge
from fewstep.calibration.observe import observe
from fewstep.calibration.ranges import METHODS, Range, StepRanges, estimate
from fewstep.errors import CalibrationError

Calls = Callable[[], Iterator[tuple[int, tuple[torch.Tensor, ...]]]]

ARRAYS = hnp.arrays(
    np.float64,
    st.integers(1, 400),
    elements=st.floats(-100, 100, allow_subnormal=False).map(lambda x: float(np.float32(x))),
)
SEARCHES = ("lp", "mse", "l1", "cosine", "kl")


def histogram_of(x: Any, ema: tuple[float, float] | None = None) -> Histogram:
    x = np.asarray(x, dtype=np.float64)
    low, high = float(x.min()), float(x.max())
    counts = np.bincount(bin_of(x, low, high), minlength=BINS)
    return Histogram(low, high, counts, 1, *(ema or (low, high)))


def quantized(x: Any, chosen: Range, bits: int, symmetric: bool) -> Any:
    scale, zero = chosen.grid(bits, symmetric=symmetric)
    least, most = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    return (np.clip(np.rint(x / scale) + zero, least, most) - zero) * scale


def norm(error: Any, p: float) -> float:
    largest = np.abs(error).max()
    return 0.0 if largest == 0 else float(largest * np.mean(np.abs(error / largest) ** p) ** (1 / p))


@given(ARRAYS, st.sampled_from([4, 8]), st.booleans())
def test_the_true_error_of_a_searched_range_is_that_of_minmax_at_most(x: Any, bits: int, symmetric: bool) -> None:
    # The distance to the nearest integer of a grid, clipping included, changes by no more than its argument, and no
    # value is further than a bin from what stands for it. So either error as the histogram sees it is within a bin of
    # the true one, in any norm (Minkowski).
    histogram = histogram_of(x)
    widest = estimate(histogram, "minmax", symmetric=symmetric)
    for method, p in (("lp", 2.4), ("mse", 2.0), ("l1", 1.0)):
        chosen = estimate(histogram, method, bits=bits, symmetric=symmetric)
        ours = norm(quantized(x, chosen, bits, symmetric) - x, p)
        theirs = norm(quantized(x, widest, bits, symmetric) - x, p)
        assert ours <= theirs + 2 * histogram.width + 1e-9 * np.abs(x).max(), (method, ours, theirs, histogram.width)


@given(ARRAYS, st.sampled_from(METHODS), st.booleans())
def test_ranges_lie_in_that_of_minmax_and_hold_zero(x: Any, method: str, symmetric: bool) -> None:
    histogram = histogram_of(x, ema=(float(np.median(x)), float(np.median(x))))
    widest = estimate(histogram, "minmax", symmetric=symmetric)
    chosen = estimate(histogram, method, symmetric=symmetric)
    assert widest.low <= chosen.low <= 0 <= chosen.high <= widest.high
    assert not symmetric or chosen.low == -chosen.high
    _, zero = chosen.grid(8, symmetric=False)
    assert 0 <= zero <= 255


@given(ARRAYS, st.sampled_from(METHODS), st.integers(-8, 8), st.booleans())
def test_a_scaled_tensor_has_the_scaled_range(x: Any, method: str, power: int, symmetric: bool) -> None:
    # By a power of two: nothing rounds differently, so the choice is the same candidate.
    k = 2.0**power
    plain, scaled = (estimate(histogram_of(x * f), method, bits=4, symmetric=symmetric) for f in (1.0, k))
    assert scaled == Range(plain.low * k, plain.high * k)


@given(ARRAYS, st.booleans())
def test_percentiles_are_nested_and_reach_minmax(x: Any, symmetric: bool) -> None:
    histogram = histogram_of(x)
    found = [estimate(histogram, "percentile", symmetric=symmetric, percentile=p) for p in (90, 99, 99.99, 100)]
    assert all(a.low >= b.low and a.high <= b.high for a, b in itertools.pairwise(found))
    assert found[-1] == estimate(histogram, "minmax", symmetric=symmetric)


def test_percentile_is_numpys_within_a_bin() -> None:
    x = np.random.default_rng(0).normal(size=100_000)
    histogram = histogram_of(x)
    found = estimate(histogram, "percentile", percentile=99)
    oracle = np.percentile(x, [1, 99])
    assert np.abs(np.array([found.low, found.high]) - oracle).max() <= histogram.width


def test_outliers_are_clipped_where_the_method_says_so() -> None:
    x = np.concatenate([np.random.default_rng(1).normal(size=100_000), [60.0]])
    histogram = histogram_of(x)
    highs = {method: estimate(histogram, method, bits=4, symmetric=True).high for method in METHODS}
    assert highs["minmax"] == highs["ema"] == 60.0
    assert highs["percentile"] < 5
    assert all(1 < highs[method] < 30 for method in SEARCHES), highs
    # A larger power punishes clipping more.
    assert highs["l1"] <= highs["mse"] <= highs["lp"]


def test_one_end_may_shrink_alone() -> None:
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.uniform(-1, 1, 50_000), [40.0]])
    found = estimate(histogram_of(x), "mse", bits=4)
    assert found.low < -0.7
    assert found.high < 3


def test_cosine_finds_what_a_plain_search_finds() -> None:
    x = np.random.default_rng(3).standard_t(3, size=20_000)
    histogram = histogram_of(x)
    top = np.abs(x).max()

    def similarity(high: float) -> float:
        q = quantized(x, Range(-high, high), 4, True)
        return float(q @ x / np.sqrt((q @ q) * (x @ x)))

    best = max(similarity(top * f / 100) for f in range(1, 101))
    chosen = estimate(histogram, "cosine", bits=4, symmetric=True).high
    # Off by what the bins hide.
    assert similarity(chosen) >= best - 1e-4


def test_entropy_keeps_a_uniform_tensor_whole_and_cuts_a_long_tail() -> None:
    rng = np.random.default_rng(4)
    uniform = estimate(histogram_of(rng.uniform(-1, 1, 200_000)), "kl", symmetric=True)
    assert uniform.high > 0.95
    laplace = rng.laplace(size=200_000)
    assert estimate(histogram_of(laplace), "kl", symmetric=True).high < 0.9 * np.abs(laplace).max()


@given(st.lists(ARRAYS, min_size=1, max_size=4))
def test_merging_keeps_counts_and_extremes_and_moves_values_by_less_than_a_bin(parts: list[Any]) -> None:
    merged = merge([histogram_of(x) for x in parts])
    x = np.sort(np.concatenate(parts))
    assert (merged.low, merged.high, merged.count) == (x[0], x[-1], len(x))
    if merged.low == merged.high:
        return
    # As many values lie below an edge as truly do, up to those within a bin of it and one rounding for each part.
    edges = np.linspace(x[0], x[-1], BINS + 1)[1:-1]
    below = np.cumsum(merged.counts)[:-1]
    slack = len(parts)
    assert (below >= np.searchsorted(x, edges - merged.width * 1.0001) - slack).all()
    assert (below <= np.searchsorted(x, edges + merged.width * 1.0001, side="right") + slack).all()


def test_unknown_methods_and_settings_are_refused() -> None:
    histogram = histogram_of([0.0, 1.0])
    with pytest.raises(CalibrationError, match=r"range method is 'cosin'.*\n\nhint: did you mean 'cosine'"):
        estimate(histogram, "cosin")
    with pytest.raises(CalibrationError, match="bits is 1, expected at least 2"):
        estimate(histogram, bits=1)
    with pytest.raises(CalibrationError, match="percentile is 30, expected above 50"):
        estimate(histogram, "percentile", percentile=30)


# ----------------------------------------------------------------------------------------------------------- observing


class Net(torch.nn.Module):
    """Scales by the time, then a ReLU; the sum of integers is no tensor of floats."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = x * t
        return torch.relu(scaled), t.long() + 1


def graph() -> torch.fx.GraphModule:
    exported = torch.export.export(Net(), (torch.zeros(1, 50), torch.zeros(1)))
    module = exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    return module


POINTS = {"input": "x", "scaled": "mul", "out": "relu"}


def calls_of(steps: int, repeats: int = 3) -> Calls:
    def calls() -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
        generator = torch.Generator().manual_seed(0)
        for i in range(steps * repeats):
            yield i % steps, (torch.randn(1, 50, generator=generator), torch.full((1,), 1.0 + i % steps))

    return calls


@pytest.fixture(scope="module")
def ranges() -> StepRanges:
    return observe(graph(), POINTS, calls_of(2))


def test_extremes_and_counts_are_those_of_numpy(ranges: StepRanges) -> None:
    for step in (0, 1):
        x = torch.cat([a * t for s, (a, t) in calls_of(2)() if s == step]).double().numpy()
        found = ranges.at("scaled", step)
        assert (found.low, found.high, found.count, found.calls) == (x.min(), x.max(), x.size, 3)
        assert np.array_equal(found.counts, np.histogram(x, bins=BINS, range=(x.min(), x.max()))[0])
        low = high = None
        for row in x:
            low = row.min() if low is None else 0.9 * low + 0.1 * row.min()
            high = row.max() if high is None else 0.9 * high + 0.1 * row.max()
        # The two ways of writing the running mean round differently.
        assert (found.ema_low, found.ema_high) == pytest.approx((low, high), rel=1e-12)
    assert ranges.at("out", 0).low == 0.0
    assert ranges.merged("scaled").count == 300
    assert ranges.merged("scaled", [1]) is ranges.at("scaled", 1)


def test_saving_is_exact_and_deterministic(ranges: StepRanges, tmp_path: Path) -> None:
    ranges.save(tmp_path / "a.safetensors")
    observe(graph(), POINTS, calls_of(2)).save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    loaded = StepRanges.load(tmp_path / "a.safetensors")
    assert (loaded.points, loaded.steps) == (ranges.points, ranges.steps)
    for key, histogram in ranges.histograms.items():
        again = loaded.histograms[key]
        assert np.array_equal(again.counts, histogram.counts)
        assert (again.low, again.high, again.calls, again.ema_low) == (
            histogram.low,
            histogram.high,
            histogram.calls,
            histogram.ema_low,
        )


def test_a_constant_tensor_has_a_range() -> None:
    def calls() -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
        yield 0, (torch.full((1, 50), -2.0), torch.ones(1))

    found = observe(graph(), POINTS, calls)
    assert estimate(found.at("scaled", 0), "lp") == Range(-2.0, 0.0)
    assert estimate(found.at("out", 0), "lp") == Range(0.0, 0.0)
    assert Range(0.0, 0.0).grid(8, symmetric=True) == (1.0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_point_and_step(value: float) -> None:
    def calls() -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
        for step, (x, t) in calls_of(2)():
            yield step, (x, t if step == 0 else t * value)

    with pytest.raises(CalibrationError, match="scaled has values that are not finite at step 1"):
        observe(graph(), POINTS, calls)


def test_missing_calls_are_refused() -> None:
    with pytest.raises(CalibrationError, match="there is no calibration call"):
        observe(graph(), POINTS, lambda: [])
    with pytest.raises(CalibrationError, match=r"calls of steps \[0, 2\], expected every one of \[0, 1, 2\]"):
        observe(graph(), POINTS, lambda: [c for c in calls_of(3)() if c[0] != 1])
    with pytest.raises(CalibrationError, match=r"calls of steps \[0, 1\], expected every one of \[0, 1, 2, 3\]"):
        observe(graph(), POINTS, calls_of(2), steps=range(4))


def test_points_must_be_tensors_of_floats() -> None:
    with pytest.raises(CalibrationError, match="y is to be read at no_such, which is no node"):
        observe(graph(), {"y": "no_such"}, calls_of(1))
    with pytest.raises(CalibrationError, match="there are no points to observe"):
        observe(graph(), {}, calls_of(1))
    integers = next(n.name for n in graph().graph.nodes if n.op == "call_function" and "add" in n.name)
    with pytest.raises(CalibrationError, match=rf"y is torch.int64 \[1\] at {integers}, expected a tensor of floats"):
        observe(graph(), {"y": integers}, calls_of(1))


def test_calls_that_change_between_passes_are_refused() -> None:
    passes = iter(range(9))

    def calls() -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
        scale = 1.0 + next(passes)
        for step, (x, t) in calls_of(1)():
            yield step, (x * scale, t)

    with pytest.raises(CalibrationError, match="input has other values at step 0 in the second pass"):
        observe(graph(), POINTS, calls)
    runs = iter([3, 2])
    with pytest.raises(CalibrationError, match="has other values at step 0 in the second pass"):
        observe(graph(), POINTS, lambda: calls_of(1, next(runs))())


def test_unknown_points_and_steps_are_refused(ranges: StepRanges) -> None:
    with pytest.raises(CalibrationError, match="no ranges of 'scale' among 3 points\n\nhint: did you mean 'scaled'"):
        ranges.at("scale", 0)
    with pytest.raises(CalibrationError, match="out was not observed at step 5, only at steps 0, 1"):
        ranges.merged("out", [0, 5])
    with pytest.raises(CalibrationError, match="no histograms to merge"):
        ranges.merged("out", [])
    with pytest.raises(CalibrationError, match="out has no values at step 2"):
        StepRanges(("out",), (0, 1, 2), ranges.histograms)


def test_a_file_of_something_else_is_refused(ranges: StepRanges, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(CalibrationError, match="does not hold ranges"):
        StepRanges.load(path)
    with pytest.raises(CalibrationError, match="does not hold ranges"):
        StepRanges.load(tmp_path / "missing.safetensors")

"""Calibration sets: what is kept, keyed by true step and time, seeded, resumable; and what each sampler keeps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.bundle.samples import Sample, load_sample
from fewstep.calibration import sets
from fewstep.calibration.features import middle_of
from fewstep.calibration.observe import observe
from fewstep.calibration.prompts import GENERAL_PROMPTS, calibration_prompts, read_prompts
from fewstep.calibration.samplers import SAMPLERS, Question, allot, prompt_order, spread, step_weights
from fewstep.calibration.sets import CalibrationSet, collect
from fewstep.errors import CalibrationError
from fewstep.export import Description, Generator, describe, load, record, trace
from fewstep.optimize import RoundWeights
from fewstep.stickers.prompts import CALIBRATION_PROMPTS, HELD_OUT_PROMPTS, PROMPTS
from tests.support import tiny
from tests.support.bundles import plain_generator

STEPS = 4
TEXTS = ("cat", "dog", "house")

Make = Callable[..., CalibrationSet]


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return load(str(tiny.lcm_folder(tmp_path_factory.mktemp("lcm"))))


@pytest.fixture(scope="module")
def described(generator: Generator) -> Description:
    return describe(generator, [2, STEPS])


@pytest.fixture
def make(generator: Generator, described: Description, tmp_path: Path) -> Make:
    """Returns a function that collects a small set into ``tmp_path / sampler``."""

    def collected(sampler: str = "own", size: int = 8, **changed: Any) -> CalibrationSet:
        given = {"prompts": TEXTS, "seed": 0, "steps": STEPS, "guidance": 8.5, "folder": tmp_path / sampler, **changed}
        return collect(generator, described, sampler, given.pop("prompts"), size=size, **given)

    return collected


def test_own_holds_every_call_of_the_reference(make: Make, generator: Generator, described: Description) -> None:
    made = make(size=7)
    assert len(made.shards) == 2, "7 calls round up to two whole trajectories of 4"
    times = described.schedules[STEPS].timesteps
    feeds = list(made.feeds("denoiser"))
    assert [(f.step, f.timestep) for f in feeds] == [(k, times[k]) for k in range(STEPS)] * 2
    # The same call, by the recorder itself.
    head = sets.read_head(made.folder / made.shards[1])
    sample = record(generator, described, head["prompt"], head["seed"], steps=STEPS, guidance=8.5)
    again = [f for f in sample.feeds if f.component == "denoiser"]
    for ours, theirs in zip(feeds[STEPS:], again, strict=True):
        assert all(np.array_equal(ours.inputs[name], theirs.inputs[name]) for name in theirs.inputs)
        assert all(np.array_equal(ours.outputs[name], theirs.outputs[name]) for name in theirs.outputs)
    rows = made.coverage()
    assert [(r.component, r.step) for r in rows] == [
        ("text_encoder", None),
        *(("denoiser", k) for k in range(STEPS)),
        ("decoder", None),
    ]
    assert all((r.count, r.prompts, r.seeds, r.branch) == (2, 2, 2, "cond") for r in rows)
    assert [r.timesteps for r in rows] == [(), *((t,) for t in times), ()]


def test_calls_are_what_a_traced_component_takes(make: Make, generator: Generator, described: Description) -> None:
    made = make()
    for component in described.components:
        program = trace(generator, described.wirings[component], described.components[component])
        graph = program.exported.module()
        assert isinstance(graph, torch.fx.GraphModule)
        result = next(a for a in graph.graph.output_node().all_input_nodes)
        ranges = observe(graph, {"result": result.name}, partial(made.calls, component))
        assert ranges.steps == (tuple(range(STEPS)) if component == "denoiser" else (0,))
        feeds = [f for f in made.feeds(component) if f.step in (None, 0)]
        outputs = np.concatenate([next(iter(f.outputs.values())).ravel() for f in feeds])
        found = ranges.at("result", 0)
        # float32 rounding between the pipeline and the traced program
        assert (found.low, found.high) == pytest.approx((outputs.min(), outputs.max()), rel=1e-4, abs=1e-5)


def test_a_seed_means_the_same_bytes_and_another_one_others(make: Make, tmp_path: Path) -> None:
    one, two, other = make(folder=tmp_path / "a"), make(folder=tmp_path / "b"), make(folder=tmp_path / "c", seed=1)
    assert (one.shards, one.key) == (two.shards, two.key)
    for name in (*one.shards, sets.INDEX):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert other.key != one.key
    latents = [next(s.feeds("denoiser")).inputs["sample"] for s in (one, other)]
    assert not np.array_equal(*latents)


def test_an_interrupted_collection_goes_on(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []
    plain = sets.record_samples

    def interrupted(*given: Any) -> Iterator[Any]:
        if len(recorded) == 2:
            raise KeyboardInterrupt
        recorded.append(given[-1][0].prompt)
        yield from plain(*given)

    with monkeypatch.context() as patch:
        patch.setattr(sets, "record_samples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(size=12)
    with pytest.raises(CalibrationError, match=r"is not a finished calibration set.*\n\nhint: run `fewstep calibrate`"):
        CalibrationSet.open(tmp_path / "own")
    kept = len(recorded)
    monkeypatch.setattr(sets, "record_samples", lambda *given: recorded.append("again") or plain(*given))
    made = make(size=12)
    assert recorded[kept:] == ["again"]
    assert CalibrationSet.open(made.folder) == made
    # A larger set takes over what is there; another guidance, weights or seed do not.
    recorded.clear()
    larger = make(size=16)
    assert len(recorded) == 1
    assert larger.shards[:3] == made.shards
    recorded.clear()
    make(size=16, guidance=2.0)
    assert len(recorded) == 4
    assert len(list(made.folder.iterdir())) == 4 + 1, "shards of the other guidance are removed"


def test_damaged_shards_are_made_again_and_missing_ones_reported(make: Make) -> None:
    made = make()
    path = made.folder / made.shards[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    make()
    assert path.read_bytes() == whole
    path.unlink()
    with pytest.raises(CalibrationError, match="safetensors is missing"):
        CalibrationSet.open(made.folder)


def test_two_collections_of_one_set_in_one_folder_do_not_disturb_each_other(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, others = sets.save_sample, iter([0, 1])

    def interleaved(sample: Sample, path: Path) -> None:
        plain(sample, path)
        if next(others, None) == 1:  # the second shard is written, not renamed, when another process makes the set
            make()

    monkeypatch.setattr(sets, "save_sample", interleaved)
    made = make()
    assert CalibrationSet.open(made.folder) == made
    assert len(list(made.samples())) == len(made.shards) == 2
    assert {path.name for path in made.folder.iterdir()} == {*made.shards, sets.INDEX}


def test_changed_weights_make_another_set(
    make: Make, generator: Generator, described: Description, tmp_path: Path
) -> None:
    made = make()
    rounded, _ = RoundWeights()(generator)
    other = collect(
        rounded, described, "own", TEXTS, size=8, seed=0, steps=STEPS, guidance=8.5, folder=tmp_path / "rounded"
    )
    assert not set(other.shards) & set(made.shards)


def test_both_branches_of_guidance_are_kept(tmp_path: Path) -> None:
    generator = load(str(tiny.turbo_folder(tmp_path / "turbo")), guidance=3.0)
    described = describe(generator, [2])
    made = collect(
        generator, described, "uniform", TEXTS, size=4, seed=0, steps=2, guidance=3.0, folder=tmp_path / "two"
    )
    found = {(r.component, r.step, r.branch): r.count for r in made.coverage()}
    assert {found["denoiser", step, branch] for step in (0, 1) for branch in ("cond", "uncond")} == {2}
    assert found["text_encoder", None, "uncond"] == found["text_encoder", None, "cond"] == 2
    assert found["decoder", None, "cond"] == 2


def test_generators_without_text_calibrate_too(tmp_path: Path) -> None:
    generator = plain_generator()
    described = describe(generator, [2])
    texts = calibration_prompts(generator)
    assert texts == ("",)
    made = collect(generator, described, "own", texts, size=4, seed=0, steps=2, guidance=0.0, folder=tmp_path / "x")
    classes = [f.inputs["label"].tolist() for f in made.feeds("denoiser") if f.step == 0]
    assert len(classes) == 2
    assert classes[0] != classes[1], "other inputs vary too"


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"own"}))
def test_each_sampler_collects_as_many_calls_as_asked_for(make: Make, sampler: str, described: Description) -> None:
    made = make(sampler, size=12)
    feeds = list(made.feeds("denoiser"))
    assert len(feeds) == 12
    times = described.schedules[STEPS].timesteps
    assert all(f.timestep == times[f.step] for f in feeds if f.step is not None), "state and time label agree"
    decoded = next(r.count for r in made.coverage() if r.component == "decoder")
    assert decoded == 3, "components that run once are as many as calls of one step"
    assert made.note
    if sampler in ("uniform", "tdac", "qsample", "random"):
        assert {f.step for f in feeds} == set(range(STEPS))
    if sampler == "single":
        assert {f.step for f in feeds} == {2}
        assert {step for step, _ in made.calls("denoiser", by_step=False)} == {0}
    if sampler == "first":
        heads = [sets.read_head(made.folder / name) for name in made.shards]
        assert [h["prompt"] for h in heads] == list(TEXTS)


def test_replaced_latents_keep_the_size_of_the_true_ones(make: Make) -> None:
    true = list(make("own", size=40).feeds("denoiser"))
    for sampler in ("qsample", "random"):
        made = make(sampler, size=40)
        for ours, theirs in zip(made.feeds("denoiser"), true, strict=True):
            x, y = ours.inputs["sample"], theirs.inputs["sample"]
            assert x.dtype == y.dtype
            assert not np.array_equal(x, y)
            # 256 elements: the spread of normal noise is known to 1 / sqrt(512) = 4.4 %, here within five times that.
            assert x.std() == pytest.approx(y.std(), rel=0.22)
            assert np.array_equal(ours.inputs["encoder_hidden_states"], theirs.inputs["encoder_hidden_states"])
            assert ours.outputs == {}
    # States that are made of the final latent share as much with it as the true ones do.
    likeness = {
        sampler: [np.corrcoef(x, z)[0, 1] for x, z in latents_of(make(sampler, size=40))]
        for sampler in ("own", "qsample", "random")
    }
    # A correlation over 256 values is known to 1 / sqrt(256) = 6 %.
    assert likeness["qsample"] == pytest.approx(likeness["own"], abs=0.3)
    assert max(likeness["own"]) > 0.5
    assert np.abs(likeness["random"]).max() < 0.3


def latents_of(made: CalibrationSet) -> Iterator[tuple[Any, Any]]:
    """Yields the latent of each call and the final one of its trajectory, flat."""
    for name in made.shards:
        sample = load_sample(made.folder / name)
        for feed in sample.feeds:
            if feed.component == "denoiser":
                yield feed.inputs["sample"].ravel(), sample.latents[-1].ravel()


# ------------------------------------------------------------------------------------------------------------- choices


def question(size: int, steps: int, features: Any = None) -> Question:
    return Question(size, steps, 0, features or (lambda: pytest.fail("no features are needed")))


def shares(name: str, size: int, steps: int, features: Any = None) -> list[int]:
    choice = SAMPLERS[name].choose(question(size, steps, features))
    counts = Counter(itertools.chain(*choice.kept))
    return [counts[k] for k in range(steps)]


def test_ndtc_leans_to_clean_states_as_its_script_does() -> None:
    # Normal(0.4, 0.4) in units of the time: shares of the four quarters from clean to noise, clamped at both ends
    # (Phi(-0.375) = 0.354, Phi(0.25) = 0.599, Phi(0.875) = 0.809).
    expected = [0.354, 0.245, 0.210, 0.191]
    counts = shares("ndtc", 40_000, 4)
    assert [c / 40_000 for c in reversed(counts)] == pytest.approx(expected, abs=0.01)
    assert shares("ndtc", 50, 1) == [50]


def test_tdac_prefers_typical_and_odd_steps_and_is_uniform_where_it_cannot_tell() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 1, 64))
    alike = base + 0.1 * rng.normal(size=(4, 5, 64))
    odd = -3 * base + 0.1 * rng.normal(size=(4, 1, 64))
    features = np.concatenate([alike, odd], axis=1)
    weights = step_weights(features)
    assert weights is not None
    assert weights[5] == pytest.approx(1.0), "no neighbours, but all the variety"
    counts = shares("tdac", 60, 6, lambda: (features, "mid_block"))
    assert sum(counts) == 60
    assert min(counts) >= 1
    same = SAMPLERS["tdac"].choose(question(8, 4, lambda: (np.ones((2, 4, 8)), "mid_block")))
    assert "tdac is uniform here, by mid_block all steps are alike" in same.note
    assert Counter(itertools.chain(*same.kept)) == {k: 2 for k in range(4)}
    assert "2 steps leave nothing to compare" in SAMPLERS["tdac"].choose(question(8, 2)).note


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 60))
def test_allotment_gives_each_step_one_and_all_together_the_size(weights: list[float], more: int) -> None:
    size = len(weights) + more
    counts = allot(np.array(weights), size)
    assert sum(counts) == size
    exact = np.array(weights) / sum(weights) * more + 1
    assert np.abs(np.array(counts) - exact).max() < 1, "largest remainders stay within one of the exact share"
    assert Counter(itertools.chain(*spread(counts))) == dict(enumerate(counts))


@given(st.integers(1, 7), st.integers(1, 8))
def test_prompts_and_steps_are_crossed(prompts: int, steps: int) -> None:
    order = prompt_order(prompts * steps, prompts, steps, seed=3, in_order=False)
    assert set(Counter((p, i % steps) for i, p in enumerate(order)).values()) == {1}


def test_a_middle_is_found_in_any_network() -> None:
    assert middle_of(tiny.unet()) == "mid_block"
    blocks = torch.nn.Module()
    blocks.layers = torch.nn.ModuleList([torch.nn.Identity() for _ in range(5)])
    assert middle_of(blocks) == "layers.2"
    assert middle_of(torch.nn.Linear(2, 2)) is None


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_collected_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"sampler is 'tdca', expected one of own, .*\n\nhint: did you mean 'tdac'"
    ):
        make("tdca")
    with pytest.raises(CalibrationError, match="there are no prompts to calibrate with"):
        make(prompts=())
    with pytest.raises(CalibrationError, match="size is 0, expected at least one call"):
        make(size=0)
    with pytest.raises(CalibrationError, match="no schedule for 3 steps to calibrate, expected 2, 4"):
        make(steps=3)
    with pytest.raises(CalibrationError, match="size is 2, expected at least one call for each of 4 steps"):
        make("tdac", size=2)
    with pytest.raises(CalibrationError, match="has no encoder, it has text_encoder, denoiser, decoder"):
        next(make().feeds("encoder"))
    assert not (tmp_path / "tdca").exists()


def test_prompts_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog  \na cat\nüber\n", encoding="utf-8")
    assert read_prompts(path) == ("a cat", "a dog", "über")
    path.write_text("\n \n")
    with pytest.raises(CalibrationError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        CalibrationError, match=r"cannot be read as a list of prompts.*\n\nhint: give a UTF-8 text file"
    ):
        read_prompts(path)
    with pytest.raises(CalibrationError, match="cannot be read as a list of prompts"):
        read_prompts(tmp_path / "none.txt")


def test_no_prompt_is_calibrated_and_checked_with(generator: Generator) -> None:
    assert not set(calibration_prompts(generator)) & set(generator.prompts)
    assert len(set(GENERAL_PROMPTS)) == len(GENERAL_PROMPTS)
    together = [*PROMPTS, *CALIBRATION_PROMPTS, *HELD_OUT_PROMPTS]
    assert len(set(together)) == len(together) == 8 + 64 + 64
    stickers = load("stickers")
    assert calibration_prompts(stickers) == CALIBRATION_PROMPTS

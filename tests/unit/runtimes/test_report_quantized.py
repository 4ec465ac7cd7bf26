"""The report's section on quantization: the plan, why tensors stay in float, and what the calibration covers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fewstep.calibration import CalibrationSet
from fewstep.calibration.sets import Coverage
from fewstep.optimize.quantize import ComponentPlan, Grid, QuantPlan
from fewstep.report import PictureRow, Section, render
from fewstep.report.quantized import quantization_facts
from fewstep.report.rows import CoverageRow, PlanRow, QuantizationFacts, ReasonRow
from tests.support.quantized import painted
from tests.support.reports import HOSTILE, PASSED, Page, empty_report, full_report, picture


def grid(bits: int, *, channels: int | None = None, group_size: int | None = None) -> Grid:
    shape = (1,) if channels is None else (channels,) if group_size is None else (channels, 2)
    high = 2 ** (bits - 1) - 1
    axis = None if channels is None else 0
    return Grid("int8", -high, high, np.ones(shape, np.float32), np.zeros(shape, np.int32), axis, group_size)


PLAN = QuantPlan(
    "ab" * 32,
    "x86",
    {
        "denoiser": ComponentPlan(
            "cd" * 32,
            {"a.weight": grid(8, channels=4), "b.weight": grid(4, channels=4, group_size=8), "c.weight": grid(8)},
            {"conv2d": grid(8)},
            computes=("a",),
            reasons={"time.weight": "time path", "t2.weight": "time path", "add": "residual", "add_1": "residual"},
        ),
        "decoder": ComponentPlan("ef" * 32, {}, {}),
    },
)
RECIPE = {"ranges": "mse", "rounding": "gptq"}


@pytest.fixture
def calibration(monkeypatch: pytest.MonkeyPatch) -> CalibrationSet:
    rows = [Coverage("denoiser", 0, "cond", 32, 8, 4, (999.0,)), Coverage("decoder", None, "cond", 8, 8, 4, ())]
    monkeypatch.setattr(CalibrationSet, "coverage", lambda _: rows)
    return CalibrationSet(Path(), (), "own", "all steps of 8 trajectories", 4, 8.5, 3, {}, "")


def test_facts_of_a_plan(calibration: CalibrationSet) -> None:
    facts = quantization_facts(RECIPE, PLAN, calibration)
    assert facts.plans == [
        PlanRow("denoiser", "1 at 4 bits, 2 at 8 bits", "1 per channel, 1 per group, 1 per tensor", 1, 1, 2),
        PlanRow("decoder", "none", "none", 0, 0, 0),
    ]
    assert facts.reasons == [
        ReasonRow("denoiser", "weight", 2, "time.weight", "time path"),
        ReasonRow("denoiser", "operation", 2, "add", "residual"),
    ]
    assert facts.coverage[0] == CoverageRow("denoiser", 0, "cond", 32, 8, 4, (999.0,))
    values = {section.key: section.value for section in facts.methods}
    assert values["ranges of activations"] == "mse"
    assert values["calibration"] == "own: all steps of 8 trajectories; seed 3"


def test_grids_of_each_call_are_counted() -> None:
    first = dataclasses.replace(PLAN.components["denoiser"], dynamic=PLAN.components["denoiser"].computes)
    plan = dataclasses.replace(PLAN, components={**PLAN.components, "denoiser": first})
    values = {section.key: section.value for section in quantization_facts(RECIPE, plan, None).methods}
    assert values["grids that each call finds"] == "1 operations, a grid for each row of their data"
    assert "grids that each call finds" not in {s.key for s in quantization_facts(RECIPE, PLAN, None).methods}


def test_the_section(calibration: CalibrationSet) -> None:
    facts = quantization_facts(RECIPE, PLAN, calibration)
    html = render(dataclasses.replace(empty_report(), checks=(PASSED,), quantization=facts))
    text = Page(html).text.replace(" ", "")  # cells touch
    assert 'href="#quantization"' in html
    for sentence in ("denoiser 1 at 4 bits, 2 at 8 bits 1 per channel", "denoiser 2 weight time.weight time path",
                     "denoiser 0 cond 32 8 4 999", "own: all steps of 8 trajectories; seed 3"):  # fmt: skip
        assert "".join(sentence.split()) in "".join(text.split()), sentence


def test_what_was_not_recorded_is_said() -> None:
    facts = quantization_facts(RECIPE, PLAN, None)
    html = render(dataclasses.replace(empty_report(), quantization=facts))
    assert "What was calibrated with was not recorded." in Page(html).text
    assert "quantization" not in render(empty_report()).lower().replace("quantization levels", "")


def test_hostile_texts_are_only_read() -> None:
    facts = QuantizationFacts(
        [Section(HOSTILE, HOSTILE)],
        [PlanRow(HOSTILE, HOSTILE, HOSTILE, 1, 1, 1)],
        [ReasonRow(HOSTILE, HOSTILE, 1, HOSTILE, HOSTILE)],
        [CoverageRow(HOSTILE, None, HOSTILE, 1, 1, 1, (1.0,))],
    )
    page = Page(render(dataclasses.replace(full_report(HOSTILE), quantization=facts)))
    assert "script" not in {tag for tag, _ in page.tags}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")


def test_original_compressed_and_bundle_are_shown() -> None:
    rows = (
        PictureRow("cat", picture(0.2), picture(0.3), 30.0, picture(0.1)),
        PictureRow("dog", picture(), picture(), 9.0),
    )
    html = render(dataclasses.replace(empty_report(), pictures=rows))
    alts = [attributes["alt"] for tag, attributes in Page(html).tags if tag == "img"]
    assert len(alts) == 4 + 3
    assert alts[0] == "Picture of the original network for “cat”"
    assert "The reference is the compressed network in PyTorch" in Page(html).text
    assert "original network" not in Page(render(full_report())).text


def test_the_page_of_a_quantized_bundle() -> None:
    text = (painted("w8a8").bundle.path / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "calibrationown:" in "".join(page.text.split())
    assert "Picture of the original network" in text
    assert "all 2 steps of 4 trajectories" in page.text
    assert "equal integers" in page.text

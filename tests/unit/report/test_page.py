"""The report says what was checked, and only that; it is one file, and no text in it can do anything but be read."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewstep.errors import ContractError
from fewstep.report import (
    CheckRow,
    CurveChart,
    CurveSeries,
    LatencyRow,
    PictureRow,
    render,
    verdict,
    worst_first,
    write_report,
)
from fewstep.report.charts import bar, decibels, line_chart, megabytes, milliseconds, number
from fewstep.report.images import (
    LARGEST_AMPLIFICATION,
    NOT_FINITE,
    data_uri,
    difference,
    grid,
    png_bytes,
    reduce_max,
    reduce_mean,
    to_uint8,
)
from fewstep.report.page import check_limit, check_margin, check_value, latency_parts
from tests.support.reports import HOSTILE, PASSED, Page, empty_report, full_report, picture

FAILED = CheckRow("compression", "picture", "decoder", None, "a red heart", "PSNR", 28.5, 30.0, False)
PIXELS = np.zeros((2, 2, 3), np.uint8)
BROKEN = dataclasses.replace(PASSED, value=math.nan)


# ------------------------------------------------------------------------------------------------------------ verdict


def test_no_checks_is_never_verified() -> None:
    html = render(empty_report())
    assert verdict(()).state == "not verified"
    assert "Not verified No check was run, so nothing is known" in Page(html).text
    assert 'class="verdict not-verified"' in html
    assert "<title>stickers: not verified</title>" in html
    assert "> Verified" not in html


def test_everything_else_does_not_make_up_for_missing_checks() -> None:
    html = render(dataclasses.replace(full_report(), checks=()))
    assert 'class="verdict not-verified"' in html


def test_all_checks_passed() -> None:
    html = render(dataclasses.replace(empty_report(), checks=(PASSED, PASSED)))
    assert 'class="verdict verified"' in html
    assert "Verified All 2 checks passed." in Page(html).text
    assert "Closest to its limit 120.00 dB limit ≥ 100 dB, margin +20.00 dB" in Page(html).text


def test_one_failed_check_changes_the_verdict_and_is_named() -> None:
    html = render(dataclasses.replace(empty_report(), checks=(PASSED, FAILED)))
    text = Page(html).text
    assert 'class="verdict failed"' in html
    assert "Failed 1 of 2 checks failed." in text
    assert "Furthest from its limit 28.50 dB limit ≥ 30 dB, margin −1.50 dB" in text
    assert "compression, picture PSNR: decoder, “a red heart”" in text
    assert html.count('<tr role="row" class="failed">') == 1


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(BROKEN, id="NaN value"),
        pytest.param(dataclasses.replace(PASSED, limit=math.nan), id="NaN limit"),
        pytest.param(dataclasses.replace(PASSED, limit=-math.inf), id="a limit that nothing exceeds"),
        pytest.param(dataclasses.replace(PASSED, value=99.9), id="below the limit"),
        pytest.param(dataclasses.replace(PASSED, at_least=False), id="above the limit"),
        pytest.param(dataclasses.replace(PASSED, passed=False), id="the caller says so"),
    ],
)
def test_a_check_passes_only_if_the_caller_and_the_numbers_say_so(check: CheckRow) -> None:
    assert not check.holds
    assert verdict((PASSED, check)).state == "failed"
    assert worst_first((PASSED, check)) == [check, PASSED]


def test_identical_passes_every_limit() -> None:
    check = dataclasses.replace(PASSED, value=math.inf)
    assert check.holds
    assert dataclasses.replace(check, limit=math.inf).holds
    assert (check_value(check), check_margin(check)) == ("identical", "–")


def test_nan_beside_the_checks_fails_the_report() -> None:
    broken_picture = PictureRow("x", picture(), picture(math.nan), math.nan)
    text = Page(render(dataclasses.replace(empty_report(), checks=(PASSED,), pictures=(broken_picture,)))).text
    assert "Failed No check failed, but 1 compared value is NaN." in text
    assert "1 of them has no PSNR (NaN)." in text
    curve = CurveChart("x", (CurveSeries("x", (50.0, math.nan)),))
    assert verdict((PASSED,), curves=(curve,)).state == "failed"
    assert verdict((), curves=(curve,)).state == "failed"


def test_worst_first_compares_across_units() -> None:
    near_db = dataclasses.replace(PASSED, value=100.5)
    far_ssim = CheckRow("compression", "picture", "decoder", None, None, "SSIM", 0.99, 0.95, True, unit="")
    integers = CheckRow("lowering", "operator", "denoiser", 0, None, "largest difference", 1, 1, True, "levels", False)
    not_flat = CheckRow("lowering", "picture", "picture", None, "x", "spread (std)", 0.2, 0.5 / 255, True, unit="")
    assert worst_first((PASSED, not_flat, far_ssim, integers, FAILED, near_db, BROKEN)) == [
        BROKEN, FAILED, near_db, integers, far_ssim, PASSED, not_flat,
    ]  # fmt: skip


@given(st.lists(st.tuples(st.floats(), st.floats(), st.booleans(), st.booleans())))
def test_verified_means_that_every_number_is_within_its_limit(rows: list[tuple[float, float, bool, bool]]) -> None:
    checks = [
        dataclasses.replace(PASSED, value=value, limit=limit, passed=passed, at_least=at_least)
        for value, limit, passed, at_least in rows
    ]
    within = [row[2] and (row[0] >= row[1] if row[3] else row[0] <= row[1]) for row in rows]
    if verdict(checks).state == "verified":
        assert within and all(within)
    for check in checks:
        assert check_value(check) and check_limit(check) and check_margin(check)


def test_what_was_not_checked_is_said() -> None:
    text = Page(render(dataclasses.replace(empty_report(), checks=(PASSED,)))).text
    assert "Lowering 120.00 dB SQNR, limit ≥ 100 dB 1 passed not checked not checked" in text
    assert "Compression not checked not checked not checked" in text
    for sentence in ("No pictures were compared", "The error along the trajectory was not measured",
                     "The sizes of the artifacts were not recorded", "Latency was not measured",
                     "Peak memory was not measured", "The precision of the computation was not recorded",
                     "The schedule was not recorded", "No licences were recorded"):  # fmt: skip
        assert sentence in text


def test_a_value_without_a_limit_informs_but_verifies_nothing() -> None:
    measured = dataclasses.replace(PASSED, limit=None)
    html = render(dataclasses.replace(empty_report(), checks=(measured,)))
    assert 'class="verdict not-verified"' in html
    assert "No check had a limit to keep, so nothing is known" in Page(html).text
    assert "120.00 dB none – measured" in Page(html).text
    assert verdict((measured, PASSED)) == verdict((PASSED,))
    assert verdict((measured, PASSED, dataclasses.replace(measured, value=math.nan))).state == "failed"
    assert worst_first((measured, PASSED)) == [PASSED, measured]


def test_caveats_are_linked_from_the_verdict() -> None:
    html = render(dataclasses.replace(empty_report(), checks=(PASSED,), caveats=["No phone was at hand.", "b"]))
    assert "2 things are not covered." in Page(html).text
    assert "<li>No phone was at hand.</li>" in html


def test_more_than_twenty_checks_fold_and_open_if_failures_are_inside() -> None:
    twenty_one = dataclasses.replace(empty_report(), checks=[PASSED] * 21)
    assert "<details>" in render(twenty_one)
    assert "1 more check " in Page(render(twenty_one)).text
    assert "<details" not in render(dataclasses.replace(empty_report(), checks=[PASSED] * 20))
    assert "<details open>" in render(dataclasses.replace(empty_report(), checks=[FAILED] * 21))


# --------------------------------------------------------------------------------------------------- one safe page


def test_hostile_texts_are_only_read() -> None:
    html = render(full_report(HOSTILE))
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert tags <= set(page_tags_of_a_harmless_report())
    assert "script" not in tags
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert not set("\x00\x1b\ud800\u202e") & set(html)


def page_tags_of_a_harmless_report() -> list[str]:
    return [tag for tag, _ in Page(render(full_report())).tags]


def test_the_page_loads_nothing() -> None:
    html = render(full_report())
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "srcset", "href", "xlink:href", "data", "poster", "background", "style"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")) or (tag, name) == ("a", "href")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert [link for link in links if link and not link.startswith("#")] == ["https://example.org/licence"]
    assert re.findall(r"https?:[^\s<\"]*", html) == ["https://example.org/licence"] * 2


def test_every_picture_has_an_alternative_text_and_every_anchor_a_target() -> None:
    page = Page(render(full_report()))
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 6
    assert all(attributes.get("alt") for attributes in pictures)
    assert "Difference, amplified 4 times, for “a red heart”" in {attributes["alt"] for attributes in pictures}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {value for _, attributes in page.tags if (value := attributes.get("href")) and value.startswith("#")}
    assert {anchor.removeprefix("#") for anchor in anchors} <= set(ids)
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")


def test_write_report_writes_one_file(tmp_path: Path) -> None:
    path = write_report(full_report(HOSTILE), tmp_path / "report")
    assert path == tmp_path / "report" / "index.html"
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    assert path.read_text(encoding="utf-8") == render(full_report(HOSTILE))


def test_numbers_of_the_page() -> None:
    text = Page(render(full_report())).text
    assert "12,345.7 MB" in text and "< 0.1 MB" in text and "1,234.6 MB" in text
    assert "300 ms" in text and "70.0 ms" in text
    assert "PSNR from 12.0 dB to identical" in text


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_the_contrast_of_wcag_aa(scheme: str) -> None:
    html = render(empty_report())
    roots = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", root)) for root in roots)
    colours = light if scheme == "light" else light | dark
    assert light.keys() == dark.keys()
    pairs = [(text, "page") for text in ("ink", "soft", "link", "pass", "fail", "open")]
    pairs += [(text, f"{state}-panel") for state in ("pass", "fail", "open") for text in (state, "ink", "soft", "link")]
    pairs += [("ink", "panel"), *(("on-fill", f"s{index}") for index in range(6))]
    for text, background in pairs:
        brighter, darker = sorted((luminance(colours[text]), luminance(colours[background])), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= 4.5, (text, background)


# ------------------------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([], id="no series"),
        pytest.param([()], id="no steps"),
        pytest.param([(50.0,)], id="one step"),
        pytest.param([(50.0, 50.0)], id="flat"),
        pytest.param([(math.inf, math.inf)], id="identical"),
        pytest.param([(math.nan, -math.inf)], id="broken"),
        pytest.param([(50.0, 40.0), (49.0,)], id="ragged"),
        pytest.param([(1e9 + i, math.inf, math.nan, -3.0) for i in range(9)], id="summary"),
    ],
)
@pytest.mark.parametrize("limit_db", [None, 45.0, math.inf], ids=["no limit", "limit", "infinite limit"])
def test_charts_are_well_formed(values: list[tuple[float, ...]], limit_db: float | None) -> None:
    series = tuple(CurveSeries(HOSTILE, value) for value in values)
    svg = ElementTree.fromstring(line_chart(CurveChart(HOSTILE, series, limit_db), width=880, height=320))
    coordinates = [
        float(value)
        for element in svg.iter()
        for name in ("x", "x1", "x2", "y", "y1", "y2", "cx", "cy")
        if (value := element.get(name))
    ]
    assert all(-1 <= coordinate <= 881 for coordinate in coordinates)
    shapes = {"line", "text", "polyline", "polygon", "circle", "path"}
    assert {element.tag for element in svg.iter()} <= {"svg", "g", "title"} | shapes


def drawings_of(html: str) -> list[str]:
    """Returns the outermost SVG elements of a page."""
    drawings, depth, start = [], 0, 0
    for tag in re.finditer(r"<svg\b|</svg>", html):
        if tag[0] == "<svg":
            start = tag.start() if depth == 0 else start
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                drawings.append(html[start : tag.end()])
    return drawings


def test_every_svg_of_the_page_is_well_formed() -> None:
    drawings = [ElementTree.fromstring(drawing) for drawing in drawings_of(render(full_report(HOSTILE)))]
    assert {(drawing.get("class") or "").split()[0] for drawing in drawings} == {"mark", "chart", "bar", "strip"}


def test_a_chart_marks_identical_and_nan_on_rows_of_their_own() -> None:
    chart = CurveChart("x", (CurveSeries("a", (math.inf, 50.0, math.nan)),), 45.0)
    svg = ElementTree.fromstring(line_chart(chart, width=880, height=320))
    texts = [element.text for element in svg.iter("text")]
    assert {"identical", "NaN", "limit 45 dB", "step k"} <= set(texts)
    assert len(svg.findall(".//circle[@class='exact']")) == 1
    assert len(svg.findall(".//path[@class='broken']")) == 1
    assert svg.get("aria-label") == (
        "x. 1 series over 3 steps. Median identical at step 0 and NaN at the last; lowest 50.0 dB; limit 45.0 dB"
    )


def test_a_chart_of_many_series_shows_their_median_and_range() -> None:
    chart = CurveChart("x", tuple(CurveSeries(str(i), (40.0 + i, 30.0 + i)) for i in range(7)))
    svg = ElementTree.fromstring(line_chart(chart, width=880, height=320))
    titles = [element.text for element in svg.iter("title")]
    assert titles[-1] == "median: 43.0 dB, 33.0 dB"
    assert len(svg.findall(".//polygon")) == 1
    few = ElementTree.fromstring(line_chart(dataclasses.replace(chart, series=chart.series[:6]), width=880, height=320))
    assert [group.get("class") for group in few.iter("g")] == [f"line s{index}" for index in range(6)]


def test_the_highest_value_is_drawn_highest() -> None:
    svg = ElementTree.fromstring(
        line_chart(CurveChart("x", (CurveSeries("a", (50.0, 40.0)),)), width=880, height=320)
    )  # fmt: skip
    better, worse = (float(circle.get("cy", "nan")) for circle in svg.iter("circle"))
    assert better < worse


def test_bars_are_in_proportion_and_never_longer_than_their_container() -> None:
    widths = [
        ElementTree.fromstring(bar(value, 10.0)).find("rect[@class='fill s0']") for value in (5.0, 20.0, math.nan)
    ]
    assert [rect.get("width") for rect in widths if rect is not None] == ["50.000%", "100.000%", "0.000%"]
    assert ElementTree.fromstring(bar(0.0, 0.0)) is not None


def test_the_time_of_a_picture_is_text_steps_decoder_and_the_rest() -> None:
    data = dataclasses.replace(
        empty_report(),
        latencies=(LatencyRow("text", 1, 2.0, 2.0, 2.0), LatencyRow("denoiser", 2, 10.0, 9.0, 12.0)),
        whole_latency=LatencyRow("One picture", 1, 25.0, 24.0, 26.0),
    )
    assert [(part.labels[0], part.value) for part in latency_parts(data)] == [
        ("text", 2.0), ("denoiser 0", 10.0), ("denoiser 1", 10.0), ("other", 3.0),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ numbers


def test_numbers_as_they_are_read() -> None:
    assert [decibels(value) for value in (31.44, math.inf, math.nan, -math.inf, -1.0, 12345.6)] == [
        "31.4 dB", "identical", "NaN", "−inf dB", "−1.0 dB", "12,345.6 dB",
    ]  # fmt: skip
    assert [megabytes(size) for size in (0, 1, 1_250_000, 3_438_167_540)] == [
        "0.0 MB",
        "< 0.1 MB",
        "1.2 MB",
        "3,438.2 MB",
    ]
    assert [milliseconds(time) for time in (1.234, 9.996, 42.12, 4210.4, math.nan)] == [
        "1.23 ms",
        "10.0 ms",
        "42.1 ms",
        "4,210 ms",
        "NaN",
    ]
    assert [number(value) for value in (999.0, 1000, -0.5, 1e-9, None, "v", math.nan, math.inf)] == [
        "999", "1,000", "−0.500000", "1e−09", "–", "v", "NaN", "inf",
    ]  # fmt: skip


def test_a_value_never_reads_as_the_limit_it_missed() -> None:
    missed = dataclasses.replace(FAILED, value=29.99996)
    assert (check_value(missed), check_limit(missed), check_margin(missed)) == ("29.99996 dB", "≥ 30 dB", "−0.00004 dB")
    at_most = dataclasses.replace(FAILED, value=1, limit=1, unit="levels", at_least=False, passed=True)
    assert (check_value(at_most), check_limit(at_most), check_margin(at_most)) == ("1 level", "≤ 1 level", "+0 levels")


# ----------------------------------------------------------------------------------------------------------- pictures


def test_to_uint8_rounds_clips_and_marks_what_is_not_a_number() -> None:
    row = np.array([[-1.0, 0.0, 1.0], [-9.0, 9.0, 1 / 255], [math.nan, 0.0, 0.0], [0.0, math.inf, 0.0]], np.float32)
    assert to_uint8(row[np.newaxis]).tolist() == [[[0, 128, 255], [0, 255, 128], [*NOT_FINITE], [*NOT_FINITE]]]


def test_png_round_trip() -> None:
    pixels_HWC = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    png = png_bytes(pixels_HWC)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels_HWC)
    assert data_uri(png).startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize(
    ("error", "amplified", "level"),
    [
        pytest.param(0.0, LARGEST_AMPLIFICATION, 0, id="identical"),
        pytest.param(1e-7, LARGEST_AMPLIFICATION, 0, id="far below one level"),
        pytest.param(2 / 255, 128, 128, id="one level"),
        pytest.param(0.5, 4, 255, id="a quarter of the range"),
        pytest.param(1.0, 2, 255, id="half of the range"),
        pytest.param(1.5, 1, 191, id="three quarters of the range"),
    ],
)
def test_difference_is_amplified_by_a_power_of_two(error: float, amplified: int, level: int) -> None:
    pixels_HWC, amplification = difference(picture(-0.5), picture(-0.5 + error))
    assert amplification == amplified
    assert np.all(pixels_HWC == level)


def test_difference_at_a_given_amplification() -> None:
    pixels_HWC, amplification = difference(picture(0.0), picture(0.2), 2)
    assert amplification == 2
    assert np.all(pixels_HWC == 51)


def test_difference_shows_one_stray_pixel_and_what_is_not_a_number() -> None:
    bundle_HWC = picture(2 / 255, size=32)
    bundle_HWC[0, 0], bundle_HWC[1, 1, 2] = 1.0, math.nan
    pixels_HWC, amplification = difference(picture(size=32), bundle_HWC)
    assert amplification == 128
    assert pixels_HWC[0, 0].tolist() == [255, 255, 255]
    assert pixels_HWC[1, 1].tolist() == [*NOT_FINITE]
    broken_HWC, _ = difference(picture(math.nan), picture())
    assert np.all(broken_HWC == NOT_FINITE)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_reduced_pictures_keep_their_range(height: int, width: int, factor: int) -> None:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    mean_HWC, max_HWC = reduce_mean(pixels_HWC, factor), reduce_max(pixels_HWC, factor)
    assert mean_HWC.shape == max_HWC.shape == (-(-height // factor), -(-width // factor), 3)
    assert max_HWC.max() == pixels_HWC.max()
    assert np.all(mean_HWC <= max_HWC)
    if factor == 1:
        assert np.array_equal(mean_HWC, pixels_HWC)


def test_large_pictures_are_reduced_and_the_page_says_so() -> None:
    large = PictureRow("x", picture(size=400), picture(0.1, size=400), 20.0)
    html = render(dataclasses.replace(empty_report(), pictures=(large,)))
    assert "Pictures are shown at 1/2 of their size" in Page(html).text
    assert 'width="200" height="200"' in html


def test_grid_places_rows_under_their_captions() -> None:
    red, blue = to_uint8(picture(1.0)), to_uint8(picture(-1.0))
    red[..., 1:] = 0
    picture_HWC = grid([[red, blue], [blue]], ["one\ntwo \u2764" * 20, ""], gap=4)
    assert picture_HWC.dtype == np.uint8
    assert picture_HWC.shape == (4 + 16 + 8 + 4 + 8 + 4, 4 + 8 + 4 + 8 + 4, 3)
    assert np.array_equal(picture_HWC[20:28, 4:12], red)
    assert np.array_equal(picture_HWC[20:28, 16:24], blue)
    assert np.array_equal(picture_HWC[32:40, 4:12], blue)
    assert np.all(picture_HWC[32:40, 16:24] == 255)


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        pytest.param([], [], "a picture grid has no pictures, expected at least one in every row", id="nothing"),
        pytest.param([[]], ["a"], "a picture grid has no pictures, expected at least one in every row", id="empty row"),
        pytest.param([[PIXELS]], [], "a picture grid has 1 rows and 0 labels, expected one per row", id="labels"),
        pytest.param(
            [[PIXELS[0]]], ["a"], "pixels are uint8 of shape (2, 3), expected uint8 [height, width, 3]", id="shape"
        ),
        pytest.param(
            [[PIXELS.astype(np.int64)]],
            ["a"],
            "pixels are int64 of shape (2, 2, 3), expected uint8 [height, width, 3]",
            id="dtype",
        ),
    ],
)
def test_grid_refuses(rows: list[list[npt.NDArray[np.uint8]]], labels: list[str], message: str) -> None:
    with pytest.raises(ContractError) as error:
        grid(rows, labels)
    assert str(error.value) == message


def test_pictures_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ContractError, match=r"a picture has shape \(3, 8, 8\), expected \[height, width, 3\]"):
        to_uint8(np.zeros((3, 8, 8), np.float32))
    with pytest.raises(ContractError, match=r"a picture has dtype int64, expected floats in \[-1, 1\]"):
        to_uint8(np.zeros((8, 8, 3), np.int64))
    with pytest.raises(ContractError, match=r"shape \(9, 9, 3\), expected the reference's \(8, 8, 3\)"):
        difference(picture(), picture(size=9))

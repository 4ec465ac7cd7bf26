"""The table of runtimes: what agrees, what is left out, and what could not be measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.backends.rows import Row, measure, pictures_of
from benchmarks.backends.table import agreement, markdown, measured
from tests.support.bundles import built


def test_agreement_is_of_what_two_have_in_common() -> None:
    a, b = np.zeros((8, 8, 3)), np.full((8, 8, 3), 0.1)
    matrix = agreement([{"x": a, "y": a}, {"x": b}, {"z": a}])
    assert matrix[0][0] == 150.0
    assert matrix[0][1] == matrix[1][0] == pytest.approx(20.0)
    assert matrix[0][2] is None


def test_the_page(tmp_path: Path) -> None:
    rows = [
        Row("onnxruntime", "fp32", "native", "here", "1.0", True, 140.0, 120.5, None, 45_600_000, 90.0, 1.01, 2e8),
        Row("onnxruntime", "fp32", "arm64", "emulated", "", True, 138.0, 119.0, notes=("replayed 7 of 19",)),
        Row("elsewhere", "w8a8", "native", error="no kernel for BitShift"),
    ]
    for row, value in zip(rows[:2], (0.5, 0.5001), strict=True):
        np.savez(pictures_of(tmp_path, row.key), **{"cat #0, 4 steps": np.full((8, 8, 3), value)})
    machine = {"cores": 2, "processor": "one", "memory_gib": 24, "versions": {"onnxruntime": "1.0"}}
    figures = {r.key: r.to_json() for r in rows}
    agreements = measured(figures, tmp_path)
    page = markdown({"rows": figures, "machine": machine, "agreement": agreements}, "the command")
    assert "Written by `the command`, on 2 cores of one, 24 GiB: onnxruntime 1.0." in page
    assert "| onnxruntime 1.0 | fp32 | native | yes | 140.0 | 120.5 |  | 45.6 | 90 | 1.01 | 200 |" in page
    assert "| onnxruntime, native | equal | 80.0 |" in page
    assert "- elsewhere, w8a8, native: no kernel for BitShift" in page
    assert "emulated: replayed 7 of 19" in page


@pytest.mark.slow
def test_a_row_is_what_the_bundle_was_verified_to_be(tmp_path: Path) -> None:
    bundle = built("lcm").bundle
    shutil.copytree(bundle.path, tmp_path / "onnxruntime-fp32")
    row = measure("onnxruntime", "fp32", "native", tmp_path, minutes=1, timed=False)
    assert (row.error, row.passed, row.latency_ms) == (None, True, None)
    assert row.lowering_db is not None and 100 <= row.lowering_db <= 150
    assert row.picture_db is not None and 80 <= row.picture_db <= 150
    assert row.ratio is not None and 0.2 < row.ratio < 5  # beside itself, where other tests take turns
    assert row.size_bytes == sum(a.bytes for a in bundle.manifest.artifacts)
    assert row.notes[0].startswith(f"{(bundle.manifest.parity or {})['checks']} checks against PyTorch")
    with np.load(pictures_of(tmp_path, row.key)) as pictures:
        assert len(pictures.files) == len(list((bundle.path / "golden").glob("*.safetensors")))


def test_a_row_of_what_is_refused_says_why(tmp_path: Path) -> None:
    row = measure("nowhere", "fp32", "native", tmp_path, minutes=1, timed=True)
    assert row.error is not None and "unknown runtime 'nowhere'" in row.error
    assert row.passed is None

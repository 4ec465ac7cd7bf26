"""The table of ways of compressing for Core ML reads what a report has, and says what it has not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

from benchmarks.coreml.__main__ import figures
from benchmarks.coreml.table import Row, markdown, points
from fewstep.runtimes.parity.harness import COMPRESSION, LOWERING, Check


def test_table_of_a_report_with_equal_outputs(tmp_path: Path) -> None:
    def check(error: str, level: str, metric: str, value: float) -> Check:
        return Check(error, level, "denoiser", 0, "cat #0", None, metric, value, 30.0)

    checks = [
        check(LOWERING, "component", "SQNR dB", math.inf),
        check(LOWERING, "component", "SQNR dB", 120.0),
        check(COMPRESSION, "picture", "PSNR dB", 40.0),
        check(COMPRESSION, "picture", "PSNR dB", 50.0),
    ]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "parity.json").write_text(json.dumps({"all": [c.to_json() for c in checks]}))
    manifest = SimpleNamespace(artifacts=[SimpleNamespace(component="denoiser", bytes=2_500_000)])
    values = figures(SimpleNamespace(path=tmp_path, manifest=manifest))  # type: ignore[arg-type]
    rows = [Row("w8", json.loads(json.dumps(values))), Row("w4", None)]
    page = markdown(rows, {"torch": "2.0"}).splitlines()
    assert page[-2] == "| w8 | 2.50 |  | 2 | 45.0 | 40.0 | 120.0 |  |  |  |"
    assert page[-1].startswith("| w4 | not measured yet |")
    assert {line.count("|") for line in page if line.startswith("|")} == {11}
    assert [(point.size_mb, point.psnr_db) for point in points(rows)] == [(2.5, 45.0)]

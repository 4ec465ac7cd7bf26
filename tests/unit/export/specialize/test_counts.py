"""The benchmark of static steps counts what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.scale.networks import Component
from benchmarks.static import latency, memory, networks, step_bits, step_grids, stickers
from benchmarks.static.jobs import count
from benchmarks.static.table import markdown
from fewstep.recipe.quantization import STEP_GRIDS
from tests.support.bundles import built


@pytest.fixture
def tiny() -> Iterator[str]:
    """Yields the name of a tiny case."""
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8}
    arguments = {
        "hidden_states": (torch.float32, (1, 4, 8, 8)),
        "timestep": (torch.int64, (1,)),
        "class_labels": (torch.int64, (1,)),
        "return_dict": False,
    }
    part = networks._TRANSFORMER
    case = networks.Case(
        Component("diffusers", "DiTTransformer2DModel", config, part, arguments), networks._OF_TRANSFORMER
    )
    networks.STATIC["tiny"] = case
    yield "tiny"
    del networks.STATIC["tiny"]


def test_a_network_without_values_is_timed(tiny: str, tmp_path: Path) -> None:
    for part in latency.PARTS:
        made = latency.compile_part(tiny, 4, part, str(tmp_path / part))
        assert made is not None and latency.time_part(made, 1) >= 0
    figures = {part: {"seconds": 1.0, "peak_bytes": 1 << 30} for part in latency.PARTS}
    assert "| tiny | 1.00 | 1.00 | 1.00 | 1.250 | 1.00 | 1.00 | 1.000 |" in latency.markdown({tiny: figures}, 4)


def test_a_network_without_values_is_counted(tiny: str) -> None:
    figures = count(tiny, 4)
    was, now, once = (figures["parts"][n] for n in ("step form", "in every step", "once for a picture"))
    # Of each block: adaLN's linear (6 x 16 out) reads one vector; it runs once, for four steps at a time.
    modulation = 2 * (16 * 96 + 96)
    assert once["parameters"] >= modulation
    assert now["parameters"] + once["parameters"] < was["parameters"]
    assert now["macs"] <= was["macs"] - 2 * 16 * 96
    assert once["macs"] >= 4 * 2 * 16 * 96
    page = markdown({"counts": {"tiny": figures}, "machine": {}})
    assert "| tiny |" in page


def test_the_committed_page_is_of_the_committed_figures() -> None:
    import json

    folder = Path(__file__).parents[4] / "benchmarks" / "static" / "results"
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == markdown(figures)
    assert figures["counts"].keys() == networks.STATIC.keys()


def test_ways_to_hold_graphs_are_measured(tmp_path: Path) -> None:
    graph = built("turbo").bundle.file("onnxruntime/unet/model.onnx")
    for way in ("mapped", "one", "shared values"):
        found = memory.hold([str(graph), str(graph)], way)
        assert found.keys() == {"pss_mib", "rss_mib", "open_ms", "run_ms"}
        assert found["open_ms"] > 0 and found["run_ms"] > 0
    figures = {
        "ways": dict.fromkeys(memory.WAYS, found),
        "graphs": 2,
        "bytes": dict.fromkeys(("step", "table", "specialized"), 1),
    }
    assert len(memory.markdown({"fp32": figures})) == len(memory.WAYS) + 5


def test_the_pages_tables_are_written_from_figures() -> None:
    psnr = {f"w8a8 {how}": [40.0, 41.0 + i] for i, how in enumerate(STEP_GRIDS)}
    page = step_grids.markdown({"steps": 4, "samples": 8, "psnr_db": psnr, "grids": dict.fromkeys(STEP_GRIDS, 3)})
    assert "| w8a8 | 40.50 | 41.00 | 41.50 | +1.00 ± 1.00 |" in page
    places = ["", "0", "1", "0,1"]
    psnr = {f"{a} {b} {at}": [40.0 + i, 41.0 + 2 * i] for a, b in step_bits.PAIRS for i, at in enumerate(places)}
    page = step_bits.markdown({"steps": 2, "samples": 8, "psnr_db": psnr})
    assert "| w4a8 | 40.50 | w8a8 | +1.50 ± 0.50 | +3.00 ± 1.00 | +4.50 ± 1.50 |" in page
    assert {line.count("|") for line in page if line.startswith("|")} == {7}
    times = {name: [2.0, 4.0] for name in stickers.BUNDLES}
    where = {name: {"denoiser": [4, 1.0]} for name in ("table", "int8")}
    sizes = {name: {"denoiser": 1 << 20} for name in stickers.BUNDLES}
    page = stickers.markdown({"picture_ms": {"4": times}, "bytes": sizes, "where_ms": where}, {"processor": "x"})
    assert "| 4 | 3.0 | 3.0 | 3.0 | 1.000 (1.00 to 1.00) | 1.000 (1.00 to 1.00) |" in page

"""The benchmark of static steps counts what it says."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.scale.networks import Component
from benchmarks.static import networks
from benchmarks.static.jobs import count
from benchmarks.static.table import markdown


def test_a_network_without_values_is_counted() -> None:
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
    try:
        figures = count("tiny", 4)
    finally:
        del networks.STATIC["tiny"]
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

    folder = Path(__file__).parents[1] / "benchmarks" / "static" / "results"
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == markdown(figures)
    assert figures["counts"].keys() == networks.STATIC.keys()

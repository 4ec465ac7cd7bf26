"""What is compared: fewstep's recipes and the peers' ways of quantizing, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.quant.reference import ALL, FIRST

OURS, PEER = "fewstep", "peer"
DECODER_AND_DENOISER = ("denoiser", "decoder")


@dataclass(frozen=True)
class Method:
    """One way of quantizing with one tool: its environment, its script in ``peers/``, and the script's options."""

    name: str
    tool: str
    environment: str
    script: str
    options: Mapping[str, Any]
    calls: str = ALL
    """Which recorded calls it calibrates on: all steps, or the first call of each prompt."""


@dataclass(frozen=True)
class Row:
    """One generator of the table: a recipe of fewstep, or a method of a peer for some or all components."""

    name: str
    kind: str
    label: str
    recipe: str | None = None
    method: Method | None = None
    components: tuple[str, ...] | None = None
    """Those that the peer's models replace; None replaces all."""


_MAIN_OPS = ("Conv", "MatMul", "Gemm")


def _ort(activations: str, *, per_channel: bool, op_types: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"activations": activations, "per_channel": per_channel, "op_types": list(op_types)}


def _olive(activations: str, *, per_channel: bool) -> dict[str, Any]:
    return {"op_types": list(_MAIN_OPS), "activations": activations, "weights": "int8", "per_channel": per_channel}


def _nncf(model_type: str | None = None) -> dict[str, Any]:
    return {"model_type": model_type, "preset": None}


METHODS = (
    Method("ort-u8s8", "ORT quantize_static, u8s8", "ort", "ort_static", _ort("u8", per_channel=False)),
    Method("ort-s8s8", "ORT quantize_static, s8s8", "ort", "ort_static", _ort("s8", per_channel=False)),
    Method(
        "ort-u8s8-conv-matmul-gemm",
        "ORT quantize_static, u8s8, per channel, Conv MatMul Gemm",
        "ort",
        "ort_static",
        _ort("u8", per_channel=True, op_types=_MAIN_OPS),
    ),
    Method(
        "ort-u8s8-conv-gemm",
        "ORT quantize_static, u8s8, per channel, Conv Gemm",
        "ort",
        "ort_static",
        _ort("u8", per_channel=True, op_types=("Conv", "Gemm")),
    ),
    Method("nncf", "NNCF", "nncf", "with_nncf", _nncf()),
    Method("nncf-transformer", "NNCF, model_type TRANSFORMER", "nncf", "with_nncf", _nncf("transformer")),
    Method("modelopt-entropy", "ModelOpt, entropy", "modelopt", "with_modelopt", {"method": "entropy"}),
    Method("modelopt-max", "ModelOpt, max", "modelopt", "with_modelopt", {"method": "max"}),
    Method("olive-u8s8", "Olive, u8s8, Conv MatMul Gemm", "olive", "with_olive", _olive("uint8", per_channel=False)),
    Method(
        "olive-u8s8-per-channel",
        "Olive, u8s8, per channel, Conv MatMul Gemm",
        "olive",
        "with_olive",
        _olive("uint8", per_channel=True),
    ),
    Method(
        "ort-u8s8-conv-matmul-gemm-first",
        "ORT quantize_static, u8s8, per channel, Conv MatMul Gemm; first calls only",
        "ort",
        "ort_static",
        _ort("u8", per_channel=True, op_types=_MAIN_OPS),
        FIRST,
    ),
    Method("nncf-first", "NNCF; first calls only", "nncf", "with_nncf", _nncf(), FIRST),
)

# One method of each tool, the best for pictures, also with the text encoder left in float.
WITHOUT_TEXT_ENCODER = ("ort-u8s8-conv-matmul-gemm", "nncf", "modelopt-max", "olive-u8s8")
RECIPES = ("fp32", "fp16", "w8", "w8a8", "w4", "w4a8", "mixed")


def rows() -> tuple[Row, ...]:
    """Returns every row of the table, in its order."""
    ours = [Row(recipe, OURS, f"fewstep {recipe}", recipe=recipe) for recipe in RECIPES]
    whole = [Row(method.name, PEER, method.tool, method=method) for method in METHODS]
    part = [
        Row(f"{m.name}.part", PEER, f"{m.tool}; text encoder fp32", method=m, components=DECODER_AND_DENOISER)
        for m in METHODS
        if m.name in WITHOUT_TEXT_ENCODER
    ]
    return (*ours, *whole, *part)

"""Dynamic int8 on LiteRT, ai-edge-quantizer's and ours, beside static int8: quality, time and size.

``python -m benchmarks.backends.dynamic``, in LiteRT's environment: takes ``build/backends/litert-fp32``,
``litert-w8a8-dynamic`` and ``litert-w8a8`` (built if they are not there) and writes ``results/dynamic.md``.
ai-edge-quantizer's is its recipe ``dynamic_wi8_afp32`` of the networks in fp32, which rounds weights to the nearest
integer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.backends.__main__ import RESULTS, WORK
from benchmarks.backends.rows import bundle_of
from benchmarks.quant.latency import CALLS, in_turn
from fewstep.bundle.bundle import Bundle
from fewstep.bundle.contract import ComponentSpec
from fewstep.bundle.samples import Sample
from fewstep.numerics.metrics import sqnr_db
from fewstep.pipeline.references import golden_samples
from fewstep.runtimes.base import CheckedSession, Runtime
from fewstep.runtimes.litert import runtime as litert
from fewstep.runtimes.parity.harness import agreement_db, mean_db
from fewstep.runtimes.sampling.sampler import Sampler, open_sampler


@dataclass(frozen=True)
class Variant:
    """How the networks of a bundle are quantized: its name, what opens them, and their bytes by component."""

    name: str
    sampler: Sampler
    bytes: dict[str, int]


def main() -> None:
    """Measures them, and writes the page."""
    plain, own, static = (bundle_of("litert", recipe, WORK) for recipe in ("fp32", "w8a8-dynamic", "w8a8"))
    golden = golden_samples(plain, "")
    with TemporaryDirectory() as name:
        dynamic, sizes = _dynamic(plain, Path(name))
        variants = [
            Variant("fp32", open_sampler(plain, threads=1), _sizes(plain)),
            Variant("ai-edge-quantizer", open_sampler(plain, runtime=dynamic, threads=1), sizes),
            Variant("w8a8-dynamic", open_sampler(own, threads=1), _sizes(own)),
            Variant("w8a8", open_sampler(static, threads=1), _sizes(static)),
        ]
        lines = _page(plain, golden, variants)
        for variant in variants:
            variant.sampler.close()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "dynamic.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _dynamic(bundle: Bundle, folder: Path) -> tuple[Runtime, dict[str, int]]:
    """Returns LiteRT as it opens a bundle's networks, quantized to dynamic int8, and their bytes."""
    from ai_edge_quantizer import quantizer, recipe

    made: dict[Path, Path] = {}
    sizes = {}
    for component in bundle.manifest.components:
        path = bundle.file(bundle.manifest.artifact(litert.NAME, component).path)
        content = bytes(quantizer.Quantizer(str(path), recipe.dynamic_wi8_afp32()).quantize().quantized_model)
        made[path] = folder / f"{component}.tflite"
        made[path].write_bytes(content)
        sizes[component] = len(content)

    def opened(path: Path, spec: ComponentSpec, threads: int | None) -> CheckedSession:
        return litert.open_session(made[path], spec, threads)

    return replace(litert.RUNTIME, open=opened), sizes


def _sizes(bundle: Bundle) -> dict[str, int]:
    return {a.component: a.bytes for a in bundle.manifest.artifacts}


def _page(plain: Bundle, golden: list[Sample], variants: list[Variant]) -> list[str]:
    versions = plain.manifest.versions
    lines = [
        "# Dynamic and static int8 on LiteRT",
        "",
        f"Written by `python -m benchmarks.backends.dynamic`, ai-edge-litert {versions['ai-edge-litert']}. "
        "ai-edge-quantizer's is `dynamic_wi8_afp32` of the networks in fp32. *SQNR* is the least of the calls in the "
        "fp32 bundle's golden pack, on PyTorch's own inputs; *time* the median of a call over fp32's, in turn "
        f"in one process, one thread, {CALLS} calls; *picture* the mean PSNR of {len(golden)} free-running pictures to "
        "PyTorch's in fp32.",
        "",
        "| | " + " | ".join(f"{v.name}: {what}" for v in variants for what in ("SQNR dB", "time", "MB")) + " |",
        "|---|" + "---|" * (3 * len(variants)),
    ]
    for component in plain.manifest.components:
        cells = [cell for v in variants for cell in _of_component(component, golden, variants[0], v)]
        lines.append(f"| {component} | {' | '.join(cells)} |")
    pictures = [f"{_picture_db(plain, golden, v.sampler):.1f} |  | {sum(v.bytes.values()) / 1e6:.1f}" for v in variants]
    return [*lines, f"| picture | {' | '.join(pictures)} |"]


def _of_component(component: str, golden: list[Sample], plain: Variant, variant: Variant) -> list[str]:
    feeds = [feed for sample in golden for feed in sample.feeds if feed.component == component]
    own, other = (v.sampler.session(component) for v in (variant, plain))
    least = min(sqnr_db(feed.outputs[name], out) for feed in feeds for name, out in own.run(feed.inputs).items())

    def call(session: Any) -> Callable[[], object]:
        return lambda: session.run(feeds[0].inputs)

    ratio = 1.0 if variant is plain else in_turn(call(other), call(own), CALLS)["ratio"]
    return [f"{least:.1f}", f"{ratio:.2f}", f"{variant.bytes[component] / 1e6:.2f}"]


def _picture_db(bundle: Bundle, golden: list[Sample], sampler: Sampler) -> float:
    return mean_db(
        agreement_db(s, sampler(s.prompt, s.seed, bundle.manifest.schedule(s.steps), guidance=s.guidance))
        for s in golden
    )


if __name__ == "__main__":
    main()

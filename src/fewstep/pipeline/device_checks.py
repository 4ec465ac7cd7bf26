"""Results of device checks: what a browser measured against the golden pack, judged here by the bundle's own limits.

A result brings measurements, never verdicts: limits come from the bundle, and what the golden pack would have compared
but the result does not have counts as failed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.manifest import INTEGERS, Manifest
from fewstep.bundle.samples import Sample
from fewstep.errors import ContractError
from fewstep.pipeline.references import golden_samples, known_floor, limits_of
from fewstep.pipeline.verify import FLOOR_SAMPLES, GOLDEN
from fewstep.recipe.recipe import Limits
from fewstep.runtimes.parity.harness import (
    FLAT,
    LARGEST,
    LOWERING,
    Check,
    ParityReport,
    label,
    most_levels,
    trajectory_limits,
)
from fewstep.runtimes.parity.quantized import floor_checks_of

# The runtime whose artifacts browsers run.
WEB_RUNTIME = "onnxruntime"
# A check of 1,000 comparisons has some 250 kB.
MOST_BYTES = 1 << 20
_COMPUTED = ("golden", "guidance", "tokenizer", WEB_RUNTIME)
_HINT = "run the device check again, and give the file as the page saved it"


@dataclass(frozen=True)
class DeviceReport:
    """The parity report of one device, and how long it took there."""

    report: ParityReport
    device: Mapping[str, Any]
    picture_ms: float
    wasm_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON-ready values."""
        measured = {"picture_ms": self.picture_ms, "wasm_bytes": self.wasm_bytes}
        return {**self.report.to_json(), "device": dict(self.device), **measured}


def content_id(manifest: Manifest) -> str:
    """Returns one hash for what a bundle computes in a browser: networks, tokenizers and golden pack, not reports."""
    paths = sorted(path for path in manifest.files if path.partition("/")[0] in _COMPUTED)
    lines = "".join(f"{manifest.files[path].sha256}  {path}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_device_report(path: Path, bundle: Bundle) -> DeviceReport:
    """Returns the report of a result file.

    Raises:
        ContractError: the file is no result, of another bundle, or has comparisons that the golden pack has not.
    """
    with path.open("rb") as stream:
        body = stream.read(MOST_BYTES + 1)
    return device_report(parse_result(body, bundle, where=str(path)), bundle, where=str(path))


def parse_result(body: bytes, bundle: Bundle, *, where: str) -> dict[str, Any]:
    """Returns a result that has the right form and is of this bundle.

    Raises:
        ContractError: it is too large, malformed or of another bundle.
    """
    if len(body) > MOST_BYTES:
        raise ContractError(f"{where} has more than {MOST_BYTES} bytes", hint=_HINT)
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{where} is not JSON: {error}", hint=_HINT) from error
    departure = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(_schema()).iter_errors(values))
    if departure is not None:
        place = "/".join(str(part) for part in departure.absolute_path) or "(top)"
        raise ContractError(f"{where}: {place}: {departure.message[:200]}", hint=_HINT)
    expected = content_id(bundle.manifest)
    if values["bundle"]["content_id"] != expected:
        raise ContractError(
            f"{where} is of bundle {values['bundle']['content_id'][:16]}..., expected {expected[:16]}...",
            hint="check the device with the app of this bundle",
        )
    result: dict[str, Any] = values
    return result


def device_report(result: Mapping[str, Any], bundle: Bundle, *, where: str) -> DeviceReport:
    """Returns the report of a result that `parse_result` let through."""
    golden, limits = golden_samples(bundle, ""), limits_of(bundle.manifest)
    expected = {_key(check): check for check in _expected(bundle, golden, limits)}
    measured = {}
    for values in result["checks"]:
        check = Check(**{**values, "value": float(values["value"]), "limit": None})
        if _key(check) not in expected:
            raise ContractError(f"{where}: the golden pack has no {check.level} of {check.where}", hint=_HINT)
        if _key(check) in measured:
            raise ContractError(f"{where}: {check.level} of {check.where} is there twice", hint=_HINT)
        measured[_key(check)] = check.value
    checks = [replace(check, value=measured.get(key, math.nan)) for key, check in expected.items()]
    checks += _floor_checks(bundle, golden, limits, checks)
    device, executor = result["device"], result["executor"]
    name = (
        f"{executor['runtime']} {executor['version']}, {executor['provider']}, {executor['threads']} threads, "
        f"in {device['browser']} on {device['os']}, {device['cores']} cores"
    )
    report = ParityReport(tuple(checks), GOLDEN, name)
    return DeviceReport(report, {**device, **executor}, result["picture_ms"], result["wasm_bytes"])


def _schema() -> dict[str, Any]:
    text = resources.files("fewstep").joinpath("device-result.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _key(check: Check) -> tuple[str, str, int | None, str | None, str | None, str]:
    return check.level, check.component, check.step, check.sample, check.tensor, check.metric


def _integers(manifest: Manifest) -> list[str]:
    """Returns the components that compute with whole numbers, which the noise floor judges."""
    artifacts = {component: manifest.artifact(WEB_RUNTIME, component) for component in manifest.components}
    return [component for component, artifact in artifacts.items() if artifact.compute == INTEGERS]


def _expected(bundle: Bundle, golden: Sequence[Sample], limits: Limits) -> Iterator[Check]:
    """Yields every comparison that the golden pack makes, not measured yet.

    See `fewstep.pipeline.verify.verify_against`.
    """
    integers = _integers(bundle.manifest)
    limit = None if integers else limits.picture_psnr_db
    for sample in golden:
        where = label(sample)
        for feed in sample.feeds:
            own = None if feed.component in integers else limits.component_sqnr_db
            for name in feed.outputs:
                tensor = name if feed.branch == "cond" else f"{name} ({feed.branch})"
                yield Check(LOWERING, "component", feed.component, feed.step, where, tensor, "SQNR dB", math.nan, own)
        start = bundle.manifest.schedule(sample.steps).init_scale
        for k, own in enumerate(trajectory_limits(limit, sample.latents, start)):
            yield Check(LOWERING, "trajectory", "denoiser", k, where, "latent", "SQNR dB", math.nan, own)
        metric = "PSNR dB" if sample.kind == "picture" else "SQNR dB"
        yield Check(LOWERING, "picture", sample.kind, None, where, None, metric, math.nan, limit)
        yield Check(LOWERING, "picture", "picture", None, where, None, "spread (std)", math.nan, FLAT)
        if sample.kind == "picture" and limit is not None:
            yield Check(LOWERING, "picture", "picture", None, where, None, LARGEST, math.nan, -most_levels(limit))


def _floor_checks(bundle: Bundle, golden: Sequence[Sample], limits: Limits, checks: Sequence[Check]) -> list[Check]:
    """Returns the checks against the noise floor, of the same samples as in a verification."""
    some = [label(sample) for sample in golden[:FLOOR_SAMPLES]]
    of_some = [check for check in checks if check.sample in some]
    calls = {
        name: [c.value for c in of_some if (c.level, c.component) == ("component", name)]
        for name in _integers(bundle.manifest)
    }
    pictures = [c.value for c in of_some if c.level == "picture" and c.metric.endswith("dB")]
    return floor_checks_of(known_floor(bundle), limits, calls, pictures, golden[0].kind) if calls else []

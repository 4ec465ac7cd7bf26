"""Ties a manifest to what it was made from: every field that a device reads is compared with something else.

With the source, the contract is read again and compared field by field. Without it, the heads of the golden samples say
what they were recorded with. Limits are compared with what the recipe's kind needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from fewstep.bundle.contract import Guidance
from fewstep.bundle.manifest import Manifest
from fewstep.bundle.samples import BESIDE, Sample
from fewstep.bundle.schedule import Schedule
from fewstep.errors import ContractError
from fewstep.pipeline.references import limits_of
from fewstep.recipe.recipe import PRESETS, Limits
from fewstep.runtimes.parity.harness import LOWERING, Check, label

if TYPE_CHECKING:
    from fewstep.export import Programs

MANIFEST = "manifest"
# Tables are probed in float64 and written with all their digits: another machine's differ in the last ones.
_RELATIVE = 1e-6


def check_limits(manifest: Manifest) -> Limits:
    """Returns a bundle's limits.

    Raises:
        ContractError: they are below what its recipe's kind needs.
    """
    limits = limits_of(manifest)
    needed = needed_limits(manifest.recipe)
    for name, least in asdict(needed).items():
        value = getattr(limits, name)
        if not value >= least:
            raise ContractError(
                f"the manifest's limit {name} is {value:g} dB, expected {least:g} or more of a bundle of this kind",
                hint="--limits bundle takes the bundle's word for it, where its recipe asked for less",
            )
    return limits


def needed_limits(recipe: Mapping[str, Any]) -> Limits:
    """Returns the least limits of recipes of a kind, from a recipe as a manifest has it.

    Lowering follows from how weights are stored: what is multiplied from a grid keeps 80 and 60 dB, what is in float
    100 and 80. How much a recipe compresses is its own choice, known for presets by their name.
    """
    kind = PRESETS["w8"] if recipe.get("quantization") is not None else PRESETS["fp32"]
    preset = PRESETS.get(recipe.get("name", ""))
    least = preset.limits.compression_psnr_db if preset is not None else -math.inf
    return replace(kind.limits, compression_psnr_db=least)


def golden_ties(manifest: Manifest, golden: Sequence[Sample]) -> list[Check]:
    """Returns the checks that golden samples were recorded as the manifest says: one for each field of each sample."""
    checks = []
    for sample, expected in zip(golden, _order(manifest, golden), strict=True):
        found = {
            "guidance.scale": _guided(manifest.contract.guidance, sample),
            "output.kind": sample.kind == manifest.contract.output.kind,
            "prompts": (sample.prompt, sample.seed) == expected,
            "schedules": sample.steps in manifest.schedules,
            "inputs": set(sample.inputs) == {s.name for s in manifest.contract.inputs if s.kind != "text"},
        }
        if sample.steps in manifest.schedules:
            found["timesteps"] = _same_times(sample, manifest.schedules[sample.steps])
        checks += [_check(name, agrees, sample=label(sample)) for name, agrees in found.items()]
    return checks


def contract_ties(manifest: Manifest, fresh: Programs) -> list[Check]:
    """Returns the checks of a manifest's contract, components, tokenizers and tables against those read just now.

    A recipe that corrects the table says so: of its tables, the times alone are compared.
    """
    described = fresh.described
    quantization = manifest.recipe.get("quantization") or {}
    theirs = {"contract": fresh.contract, "components": fresh.components, "tokenizers": described.tokenizers}
    ours = {"contract": manifest.contract, "components": manifest.components, "tokenizers": manifest.tokenizers}
    values: tuple[dict[str, Any], dict[str, Any]] = (_plain(ours), _plain(theirs))
    for side, schedules in zip(values, (manifest.schedules, described.schedules), strict=True):
        tables = {str(steps): schedule.to_json() for steps, schedule in schedules.items()}
        if quantization.get("correction"):
            tables = {n: {k: table[k] for k in ("timesteps", "times", "timestep_dtype")} for n, table in tables.items()}
        side["schedules"] = tables
    checks = []
    for part in ("contract", "tokenizers", "components", "schedules"):
        mine, its = values[0][part], values[1][part]
        for name in dict.fromkeys((*its, *mine)):
            wrong = next(_differences(its.get(name), mine.get(name), f"{part}.{name}"), None)
            checks.append(_check(f"{part}.{name}", wrong is None, wrong))
    return checks


def _check(name: str, agrees: bool, tensor: str | None = None, *, sample: str | None = None) -> Check:
    return Check(LOWERING, MANIFEST, name, None, sample, tensor, "agrees", float(agrees), 1.0)


def _order(manifest: Manifest, golden: Sequence[Sample]) -> list[tuple[str, int]]:
    """Returns prompt and seed of each golden sample: every prompt with every seed, then the first at other steps."""
    prompts = manifest.prompts if manifest.contract.takes_text and manifest.prompts else ("",)
    if not manifest.contract.takes_text and golden:
        prompts = tuple(dict.fromkeys(sample.prompt for sample in golden)) or prompts
    if manifest.contract.batch > 1:
        return [(prompts[i % len(prompts)], i) for i in range(len(golden))]
    own = [sample for sample in golden if sample.steps == manifest.default_steps and sample.seed < BESIDE]
    seeds = next((i for i, sample in enumerate(own) if sample.seed != i), len(own)) or 1
    grid = [(prompts[i // seeds] if i // seeds < len(prompts) else "", i % seeds) for i in range(len(own))]
    others = [(prompts[0], BESIDE if sample.seed >= BESIDE else 0) for sample in golden]
    main = [sample.steps == manifest.default_steps and sample.seed < BESIDE for sample in golden]
    return [grid.pop(0) if is_main else other for is_main, other in zip(main, others, strict=True)]


def _guided(guidance: Guidance, sample: Sample) -> bool:
    """Returns whether a sample has the bundle's scale or, beside the others, shows the rest of two-pass guidance."""
    if sample.seed < BESIDE:
        return sample.guidance == guidance.scale and sample.negative is None
    if sample.negative is not None:
        return guidance.takes_negative and guidance.two_passes(sample.guidance)
    return guidance.two_passes(sample.guidance) != guidance.two_passes(guidance.scale)


def _same_times(sample: Sample, schedule: Schedule) -> bool:
    """Returns whether every recorded call saw the time that the table has for its step."""
    times = schedule.timesteps
    return all(
        feed.timestep is None or (feed.step < len(times) and _close(feed.timestep, times[feed.step]))
        for feed in sample.feeds
        if feed.step is not None
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns dataclasses in a mapping, and in mappings below it, as JSON has them."""

    def encode(value: Any) -> Any:
        return asdict(value)

    plain: dict[str, Any] = json.loads(json.dumps(dict(values), default=encode))
    return plain


def _differences(theirs: Any, ours: Any, path: str) -> Iterator[str]:
    """Yields where two JSON values differ, numbers by more than `_RELATIVE`."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in dict.fromkeys((*theirs, *ours)):
            yield from _differences(theirs.get(key), ours.get(key), f"{path}.{key}")
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            yield from _differences(a, b, f"{path}[{i}]")
    elif not _close(theirs, ours):
        yield f"{path} is {str(ours)[:60]}, expected {str(theirs)[:60]}"


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool):
        return math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=1e-12)
    return bool(a == b)

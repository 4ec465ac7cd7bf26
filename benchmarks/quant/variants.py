"""Makes and measures the variants of the orderings, and says which claims hold."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quant import models, reference
from benchmarks.quant.cells import Cells, sources_sha256
from benchmarks.quant.orderings import ORDERINGS, Claim, Ordering, Variant
from benchmarks.quant.prompts import HELD_OUT
from benchmarks.quant.table import paired
from benchmarks.scale.table import describe_machine
from fewstep.bundle.bundle import Bundle
from fewstep.cache import code_sha256
from fewstep.errors import FewstepError
from fewstep.hashing import value_sha256
from fewstep.run_in_subprocess import run_isolated

HERE = Path(__file__).parent
RESULTS, WORK = HERE / "results", Path("build/quant")
# A quarter of E1's pictures: what differs by less than these can tell is no difference that matters.
PROMPTS = HELD_OUT[:32]
# A margin counts from this many standard errors of the paired difference on: about one in 40 by chance.
STANDARD_ERRORS = 2.0


def measure_orderings(
    orderings: Sequence[Ordering], variants: Mapping[str, Variant], bundle: Path, *, table_only: bool, missing: bool
) -> None:
    """Measures every variant that the claims name and writes ``results/orderings.md`` after each.

    Args:
        orderings: what is asked.
        variants: all variants, by name.
        bundle: the fp32 bundle that they are compared with.
        table_only: measure nothing.
        missing: keep what other states of the code measured; the page then says which variants share a state.
    """
    cells = Cells(RESULTS / "cells")
    names = dict.fromkeys(name for o in orderings for c in o.claims for name in (c.better, c.worse))
    if not table_only:
        opened = Bundle.open(bundle)
        for name in names:
            if missing and _values(cells, name) is not None:
                continue
            measure(variants[name], variants, opened, cells)
            _write(cells, variants)
    _write(cells, variants)


def measure(variant: Variant, variants: Mapping[str, Variant], bundle: Bundle, cells: Cells) -> dict[str, Any]:
    """Returns the quality of a variant, or the error that says why it could not be made."""
    key = {
        "base": variant.base,
        "changes": dict(variant.changes),
        "steps": variant.steps,
        "size_of": variant.size_of,
        "form": variant.form,
        "missing": variant.missing,
        "code": code_sha256(),
        "prompts": list(PROMPTS),
        "pictures": sources_sha256(HERE / "reference.py", HERE / "quality.py"),
    }

    def make() -> dict[str, Any]:
        if variant.missing is not None:
            raise FewstepError(variant.missing)
        print(f"{variant.name}", file=sys.stderr, flush=True)
        max_bytes = None
        if variant.size_of is not None:
            other = measure(variants[variant.size_of], variants, bundle, cells)
            if "error" in other:
                raise FewstepError(f"its size is that of {variant.size_of}, which could not be made")
            max_bytes = other["bytes"]
        out = WORK / "variants" / variant.name
        recipe = write_recipe(variant, max_bytes, WORK / "recipes" / f"{variant.name}.toml")
        arguments = {"recipe": str(recipe), "out": str(out), "form": variant.form or "step"}
        made = run_isolated(models.build_recipe, arguments).result
        manifest = Bundle.open(out).manifest
        schedules = {str(n): schedule.to_json() for n, schedule in manifest.schedules.items()}
        identity = value_sha256([models.networks(Bundle(out, manifest)), schedules])
        size = sum(a.bytes for a in manifest.artifacts)
        arguments = {"bundle": str(out), "reference": str(_reference(bundle, variant.steps))}
        found: dict[str, Any] = run_isolated(compare, arguments).result
        shutil.rmtree(out)
        return {**found, "bytes": size, "identity": identity, **made}

    return cells.get_or_make(f"orderings/{variant.name}", key, make)


def compare(bundle: str, reference: str) -> dict[str, Any]:
    """Returns the quality of a bundle as `benchmarks.quant.quality.compare` has it."""
    from benchmarks.quant import quality

    return quality.compare(bundle, reference)[0]


def write_recipe(variant: Variant, max_bytes: int | None, path: Path) -> Path:
    """Returns the recipe of a variant as a TOML file. Its limits let every picture pass: they are what is measured."""
    changes = dict(variant.changes)
    if max_bytes is not None:
        changes["max_bytes"] = max_bytes
    lines = [f'base = "{variant.base}"', f"steps = [{variant.steps}]", "", "[limits]", "compression_psnr_db = -100.0"]
    lines += ["", "[quantization]", *(f"{key} = {json.dumps(value)}" for key, value in changes.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def markdown(cells: Cells, machine: Mapping[str, Any], variants: Mapping[str, Variant]) -> str:
    """Returns the page: the verdict of every claim, then every variant's figures."""
    lines = [
        "# Orderings of the papers, on the built-in generator",
        "",
        f"{2 * len(PROMPTS)} held-out pictures a variant, the same noise for all, against the fp32 bundle; written by "
        "`python -m benchmarks.quant.orderings`. The margin is the mean difference of PSNR picture by picture with its "
        f"standard error; a claim holds if it is above {STANDARD_ERRORS:.0f} standard errors, and is reversed if it is "
        "below as many.",
        "",
        f"{machine['cores']} cores of {machine['processor']}; Python {machine['python']}.",
        "",
        "| question | better, it is said | worse | said by | margin, dB | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for ordering in ORDERINGS:
        for i, claim in enumerate(ordering.claims):
            question = f"{ordering.name}: {ordering.question}" if i == 0 else ""
            margin, verdict = judge(claim, cells)
            cells_ = [question, claim.better, claim.worse, claim.source, margin, verdict]
            lines.append(f"| {' | '.join(cells_)} |")
    lines += ["", "| variant | recipe | N | PSNR, dB | SSIM | step SQNR, dB | MB |", "|---|---|---|---|---|---|---|"]
    lines += [_row(variant, cells) for variant in variants.values()]
    return "\n".join([*lines, *_states(cells, variants)]) + "\n"


def _values(cells: Cells, name: str) -> dict[str, Any] | None:
    """Returns what was measured of a variant, None if nothing was or it could not be made."""
    cell = cells.read(f"orderings/{name}")
    return None if cell is None or "error" in cell["values"] else dict(cell["values"])


def _states(cells: Cells, variants: Mapping[str, Variant]) -> list[str]:
    """Returns the lines that tell which variants were measured by the same code, none if all of them were."""
    states: dict[str, list[str]] = {}
    for name in variants:
        if _values(cells, name) is not None:
            states.setdefault(cells.read(f"orderings/{name}")["determined_by"]["code"], []).append(name)  # type: ignore[index]
    if len(states) < 2:
        return []
    return [
        "",
        f"Measured by {len(states)} states of the compiler's code: a margin between two of these groups may be one of "
        "code.",
        "",
        *(f"- `{code[:12]}`: {', '.join(names)}" for code, names in states.items()),
    ]


def judge(claim: Claim, cells: Cells) -> tuple[str, str]:
    """Returns the margin of a claim and its verdict, as text."""
    better, worse = (_values(cells, name) for name in (claim.better, claim.worse))
    if better is None or worse is None:
        return "", "not measured"
    if better["identity"] == worse["identity"]:
        return "", "none: both are the same bundle"
    margin, error = paired(better, worse)
    if margin > STANDARD_ERRORS * error:
        verdict = "holds"
    elif margin < -STANDARD_ERRORS * error:
        verdict = "**reversed**"
    else:
        verdict = "**does not hold**: no difference"
    return f"{margin:+.2f} ± {error:.2f}", verdict


def _reference(bundle: Bundle, steps: int) -> Path:
    folder = WORK / f"reference-{len(PROMPTS)}-{steps}"
    key = [models.networks(bundle), list(PROMPTS), sources_sha256(HERE / "reference.py")]
    stamp = folder / "key.json"
    if not stamp.is_file() or json.loads(stamp.read_text()) != key:
        shutil.rmtree(folder, ignore_errors=True)
        arguments = {"bundle": str(bundle.path), "prompts": list(PROMPTS), "out": str(folder), "steps": steps}
        run_isolated(reference.record_reference, arguments)
        stamp.write_text(json.dumps(key))
    return folder


def _row(variant: Variant, cells: Cells) -> str:
    recipe = variant.base + "".join(f", {key} = {value}" for key, value in variant.changes.items())
    cell = cells.read(f"orderings/{variant.name}")
    head = [variant.name, recipe, str(variant.steps)]
    if cell is None or "error" in cell["values"]:
        why = "not measured yet" if cell is None else str(cell["values"]["error"]).splitlines()[0]
        return f"| {' | '.join([*head, f'absent: {why}', '', '', ''])} |"
    values = cell["values"]
    figures = [
        f"{values['psnr_db']['mean']:.2f} ± {values['psnr_db']['std']:.2f}",
        f"{values['ssim']['mean']:.4f}",
        " / ".join(f"{step['mean']:.1f}" for step in values["step_sqnr_db"]),
        f"{values['bytes'] / 1e6:.2f}",
    ]
    return f"| {' | '.join([*head, *figures])} |"


def _write(cells: Cells, variants: Mapping[str, Variant]) -> None:
    RESULTS.mkdir(exist_ok=True)
    text = markdown(cells, describe_machine(), variants)
    (RESULTS / "orderings.md").write_text(text, encoding="utf-8")


def named(orderings: Iterable[Ordering]) -> set[str]:
    """Returns the variants that the claims of orderings name."""
    return {name for ordering in orderings for claim in ordering.claims for name in (claim.better, claim.worse)}

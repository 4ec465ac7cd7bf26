"""The golden pack beside its samples: token ids of odd texts, so that padding and truncation are looked at anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.samples import Sample
from fewstep.errors import BundleError
from fewstep.numerics.metrics import sqnr_db
from fewstep.recipe.recipe import Limits
from fewstep.runtimes.parity.harness import LOWERING, Check, Floor, agreement_db, label, largest_check
from fewstep.runtimes.parity.host_arithmetic import HOST
from fewstep.runtimes.parity.quantized import floor_limit
from fewstep.strict import read_json
from fewstep.text.probe_texts import PROBES
from fewstep.text.tokens import Tokenizer

FOLDER, TOKENS = "golden", "tokens.json"
GOLDEN = "golden"
# One for each thing that can go wrong on the way to ids: case, blanks, marks, the end of the text (padding), none at
# all, words that merge, other alphabets, texts beyond any length (truncation).
TEXTS = (
    *PROBES[:4],
    "",
    " ",
    "a",
    "unbelievable extraordinary misunderstandings",
    PROBES[22],
    PROBES[24],
    *PROBES[-4:],
)


def write_tokens(folder: Path, tokenizers: Mapping[str, Tokenizer]) -> None:
    """Writes ids and masks of the texts beside the golden samples of a bundle's folder."""
    if not tokenizers:
        return
    values = {name: _tokens(tokenizer) for name, tokenizer in tokenizers.items()}
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / FOLDER / TOKENS).write_text(json.dumps({"texts": TEXTS, "tokenizers": values}) + "\n")


def token_checks(bundle: Bundle, tokenizers: Mapping[str, Tokenizer]) -> list[Check]:
    """Returns the checks of every recorded text's ids and mask against a bundle's tokenizers.

    Raises:
        BundleError: the golden pack has no ids of a tokenizer.
    """
    if not tokenizers:
        return []
    path = bundle.file(f"{FOLDER}/{TOKENS}")
    checks = []
    try:
        recorded = read_json(path, error=BundleError, hint="build the bundle again")
        for name, tokenizer in tokenizers.items():
            for text, expected in zip(recorded["texts"], recorded["tokenizers"][name], strict=True):
                ids, mask = tokenizer(text)
                same = [ids.tolist(), mask.tolist()] == [[expected["ids"]], [expected["mask"]]]
                checks.append(_tokens_check(name, text, same))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} has no token ids: {error}", hint="build the bundle again") from error
    return checks


def compare_golden(
    golden: Sequence[Sample], live: Sequence[Sample], limits: Limits, floor: Floor | None
) -> tuple[list[Check], int]:
    """Returns the checks of golden samples against live references of the same prompts and seeds, and how many.

    Where the network computes with integers, two machines agree to the noise floor alone.
    """
    by_label = {label(sample): sample for sample in live}
    checks: list[Check] = []
    compared = 0
    for recorded in golden:
        fresh = by_label.get(label(recorded))
        if fresh is not None and fresh.output.shape == recorded.output.shape:
            compared += 1
            checks += _sample(recorded, fresh, limits, floor)
    return checks, compared


def _sample(recorded: Sample, fresh: Sample, limits: Limits, floor: Floor | None) -> list[Check]:
    where = label(recorded)

    def check(component: str, step: int | None, tensor: str | None, value: float, limit: float | None) -> Check:
        return Check(LOWERING, GOLDEN, component, step, where, tensor, "agreement dB", value, limit)

    most = limits.picture_psnr_db
    limit = most if floor is None else floor_limit(floor.picture, 1, most)
    checks = [check(recorded.kind, None, "output", agreement_db(fresh, recorded), limit)]
    if floor is None:
        checks += largest_check(fresh, recorded, limits.picture_psnr_db, level=GOLDEN)
        for k, (theirs, ours) in enumerate(zip(fresh.latents, recorded.latents, strict=False)):
            checks.append(check("denoiser", k, "latent", sqnr_db(theirs, ours), limit))
    calls = {(feed.component, feed.step, feed.branch): feed for feed in fresh.feeds}
    for feed in recorded.feeds:
        other = calls.get((feed.component, feed.step, feed.branch))
        for kind in ("inputs", "outputs") if other is not None else ():
            for name, theirs in getattr(other, kind).items():
                ours = getattr(feed, kind).get(name)
                same = ours is not None and ours.shape == theirs.shape
                value = sqnr_db(theirs, ours) if same else float("nan")
                own = None if floor is not None else min(limits.component_sqnr_db, limits.picture_psnr_db)
                checks.append(check(feed.component, feed.step, name, value, own))
    return checks


def _tokens(tokenizer: Tokenizer) -> list[dict[str, list[int]]]:
    found = []
    for text in TEXTS:
        ids, mask = tokenizer(text)
        found.append({"ids": ids[0].tolist(), "mask": mask[0].tolist()})
    return found


def _tokens_check(name: str, text: str, same: bool) -> Check:
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    return Check(LOWERING, HOST, "tokenizer", None, repr(shown), name, "same ids and mask", float(same), 1.0)

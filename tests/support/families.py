"""Builds the families of the zoo, each compared with its own pipeline, and tells how it went: docs/families.md."""

from __future__ import annotations

import atexit
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch

import fewstep
from fewstep.bundle.contract import InputSpec
from fewstep.bundle.source import SourceInfo
from fewstep.errors import FewstepError
from fewstep.export import Generator
from tests.support import zoo
from tests.support.zoo.family import Family

ROOT = Path(__file__).parents[2]

# What is refused, with words of the reason.
REFUSED: Mapping[str, str] = {
    "growing-latents": "the latent of step 3 is [1, 4, 8, 8], expected [1, 4, 4, 4] as in step 0",
}

_KINDS = {"prompt": "text", "class": "class", "image": "image", "mask": "image"}
# Of `Family.call_kwargs`, what is no option but the guidance scale.
_GUIDANCE = ("guidance_scale", "guidance")


@dataclass(frozen=True)
class Row:
    """How one family went."""

    family: str
    group: str
    reference: str
    steps: tuple[int, ...]
    components: tuple[str, ...]
    guidance: str
    sqnr_db: float | None
    output_db: float | None
    checks: int
    seconds: float
    default_db: float | None = None
    """The level *call*: the pipeline's default call; of kinds with a prompt, also that of odd characters."""
    capitals_db: float | None = None
    error: str = ""
    hint: str = ""
    note: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Row:
        """Returns the row of what `dataclasses.asdict` made of one, or of its JSON."""
        return cls(**{**values, "steps": tuple(values["steps"]), "components": tuple(values["components"])})


def generator_of(family: Family, folder: Path) -> Generator:
    """Returns a family's generator, as a user of the library would make it."""
    loaded = family.load(folder)
    w = next((float(family.call_kwargs[name]) for name in _GUIDANCE if name in family.call_kwargs), 0.0)
    inputs = tuple(
        InputSpec(name, _KINDS[i.kind], () if i.kind == "prompt" else i.shape, i.high or None)
        for name, i in family.inputs.items()
    )
    if family.kind == "loop":
        return Generator.assemble(
            family.name,
            loaded.networks,
            loaded.sample,
            inputs=inputs,
            kind=family.output,
            steps=family.steps,
            guidance=w,
            tokenizers={n: word_tokenizer(i.shape[1], i.high) for n, i in family.inputs.items() if i.kind == "prompt"},
        )
    loaded.to(torch.float32)
    options = {name: value for name, value in family.call_kwargs.items() if name not in _GUIDANCE}
    made = Generator.from_pipeline(
        loaded, SourceInfo(family.name, "diffusers", family.name), name=family.name, options=options
    )
    guidance = w if any(name in family.call_kwargs for name in _GUIDANCE) else made.guidance
    return replace(made, inputs=inputs, steps=family.steps, default_steps=family.steps[-1], guidance=guidance)


def __getattr__(name: str) -> Callable[[], Generator]:
    """Returns a function that returns a family's generator.

    ``tests.support.families:sd_turbo`` is a source like any user's.
    """
    for family in zoo.FAMILIES:
        if family.name.replace("-", "_") == name:
            return lambda: generator_of(family, _kept_folder() / "source")
    raise AttributeError(name)


def _kept_folder() -> Path:
    """Returns a folder that is there until the process ends: tokenizers copy files of theirs when they are saved."""
    folder = mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def word_tokenizer(length: int, size: int) -> object:
    """Returns a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(ord("a") + i) for i in range(min(26, size - 2))]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", model_max_length=length
    )


def build_family(family: Family, *, recipe: str = "fp32") -> Row:
    """Returns how a family builds and verifies; of an error that is none of fewstep's, nothing."""
    started = time.perf_counter()
    with TemporaryDirectory() as name:
        folder = Path(name)
        told = family.load(folder / "told")
        loop = "its loop in plain PyTorch"
        row: dict[str, Any] = {
            "family": family.name,
            "group": family.group,
            "reference": loop if family.kind == "loop" else type(told).__name__,
            "steps": family.steps,
            "note": family.note,
        }
        options = fewstep.Options(prompts=2, seeds=1, cache_root=folder / "cache", profile=False)
        source = f"{__name__}:{family.name.replace('-', '_')}"
        try:
            bundle = fewstep.build(source, recipe, out=folder / "bundle", options=options)
        except FewstepError as error:
            nothing = Row(**row, components=(), guidance="", sqnr_db=None, output_db=None, checks=0, seconds=0.0)
            seconds = time.perf_counter() - started
            called = _called(folder / "bundle.failed")
            return replace(nothing, seconds=seconds, error=error.message, hint=error.hint or "", **called)
        assert bundle.manifest.contract.output.kind == family.output
        parity = bundle.manifest.parity
        assert parity is not None
        return Row(
            **row,
            components=tuple(bundle.manifest.components),
            guidance=bundle.manifest.contract.guidance.kind,
            sqnr_db=float(parity["worst"]["lowering.component"]["value"]),
            output_db=float(parity["worst"]["lowering.picture"]["value"]),
            checks=parity["checks"],
            seconds=time.perf_counter() - started,
            **_called(folder / "bundle"),
        )


def _called(bundle: Path) -> dict[str, float]:
    """Returns the figures of the level *call* in a bundle's report."""
    report = bundle / "report" / "parity.json"
    checks = json.loads(report.read_text(encoding="utf-8"))["all"] if report.is_file() else []
    found = {c["sample"].partition(",")[0]: float(c["value"]) for c in checks if c["level"] == "call" and c["sample"]}
    return {f"{name}_db": found[name] for name in ("default", "capitals") if name in found}


def family_code(row: Row) -> int:
    """Returns how many lines of the compiler and the sampler name a family or its pipeline."""
    words = f'"{row.family}"', row.reference
    files = [file for folder in ("export", "runtimes") for file in (ROOT / folder).rglob("*.py")]
    return sum(any(w in line for w in words) for file in files for line in file.read_text("utf-8").splitlines())


def table(rows: Sequence[Row]) -> str:
    """Returns the families as a table in Markdown."""
    figures = "SQNR dB", "output dB", "call dB", "own lines"
    head = "family", "group", "reference", "steps", "components", "guidance", *figures
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        told = [row.family, row.group, row.reference, ", ".join(map(str, row.steps))]
        if row.error:
            told += [f"refused: {row.error}", "", "", "", _calls(row), ""]
        else:
            told += [", ".join(row.components), row.guidance.replace("_", "-")]
            told += [f"{row.sqnr_db:.0f}", f"{row.output_db:.0f}", _calls(row), str(family_code(row))]
        lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"


def _calls(row: Row) -> str:
    found = [value for value in (row.default_db, row.capitals_db) if value is not None]
    return ", ".join("not a number" if math.isnan(value) else f"{value:.0f}" for value in found)


def page(rows: Sequence[Row]) -> str:
    """Returns docs/families.md."""
    built = sum(not row.error for row in rows)
    return f"""# Families of generators

Written by `make families`: do not edit. {built} of {len(rows)} kinds of few-step generators build and verify, the
others are refused with a reason. Each is a tiny one with random weights (`tests/support/zoo`), run by its own diffusers
pipeline or by a sampling loop in plain PyTorch, and the bundle is compared with that run. Figures are the worst of
all step counts, in dB (limits: 100 for each component on the same inputs, 80 for the output). *Call* is the level that
knows nothing of the compiler ([parity.md](parity.md#the-call)): the output for the pipeline's default call and, of
kinds with a prompt, for `A Red, Apple &amp; "Pear"`; limit 80. *Own lines* counts the lines of the compiler and the
sampler that name the family or its pipeline class. Tiny networks show that the arithmetic is right; they show nothing
of quality.

{table(rows)}
*Guidance*: `embedded`, the scale is an input of the network; `two-pass`, two calls a step; `none`, neither.
[Any few-step generator](any-generator.md) says what is refused, and why.
"""


def main(names: Sequence[str]) -> None:
    """Builds the named families, or all that have no record, and prints the page of all records."""
    records = ROOT / "build" / "families"
    records.mkdir(parents=True, exist_ok=True)
    rows = []
    for family in zoo.FAMILIES:
        record = records / f"{family.name}.json"
        if family.name in names or not (names or record.is_file()):
            row = build_family(family)
            record.write_text(json.dumps(asdict(row)), encoding="utf-8")
            sys.stderr.write(f"{family.name}: {row.error or 'verified'}, {_calls(row)}, {row.seconds:.0f} s\n")
        if record.is_file():
            rows.append(Row.of(json.loads(record.read_text(encoding="utf-8"))))
    sys.stdout.write(page(rows))


if __name__ == "__main__":
    from tests.support.families import main as as_imported  # the sources are functions of the module of that name

    as_imported(sys.argv[1:])

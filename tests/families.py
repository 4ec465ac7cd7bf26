"""Builds the families of the zoo, each compared with its own pipeline, and tells how it went: docs/families.md."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fewstep
from fewstep.contract import InputSpec
from fewstep.errors import FewstepError
from fewstep.export import Generator
from fewstep.source import SourceInfo
from tests import zoo
from tests.zoo.family import Family

ROOT = Path(__file__).parents[1]

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
        generator = generator_of(family, folder / "source")
        loop = "its loop in plain PyTorch"
        row: dict[str, Any] = {
            "family": family.name,
            "group": family.group,
            "reference": loop if generator.is_loop else type(generator.pipeline).__name__,
            "steps": family.steps,
            "note": family.note,
        }
        options = fewstep.Options(prompts=2, seeds=1, cache_root=folder / "cache", profile=False)
        try:
            bundle = fewstep.build(generator, recipe, out=folder / "bundle", options=options)
        except FewstepError as error:
            nothing = Row(**row, components=(), guidance="", sqnr_db=None, output_db=None, checks=0, seconds=0.0)
            seconds = time.perf_counter() - started
            return replace(nothing, seconds=seconds, error=error.message, hint=error.hint or "")
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
        )


def family_code(row: Row) -> int:
    """Returns how many lines of the compiler and the sampler name a family or its pipeline."""
    words = f'"{row.family}"', row.reference
    files = [file for folder in ("export", "runtimes") for file in (ROOT / folder).rglob("*.py")]
    return sum(any(w in line for w in words) for file in files for line in file.read_text("utf-8").splitlines())


def table(rows: Sequence[Row]) -> str:
    """Returns the families as a table in Markdown."""
    head = "family", "group", "reference", "steps", "components", "guidance", "SQNR dB", "output dB", "own lines"
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        told = [row.family, row.group, row.reference, ", ".join(map(str, row.steps))]
        if row.error:
            told += [f"refused: {row.error}", "", "", "", ""]
        else:
            figures = [f"{row.sqnr_db:.0f}", f"{row.output_db:.0f}", str(family_code(row))]
            told += [", ".join(row.components), row.guidance.replace("_", "-"), *figures]
        lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"


def page(rows: Sequence[Row]) -> str:
    """Returns docs/families.md."""
    built = sum(not row.error for row in rows)
    return f"""# Families of generators

Written by `make families`: do not edit. {built} of {len(rows)} kinds of few-step generators build and verify, the
others are refused with a reason. Each is a tiny one with random weights (`tests/zoo`), run by its own diffusers
pipeline or by a sampling loop in plain PyTorch, and the bundle is compared with that run. Figures are the worst of
all step counts, in dB (limits: 100 for each component on the same inputs, 80 for the output). *Own lines* counts the
lines of the compiler and the sampler that name the family or its pipeline class. Tiny networks show that the
arithmetic is right; they show nothing of quality.

{table(rows)}
*Guidance*: `embedded`, the scale is an input of the network; `two-pass`, two calls a step; `none`, neither.
[Any few-step generator](any-generator.md) says what is refused, and why.
"""


def main(names: Iterable[str]) -> None:
    """Builds the named families, or all, and prints the page of them; what was built so far goes to stderr."""
    rows = []
    for family in zoo.FAMILIES:
        if not names or family.name in names:
            rows.append(build_family(family))
            sys.stderr.write(f"{family.name}: {rows[-1].error or 'verified'}, {rows[-1].seconds:.0f} s\n")
    sys.stdout.write(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])

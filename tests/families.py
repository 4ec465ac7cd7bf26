"""Builds the families of the zoo, each compared with its own pipeline, and tells how it went as a table."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import fewstep
from fewstep.export import Generator
from fewstep.manifest import InputSpec, SourceInfo
from tests import zoo
from tests.zoo.family import Family

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
    note: str = ""


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
    import torch

    loaded.to(torch.float32)
    options = {name: value for name, value in family.call_kwargs.items() if name not in _GUIDANCE}
    made = Generator.from_pipeline(
        loaded, SourceInfo(family.name, "diffusers", family.name), name=family.name, options=options
    )
    from dataclasses import replace

    guidance = w if any(name in family.call_kwargs for name in _GUIDANCE) else made.guidance
    return replace(
        made, inputs=inputs, kind=family.output, steps=family.steps, default_steps=family.steps[-1], guidance=guidance
    )


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
    """Returns how a family builds and verifies."""
    started = time.perf_counter()
    reference = "its loop in plain PyTorch" if family.kind == "loop" else "diffusers"
    row = {"family": family.name, "group": family.group, "steps": family.steps, "note": family.note}
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            generator = generator_of(family, folder / "source")
            if not generator.is_loop:
                reference = type(generator.pipeline).__name__
            options = fewstep.Options(prompts=2, seeds=1, cache_root=folder / "cache", profile=False)
            bundle = fewstep.build(generator, recipe, out=folder / "bundle", options=options)
        except Exception as error:
            if "-v" in sys.argv:
                traceback.print_exc()
            text = str(error).strip().splitlines()
            seconds = time.perf_counter() - started
            why = f"{type(error).__name__}: {text[0] if text else ''}"
            return Row(
                **row, reference=reference, components=(), guidance="", sqnr_db=None, output_db=None, checks=0,
                seconds=seconds, error=why,
            )  # fmt: skip
        parity = bundle.manifest.parity
        assert parity is not None
        return Row(
            **row,
            reference=reference,
            components=tuple(bundle.manifest.components),
            guidance=bundle.manifest.contract.guidance.kind,
            sqnr_db=float(parity["worst"]["lowering.component"]["value"]),
            output_db=float(parity["worst"]["lowering.picture"]["value"]),
            checks=parity["checks"],
            seconds=time.perf_counter() - started,
        )


def main(names: Iterable[str]) -> None:
    """Builds the named families, or all, and prints a line for each."""
    rows = []
    for family in zoo.FAMILIES:
        if not names or family.name in names:
            row = build_family(family)
            rows.append(row)
            sys.stdout.write(json.dumps(asdict(row)) + "\n")
            sys.stdout.flush()
    failed = [row.family for row in rows if row.error]
    sys.stderr.write(f"{len(rows) - len(failed)} of {len(rows)} families; failed: {failed}\n")


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if not name.startswith("-")])

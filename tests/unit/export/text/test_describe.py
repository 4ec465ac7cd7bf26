"""What a pipeline makes of a text is in its bundle, or is refused by name before anything is compiled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st

import fewstep
from fewstep.bundle.seal import write_seal
from fewstep.bundle.source import SourceInfo
from fewstep.errors import ContractError, ExportError, FewstepError, SourceError
from fewstep.export import Generator, describe, load
from fewstep.export.contract.diffusers_layout import tokenizer_json
from fewstep.export.record.run import run
from fewstep.export.record.tape import Tape
from fewstep.export.source.weight_checks import check_tokenizer_folder
from fewstep.numerics.metrics import psnr_db
from fewstep.text import cleaners as text_cleaners
from fewstep.text.operations import OPERATIONS, apply_operations, sequences
from fewstep.text.probe_texts import path_texts
from fewstep.text.tokens import Tokenizer
from tests.support import tiny, zoo
from tests.support.families import generator_of

Clean = Callable[[str], str]


def zoo_generator(name: str, folder: Path) -> Generator:
    return generator_of(next(family for family in zoo.FAMILIES if family.name == name), folder)


class Changing(StableDiffusionPipeline):
    """Changes a text before its tokenizer, or reads it otherwise."""

    clean: Clean = staticmethod(str)
    padding = "max_length"
    reader: Callable[..., Any] | None = None

    def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        texts = [self.clean(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        read = self.reader or self.tokenizer
        told = read(texts, padding=self.padding, max_length=16, truncation=True, return_tensors="pt")
        return self.text_encoder(told["input_ids"])[0], None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.turbo_folder(tmp_path_factory.mktemp("texts") / "source")


def changing(folder: Path, **attributes: Any) -> Generator:
    """Returns the generator of a pipeline that does as told to a text."""
    whole = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    whole.set_progress_bar_config(disable=True)
    kind = type("ChangingPipeline", (Changing,), attributes)
    pipeline = kind(**whole.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return Generator.from_pipeline(pipeline, SourceInfo("changing", "python", ""), name="changing")


def refusal(generator: Generator) -> FewstepError:
    with pytest.raises(ExportError) as caught:
        describe(generator, [1])
    assert caught.value.hint
    return caught.value


# --- what pipelines do is learned


@pytest.mark.parametrize(
    ("family", "operations"),
    [
        ("pixart-sigma", ("strip", "lower")),
        ("sana-sprint", ("strip", "lower")),
        ("wan", ("unescape_html", "unescape_html", "strip", "collapse_unicode_whitespace")),
        ("flux-schnell", ()),
    ],
)
def test_operations_of_families(family: str, operations: tuple[str, ...], tmp_path: Path) -> None:
    found = describe(zoo_generator(family, tmp_path), [1]).tokenizers
    assert found
    assert {spec.operations for spec in found.values()} == {operations}


@pytest.mark.parametrize("clean", [str.strip, str.lower, lambda t: " ".join(t.split()).lower()], ids=range(3))
def test_words_around_a_text(clean: Clean, folder: Path) -> None:
    generator = changing(folder, clean=staticmethod(lambda t: f"The {{}} %s text: {clean(t)} - end. "))
    (spec,) = describe(generator, [1]).tokenizers.values()
    assert (spec.prefix, spec.suffix) == ("The {} %s text: ", " - end. ")
    for text in ("", "  The text: \u03a3\u03a3\x1c ", "a\u00a0 B"):
        assert apply_operations(spec.operations, text) == clean(text)


@given(st.text(alphabet=" \x1c\u00a0Aa&;#nbspam38\u0130\u03a3"))
def test_operations_are_those_of_the_standard_library(text: str) -> None:
    import html
    import re

    import regex

    assert apply_operations(["strip", "lower"], text) == text.strip().lower()
    assert apply_operations(["collapse_whitespace"], text) == re.sub(r"\s+", " ", text)
    assert apply_operations(["collapse_unicode_whitespace"], text) == regex.sub(r"\s+", " ", text)
    assert apply_operations(["unescape_html"], text) == html.unescape(text)


def test_numbers_of_any_length_are_unescaped() -> None:
    assert apply_operations(["unescape_html"], f"a&#{'1' * 5000};b") == "a\ufffdb"  # html.unescape raises ValueError


def test_texts_tell_all_operations_apart() -> None:
    """Two lists of operations that differ for some text differ for one of those that pipelines are heard with."""
    parts = [
        " ",
        "\x1c",
        "&nbsp;",
        "&amp;nbsp;",
        "&amp;amp;nbsp;",
        "A",
        "&AMP;nbsp;",
        "&#28;",
        "&amp;AMP;",
        "&Aacute;",
        "x",
    ]
    rng = np.random.default_rng(0)
    corpus = ["".join(rng.choice(parts, size=rng.integers(1, 5))) for _ in range(1500)]

    def kinds(texts: Sequence[str]) -> int:
        return len({tuple(apply_operations(names, text) for text in texts) for names in sequences()})

    assert kinds(path_texts()) == kinds([*path_texts(), *corpus]) > 100


# --- what cannot be said is refused


def test_quotes_made_straight_are_refused(folder: Path) -> None:
    generator = changing(folder, clean=staticmethod(lambda t: t.replace("\u201c", '"').replace("\u201d", '"')))
    error = refusal(generator)
    assert 'ChangingPipeline makes \'"curly" ' in error.message
    assert "of the text '\\u201ccurly\\u201d " in error.message
    assert f"can do to every text is {', '.join(OPERATIONS)}, the same words before and after it" in error.message


def test_a_short_text_that_is_changed_is_named(folder: Path) -> None:
    error = refusal(changing(folder, clean=staticmethod(str.title)))
    assert "makes 'A Red Apple On A Table' of the text 'a red apple on a table'" in error.message


def test_tokens_that_follow_the_length_are_refused(folder: Path) -> None:
    error = refusal(changing(folder, padding="longest"))
    assert "tokenizer gives 16 tokens for 'a red apple on a table' and 11 for 'A Red Apple'" in error.message


def test_a_text_that_is_not_heard_is_refused(folder: Path) -> None:
    tokenizer = tiny.tokenizer(folder / "tokenizer")

    class Processor:
        def __call__(self, texts: Sequence[str], **options: Any) -> Any:
            return tokenizer(texts, **options)

    error = refusal(changing(folder, reader=Processor()))
    assert (
        "text_encoder is given another input_ids for 'A Red Apple' than for 'a red apple on a table'" in error.message
    )
    assert "a bundle would keep that of its first prompt" in error.message


def test_an_argument_that_follows_the_text_is_refused(folder: Path) -> None:
    class Scaled(Changing):
        def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            states, nothing = super().encode_prompt(prompt, *args, **kwargs)
            text = prompt if isinstance(prompt, str) else prompt[0]
            return states * (1 + len(text)), nothing  # a number of the text, and no tensor

    whole = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline = Scaled(**whole.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    error = refusal(Generator.from_pipeline(pipeline, SourceInfo("scaled", "python", ""), name="scaled"))
    assert "with the text 'a', not all is as it was read off 'a red apple on a table'" in error.message


def test_other_tokens_are_refused(folder: Path) -> None:
    tokenizer = tiny.tokenizer(folder / "tokenizer")
    tokenizer.truncation_side = "left"
    generator = changing(folder)
    generator.pipeline.tokenizer = tokenizer
    error = refusal(replace(generator, tokenizers={"tokenizer": tokenizer}))
    assert "tokenizer: the ids of the text" in error.message
    assert "as the pipeline calls it" in error.message


def test_states_cut_after_the_last_token_follow_the_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = zoo_generator("wan", tmp_path)
    describe(generator, [1])
    monkeypatch.setattr(Tape, "_zeroed", lambda *_: None)  # as if the number of tokens were the first prompt's
    assert "the cond branch is given another encoder_hidden_states" in refusal(generator).message


# --- embeddings of several vectors


def inverted(folder: Path, **vectors: int) -> Generator:
    """Returns a generator with textual inversions of so many vectors each."""
    generator = load(str(folder))
    for token, number in vectors.items():
        values = torch.randn(number, 32, generator=torch.Generator().manual_seed(number))
        generator.pipeline.load_textual_inversion({f"<{token}>": values})
    return generator


def test_tokens_of_several_vectors(folder: Path, tmp_path: Path) -> None:
    generator = inverted(folder, cat=3, dog=1)
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    bundle = fewstep.build(replace(generator, steps=(1,), default_steps=1), out=tmp_path / "bundle", options=options)
    (spec,) = bundle.manifest.tokenizers.values()
    assert spec.expansions == {"<cat>": "<cat> <cat>_1 <cat>_2"}
    text = "a <cat>, a <dog>"
    reference = run(generator, text, 3, steps=1, guidance=0.0).output
    assert reference is not None
    assert psnr_db(reference, bundle.generate(text, seed=3).output) >= 80  # as `limits` asks of fp32
    changed = shutil.copytree(bundle.path, tmp_path / "changed")
    values = json.loads((changed / "manifest.json").read_text())
    values["tokenizers"]["tokenizer"]["expansions"] = {}
    (changed / "manifest.json").write_text(json.dumps(values))
    write_seal(changed)
    assert psnr_db(reference, fewstep.Bundle.open(changed).generate(text, seed=3).output) < 60


def test_tokens_of_several_vectors_as_diffusers_writes_them(folder: Path) -> None:
    generator = inverted(folder, cat=3, dog=2)
    (spec,) = describe(generator, [1]).tokenizers.values()
    tokenizer = generator.tokenizers["tokenizer"]
    ours = Tokenizer.of(tokenizer_json(tokenizer), spec)
    for text in ("<cat>", "<CAT> <cat>", "<cat>_1 <cat>", "<dog><cat>,<dog>_1", "no token", "<ca t>"):
        assert ours.text(text) == generator.pipeline.maybe_convert_prompt(text, tokenizer)


def test_tokens_within_tokens_are_refused(folder: Path) -> None:
    generator = load(str(folder))
    for token in ("cat", "cats"):
        generator.pipeline.load_textual_inversion({token: torch.ones(2, 32)})
    assert "has the tokens 'cat' and 'cats', each of several vectors" in refusal(generator).message


# --- what is installed, and verification


def test_a_package_that_cleans_texts_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"bs4": text_cleaners.ABSENT, "ftfy": "6.3"}
    monkeypatch.setattr(text_cleaners, "cleaners", lambda: {"bs4": "4.12", "ftfy": text_cleaners.ABSENT})
    first, second = text_cleaners.cleaner_notes(built)
    assert first.startswith("bs4 was not installed where the bundle was built and is here")
    assert second.startswith("ftfy was installed where the bundle was built and is not here")
    assert text_cleaners.cleaner_notes({"bs4": "4.11"}) == []


def test_an_operation_that_is_dropped_is_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = fewstep.Options(prompts=1, seeds=1, cache_root=tmp_path / "cache", profile=False)
    bundle = fewstep.build(str(folder), out=tmp_path / "bundle", steps=(1,), options=options)
    values = json.loads((bundle.path / "manifest.json").read_text())
    assert values["versions"].keys() >= {"bs4", "ftfy"}
    values["versions"]["ftfy"] = "6.3"
    (bundle.path / "manifest.json").write_text(json.dumps(values))
    write_seal(bundle.path)
    verified = fewstep.verify(fewstep.Bundle.open(bundle.path), prompts=1, seeds=1)
    assert verified.report
    assert any(note.startswith("ftfy was installed where the bundle was built") for note in verified.caveats)
    values["tokenizers"]["tokenizer"]["operations"] = ["lower"]
    (bundle.path / "manifest.json").write_text(json.dumps(values))
    write_seal(bundle.path)
    with pytest.raises(
        ContractError, match=r"tokenizer: operations is \('lower',\) in the bundle and \(\) in the pipe"
    ):
        fewstep.verify(fewstep.Bundle.open(bundle.path), prompts=1, seeds=1)


def test_a_sentencepiece_model_alone_asks_for_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        SourceError, match=r"has spiece.model and no tokenizer.json: reading it takes .* sentencepiece"
    ) as caught:
        check_tokenizer_folder(tmp_path)
    assert caught.value.hint == "pip install 'fewstep[sentencepiece]'"
    (tmp_path / "tokenizer.json").write_text("{}")
    check_tokenizer_folder(tmp_path)

"""The level *call*: a bundle against the untouched pipeline, called with plain strings as its user calls it."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.contract import IMAGE, Contract, Guidance
from fewstep.bundle.source import SourceSpec
from fewstep.errors import ExportError, SourceError
from fewstep.numerics.inputs import example_inputs
from fewstep.numerics.metrics import psnr_db, sqnr_db
from fewstep.proof.user_process import Asked
from fewstep.recipe import call_options
from fewstep.recipe.recipe import Limits
from fewstep.runtimes.parity.harness import LOWERING, Check, mean_db
from fewstep.runtimes.sampling.sampler import open_sampler, open_tokenizers
from fewstep.text.probe_texts import odd_texts
from fewstep.untouched.request import Answer, Read, Request, Source, UserCall

if TYPE_CHECKING:
    from fewstep.export import Generator

Array = npt.NDArray[Any]

CALL = "call"
# A recipe that changes the network: what its images lose to the pipeline's is compression and lowering together.
WHOLE = "compression and lowering"
PLAIN = "a red apple on a table"
CAPITALS = 'A Red, Apple &amp; "Pear"'
OVER_LONG = "far longer than the text of any model, " * 60
NEGATIVE = "low quality, blurry"
SEED = 7
# A function that seeds what it makes returns the same generator whatever this is; 100 dB as of two kernels.
_OTHER_SEED, _REPEATED_DB = 16, 100.0
# On both sides of a threshold of the guidance scale (at 1, one pass and two give the same); without one, two scales.
_BELOW, _ABOVE, _SCALES = 0.5, 0.75, (1.0, 2.5)
# A pipeline in fp32, with what diffusers and torch themselves take.
_LIBRARIES_BYTES = 1 << 30


def user_calls(contract: Contract, default_steps: int, counts: Iterable[int]) -> tuple[UserCall, ...]:
    """Returns the calls that a bundle is compared in: the default, and what a user may write otherwise."""
    few = min(counts)
    default = UserCall("default", PLAIN if contract.takes_text else "", default_steps, SEED)
    calls, guidance = [default], contract.guidance
    if contract.takes_text:
        calls.append(UserCall("capitals", CAPITALS, few, SEED))
        calls.append(UserCall("over-long", OVER_LONG, few, SEED))
    scales = _scales(guidance)
    calls += [replace(default, name=f"guidance {w:g}", steps=few, guidance=w) for w in scales]
    if guidance.takes_negative:
        above = scales[-1] if scales else None
        for name, negative in (("negative prompt", NEGATIVE), ("empty negative prompt", "")):
            calls.append(replace(default, name=name, steps=few, guidance=above, negative=negative))
    return tuple(calls)


def _scales(guidance: Guidance) -> tuple[float, ...]:
    if guidance.kind in ("none", "fixed"):
        return ()
    if guidance.kind != "two_pass":
        return _SCALES
    around = 1.0 if guidance.threshold is None else guidance.threshold  # 1 where there should be one: diffusers' own
    return max(0.0, around - _BELOW), around + _ABOVE


@dataclass(frozen=True)
class Told:
    """What of a bundle, made or being made, decides the calls."""

    contract: Contract
    default_steps: int
    counts: tuple[int, ...]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """As in the manifest: see `fewstep.recipe.call_options`."""
    tile: int | None = None

    @classmethod
    def of(cls, contract: Contract, default_steps: int, counts: Iterable[int], generator: Generator) -> Told:
        """Returns what decides the calls; options that JSON cannot hold are left to the generator's source."""
        counts = tuple(counts)
        options = call_options.to_json(generator.options, counts)
        tile = None
        if not generator.is_loop and getattr(getattr(generator.pipeline, "vae", None), "use_tiling", False):
            tile = int(generator.pipeline.vae.tile_sample_min_size)
        return cls(contract, default_steps, counts, options, tile)

    def request(self, source: Source) -> Request:
        """Returns the request to the pipeline of a source."""
        contract = self.contract
        return Request(
            source=replace(source, tile=self.tile),
            kind=contract.output.kind,
            inputs={spec.name: spec.kind for spec in contract.inputs},
            options=self.options,
            # A scale that does nothing is left to the pipeline: if it does something after all, that shows.
            guidance=None if contract.guidance.kind == "none" else contract.guidance.scale,
            calls=user_calls(contract, self.default_steps, self.counts),
            texts=odd_texts() if contract.takes_text else (),
            given=_given(contract),
        )


def _given(contract: Contract) -> dict[str, Array]:
    """Returns what is given beside the prompt; images in levels of 8 bits, as users have them."""
    images = {spec.name for spec in contract.inputs if spec.kind == IMAGE}
    given = example_inputs(contract.inputs, 0)
    return {n: (np.round(a * 255) / 255).astype(np.float32) if n in images else a for n, a in given.items()}


def source_of(spec: SourceSpec) -> Source:
    """Returns how a user loads a source."""
    from fewstep.export.source.hub import download, is_hub_id
    from fewstep.export.source.load import BUILT_IN, SUFFIXES
    from fewstep.export.source.networks import variant_of_folder

    kind, uri, folder = "single-file", spec.uri, ""
    if uri in BUILT_IN:
        kind, uri = "function", BUILT_IN[uri]
    elif Path(uri).is_dir():
        kind, folder = "folder", uri
    elif is_hub_id(uri) and not Path(uri).exists():
        kind, folder = "folder", str(download(uri, SUFFIXES, local_only=True).folder)
    elif spec.kind is None and ":" in uri and not Path(uri).exists():  # a manifest names no code that runs
        kind = "function"
    return Source(
        kind=kind,
        uri=uri,
        folder=folder,
        config=spec.config,
        variant=variant_of_folder(Path(folder), spec.variant) if folder else spec.variant,
        decoder=spec.decoder,
        components={r.component: r.path for r in spec.replacements},
        keep=("safety_checker", "feature_extractor") if spec.keep_safety_checker else (),
        loras=tuple((lora.path, lora.scale) for lora in spec.loras),
        path=tuple(sys.path),
        cwd=str(Path.cwd()),
    )


class UserCalls:
    """The calls of one verification: begun early, so that they run beside the compiler, and compared at the end."""

    def __init__(self, request: Request, generator: Generator | None = None) -> None:
        self.request, self._generator = request, generator
        self._asked: Asked | None = None
        self._needed = 0 if generator is not None else _needed_bytes(request.source.folder)
        if generator is None and self._needed < psutil.virtual_memory().available:
            self._asked = Asked(request)

    @classmethod
    def of(cls, source: SourceSpec | Generator, told: Told) -> UserCalls:
        """Begins the calls of what a bundle is made of.

        A generator that Python handed over is called in this process, the only one that has it, when its turn comes.
        """
        if isinstance(source, SourceSpec):
            return cls(told.request(source_of(source)))
        if source.stored is not None:
            return cls(told.request(source_of(source.source.spec())))
        return cls(told.request(Source("in memory", source.name)), source)

    def close(self) -> None:
        """Ends what is still running."""
        if self._asked is not None:
            self._asked.close()

    def checks(
        self, bundle: Bundle, runtimes: Sequence[str], limits: Limits, *, changed: bool
    ) -> tuple[list[Check], list[str]]:
        """Returns the checks of a bundle against the calls, and what they do not show.

        Args:
            bundle: the bundle.
            runtimes: whose artifacts are compared.
            limits: the recipe's.
            changed: whether the recipe changed the network: images are then held to the recipe's limit for it.

        Raises:
            SourceError: a function returns another generator each time it is called.
        """
        available = psutil.virtual_memory().available
        if self._asked is None and self._generator is None:
            if self._needed >= available:
                told = f"it takes {self._needed >> 20} MiB of memory in float32, {available >> 20} MiB are free"
                return [], [f"not compared with the untouched pipeline (level call): {told}"]
            self._asked = Asked(self.request)
        try:
            answer = self._answer()
        except ExportError as error:
            failed = Check(LOWERING, CALL, "pipeline", None, None, None, "calls made", 0.0, 1.0)
            return [failed], [f"{error.message}; {error.hint}"]
        checks = compare_calls(bundle, runtimes, self.request, answer, limits, changed=changed)
        if self.request.source.kind == "function" and not all(check.passed for check in checks):
            self._check_repeatable(answer)
        return checks, _notes(self.request, answer, in_memory=self._generator is not None)

    def _check_repeatable(self, answer: Answer) -> None:
        """Raises SourceError where a function returns another generator when it is called again."""
        source, first = self.request.source, self.request.calls[:1]
        other = replace(self.request, source=replace(source, seed=_OTHER_SEED), calls=first, texts=())
        with closing(Asked(other)) as asked:
            again = asked.answer().outputs[0]
        one = answer.outputs[0]
        if isinstance(one, str) or isinstance(again, str):
            return
        found = sqnr_db(one, again) if one.shape == again.shape else float("-inf")
        if not found >= _REPEATED_DB:
            raise SourceError(
                f"{source.uri} returns another generator each time it is called: what two of them make has an SQNR of "
                f"{found:.0f} dB, expected {_REPEATED_DB:.0f} or more",
                hint="seed all that it makes (torch.manual_seed before the networks), or load the weights from files",
            )

    def _answer(self) -> Answer:
        if self._asked is not None:
            return self._asked.answer()
        from fewstep.untouched import calling, hearing
        from fewstep.untouched.loading import of_generator

        subject = of_generator(self._generator)
        made, texts = calling.outputs(subject, self.request), hearing.texts_of(subject, self.request)
        return Answer(tuple(made), texts, tuple(hearing.reads(subject, self.request, texts)))


def _needed_bytes(folder: str) -> int:
    """Returns the memory that a folder's pipeline takes in fp32."""
    count = 0
    for path in Path(folder).rglob("*.safetensors") if folder else ():
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(length))
        shapes = [entry["shape"] for name, entry in head.items() if name != "__metadata__"]
        count += sum(int(np.prod(shape)) for shape in shapes)
    return 4 * count + _LIBRARIES_BYTES


def _notes(request: Request, answer: Answer, *, in_memory: bool) -> list[str]:
    notes = []
    if in_memory:
        notes.append("the level call ran in the process of the compiler, the only one that has this generator")
    if answer.through:
        notes.append(f"the level call loaded the pipeline with fewstep's own loader: {answer.through}")
    for call, output in zip(request.calls, answer.outputs, strict=True):
        if isinstance(output, str):
            notes.append(f"the pipeline refuses the call {call.name!r}: {output}")
    return notes


def compare_calls(
    bundle: Bundle, runtimes: Sequence[str], request: Request, answer: Answer, limits: Limits, *, changed: bool
) -> list[Check]:
    """Returns the checks of a bundle against an answer; the arguments are those of `UserCalls.checks`."""
    checks = _token_checks(bundle, answer)
    for runtime in runtimes:
        found = _image_checks(bundle, runtime, request, answer, limits, changed=changed)
        checks += [replace(check, runtime=runtime) for check in found] if len(runtimes) > 1 else found
    return checks


def _token_checks(bundle: Bundle, answer: Answer) -> list[Check]:
    """Returns the checks that a bundle reads every text as the pipeline's tokenizers do."""
    checks = []
    for name, tokenizer in open_tokenizers(bundle.path, bundle.manifest.tokenizers).items():
        wanted = _of_the_text(answer.reads, name)
        wrong: dict[str, list[str]] = {"token ids": [], "masks": []}
        for text, reads in zip(answer.texts, wanted, strict=True):
            ids, mask = tokenizer(text)
            same_ids = [np.array_equal(read.ids, ids[0]) for read in reads]
            same_masks = [read.mask is None or np.array_equal(read.mask, mask[0]) for read in reads]
            for tensor, same in (("token ids", same_ids), ("masks", same_masks)):
                if not same or not all(same):
                    wrong[tensor].append(text)
        for tensor, texts in wrong.items():
            share = 1 - len(texts) / len(answer.texts) if answer.texts else 0.0
            sample = f"first of {len(texts)}: {texts[0][:60]!r}" if texts else f"{len(answer.texts)} texts"
            checks.append(Check(LOWERING, CALL, name, None, sample, tensor, "equal", share, 1.0))
    return checks


def _of_the_text(reads: Sequence[Sequence[Read]], name: str) -> list[list[Read]]:
    """Returns what a tokenizer gave for each text, without what is the same for every text: a negative prompt's."""
    of_one = [[read for read in found if read.tokenizer == name] for found in reads]
    counts = {len(found) for found in of_one}
    if len(counts) != 1:
        return of_one
    varying = [
        i for i in range(counts.pop()) if any(not np.array_equal(found[i].ids, of_one[0][i].ids) for found in of_one)
    ]
    return [[found[i] for i in varying] for found in of_one]


def _image_checks(
    bundle: Bundle, runtime: str, request: Request, answer: Answer, limits: Limits, *, changed: bool
) -> list[Check]:
    """Returns the checks of what a bundle makes of each call, in fp32 where the runtime can compute so."""
    kind = request.kind
    metric, compare = ("PSNR dB", psnr_db) if kind == "picture" else ("SQNR dB", sqnr_db)
    error, limit = (WHOLE, None) if changed else (LOWERING, limits.picture_psnr_db)
    checks = []
    sampler = open_sampler(bundle, runtime=runtime, exact=True)
    try:
        for call, wanted in zip(request.calls, answer.outputs, strict=True):
            options: dict[str, Any] = {} if call.negative is None else {"negative": call.negative}
            schedule = bundle.manifest.schedule(call.steps)
            given = [request.given]
            (made,) = sampler.batch(
                [call.prompt], [call.seed], schedule, guidance=call.guidance, inputs=given, **options
            )
            value = float("nan")  # the pipeline refuses the call, or gives another shape
            if not isinstance(wanted, str) and wanted.shape == made.output.shape:
                value = compare(wanted, made.output)
            sample = f"{call.name}, {call.steps} steps"
            checks.append(Check(error, CALL, kind, None, sample, None, metric, value, limit))
    finally:
        sampler.close()
    if changed:
        mean = mean_db(check.value for check in checks)
        sample = f"{len(checks)} calls"
        checks.append(Check(error, CALL, kind, None, sample, None, f"mean {metric}", mean, limits.compression_psnr_db))
    return checks

"""Hears what a generator's own code makes of a text, up to the first step of its loop, without computing a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from fewstep.bundle.contract import is_denoiser
from fewstep.export.generator import Generator
from fewstep.export.record.intercept import Stub
from fewstep.export.record.run import run
from fewstep.export.record.run_record import Run, Text, flatten_tensors, name_inputs
from fewstep.export.schedule.extract import stand_ins

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Given:
    """What a component is given for one text: tensors by name, plain values in order.

    ``constant`` names the tensors that come from nothing that is listened to.
    """

    component: str
    tensors: Mapping[str, torch.Tensor]
    plain: tuple[Any, ...]
    constant: frozenset[str]


@dataclass(frozen=True)
class Heard:
    """What became of one text: the calls of tokenizers, and of components up to the first of the loop.

    ``error`` is what the pipeline said where it did not get that far.
    """

    text: str
    texts: tuple[Text, ...]
    given: tuple[Given, ...]
    error: str | None = None

    def of(self, tokenizer: str) -> list[Text]:
        """Returns the calls of one tokenizer, in order."""
        return [text for text in self.texts if text.tokenizer == tokenizer]


class _LoopBegins(BaseException):
    """Ends a run where its loop begins: no exception, which a pipeline might handle."""

    def __init__(self, component: str, arguments: Mapping[str, Any]) -> None:
        super().__init__(component)
        self.component, self.arguments = component, arguments


class TextPath:
    """Runs a generator with texts up to its loop; networks return what they returned in a recorded run."""

    def __init__(
        self, generator: Generator, recorded: Run, steps: int, inputs: Mapping[str, np.ndarray[Any, Any]]
    ) -> None:
        self._generator, self._recorded, self._steps, self._inputs = generator, recorded, steps, inputs
        self._stubs: dict[str, Stub] = stand_ins(recorded, lambda step, shape: torch.zeros(shape))
        self._stubs |= {name: _ending(name) for name in self._stubs if is_denoiser(name)}
        self._heard: dict[str, Heard] = {}

    def hear(self, text: str) -> Heard:
        """Returns what becomes of a text; each is run once."""
        if text not in self._heard:
            self._heard[text] = self._run(text)
        return self._heard[text]

    def _run(self, text: str) -> Heard:
        generator, runs, end, error = self._generator, list[Run](), None, None
        texts = text if generator.batch == 1 else [text] * generator.batch
        try:
            run(
                generator,
                texts,
                0,
                steps=self._steps,
                guidance=self._recorded.guidance,
                inputs=self._inputs,
                stubs=self._stubs,
                on_start=runs.append,
            )
        except _LoopBegins as begin:
            end = begin
        except Exception as raised:  # whatever a pipeline says of this text; what was heard before tells more
            error = str(raised) or type(raised).__name__
        (heard,) = runs
        calls = [(call.component, call.arguments) for call in heard.every_call]
        calls += [(end.component, end.arguments)] if end is not None else []
        given = tuple(self._given(heard, component, arguments) for component, arguments in calls)
        return Heard(text, tuple(heard.texts), given, error)

    def _given(self, heard: Run, component: str, arguments: Mapping[str, Any]) -> Given:
        tensors = name_inputs(self._generator.parts[component].folder, arguments)
        plain = tuple(value for value in tree_flatten(dict(arguments))[0] if isinstance(value, _PLAIN))
        constant = frozenset(name for name, tensor in tensors.items() if not heard.tape.varies(tensor))
        return Given(component, tensors, plain, constant)


def _ending(component: str) -> Stub:
    def end(_: int, arguments: Any) -> Any:
        raise _LoopBegins(component, arguments)

    return end


def used_texts(recorded: Run) -> list[tuple[int, Text]]:
    """Returns the calls of tokenizers whose ids or mask reach the loop, each with its number among its tokenizer's."""
    makers = {id(t): call for call in recorded.calls for t in _tensors(call.result)}
    pending = [t for call in recorded.denoiser_calls for t in _tensors(dict(call.arguments))]
    seen: set[int] = set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        maker = makers.get(id(tensor))
        pending += recorded.tape.parents(tensor) if maker is None else _tensors(dict(maker.arguments))
    return [(i, text) for i, text in _numbered(recorded.texts) if seen & {id(text.ids), id(text.mask)}]


def _numbered(texts: list[Text]) -> Iterator[tuple[int, Text]]:
    counts: dict[str, int] = {}
    for text in texts:
        number = counts.get(text.tokenizer, 0)
        counts[text.tokenizer] = number + 1
        yield number, text


def _tensors(value: Any) -> list[torch.Tensor]:
    return [tensor for _, tensor in flatten_tensors(value, "")]

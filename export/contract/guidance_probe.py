"""Runs a generator at any guidance scale and with any text at little cost, to find out what these change.

The networks of the loop are replaced by stand-ins whose outputs are random numbers; what runs before the loop is
computed once for each of its inputs; what runs after it gives what it gave before.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from fewstep.bundle.contract import is_denoiser
from fewstep.errors import ExportError, FewstepError
from fewstep.export.generator import Generator
from fewstep.export.record.intercept import Stub, noise_tensor
from fewstep.export.record.replace_tensors import replace_tensors
from fewstep.export.record.run import run
from fewstep.export.record.run_record import Call, Run
from fewstep.export.schedule.extract import example_prompts, refuse
from fewstep.numerics import noise
from fewstep.numerics.inputs import example_inputs, stacked

_SEED = 1 << 42
Prompt = str | Sequence[str]


@dataclass(frozen=True)
class Branch:
    """What one pass of a network in a step was given, and what it gave, by flat name."""

    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]


class Probe:
    """Runs of a generator with stand-ins.

    Args:
        generator: the generator.
        recorded: a run of it with one pass in each step.
        steps: how many steps a run makes unless told otherwise.
        plain: the guidance scale of ``recorded``.
        shapes: what gives results of the right shapes for networks whose weights are in files.
    """

    def __init__(
        self, generator: Generator, recorded: Run, steps: int, plain: float, shapes: Mapping[str, Stub] | None = None
    ) -> None:
        self.generator, self.steps, self.plain = generator, steps, plain
        self._shapes = shapes
        self._calls: dict[str, list[Call]] = {}
        first_of_loop = next(i for i, call in enumerate(recorded.every_call) if is_denoiser(call.component))
        self._before: set[str] = set()
        for i, call in enumerate(recorded.every_call):
            self._calls.setdefault(call.component, []).append(call)
            (self._before.add if i < first_of_loop else self._before.discard)(call.component)
        self._last = len(recorded.states)
        self._made: dict[str, Any] = {}
        self._compute = {name: self._computing(name) for name in self._before}

    def with_values(self, recorded: Run) -> Probe:
        """Returns a probe that computes what runs before the loop with its weights, wherever these are."""
        probe = Probe(self.generator, recorded, self.steps, self.plain)
        if self.generator.stored is not None:
            loaded = self.generator.stored.loaded(self.generator)
            probe._shapes = self._shapes
            probe._compute = {name: loaded[name] for name in probe._before}
        return probe

    def prompt(self, which: int) -> Prompt:
        """Returns one of two prompts that differ; of a batch, one for each sample."""
        own = example_prompts(self.generator)
        texts = [own] if isinstance(own, str) else list(own)
        if which == 1:  # others from the first letter on: what is too long is cut off
            texts = [f"{text[::-1]} z" for text in reversed(texts)]
        return texts[0] if isinstance(own, str) else texts

    def text(self, text: str) -> Prompt:
        """Returns a text as the prompt; of a batch, for each sample."""
        return text if self.generator.batch == 1 else [text] * self.generator.batch

    def run(
        self,
        w: float | None = None,
        *,
        which: int = 0,
        prompt: Prompt | None = None,
        negative: str | None = None,
        steps: int | None = None,
    ) -> Run:
        """Returns a run.

        Args:
            w: the guidance scale; None takes that of one pass.
            which: of two examples of the user's inputs.
            prompt: in place of the example's.
            negative: the negative prompt.
            steps: the step count.

        Raises:
            ExportError: the generator fails.
        """
        generator = self.generator
        inputs = stacked([example_inputs(generator.inputs, which + 2 * i) for i in range(generator.batch)])
        w = self.plain if w is None else w
        try:
            return run(
                generator,
                self.prompt(which) if prompt is None else prompt,
                0,
                steps=steps or self.steps,
                guidance=w,
                negative=negative,
                inputs=inputs,
                stubs=self._stubs(),
            )
        except FewstepError:
            raise
        except Exception as error:  # whatever the user's own code raises
            first = str(error).strip().split("\n", 1)[0]
            raise refuse(f"{generator.name} fails at guidance {w:g}: {type(error).__name__}: {first}") from error

    def _stubs(self) -> dict[str, Stub]:
        counter = itertools.count()  # of all networks of the loop together
        stubs: dict[str, Stub] = dict(self._shapes or {})
        for name in self._calls:
            stubs[name] = self._kept(name) if name in self._before else self._standing_in(name, counter)
        return stubs

    def _standing_in(self, component: str, counter: itertools.count[int]) -> Stub:
        """Returns a stand-in for a network of the loop, or for one after it."""
        calls = self._calls[component]
        in_loop = any(call.steps_done < self._last for call in calls)

        def result(number: int, arguments: Any) -> Any:
            call = calls[min(number, len(calls) - 1)]
            if not in_loop:
                return call.result
            passes, step = _rows(arguments) // max(_rows(call.arguments), 1), next(counter)

            def made(tensor: torch.Tensor) -> torch.Tensor:
                shape = tuple(tensor.shape)
                if shape and passes > 1:
                    shape = (passes * shape[0], *shape[1:])
                return noise_tensor(_SEED, step, shape).to(tensor.dtype)

            return replace_tensors(call.result, made)

        return result

    def _kept(self, component: str) -> Stub:
        """Returns what computes a network before the loop once for each of its inputs."""

        def result(number: int, arguments: Any) -> Any:
            key = f"{component} {_digest(arguments)}"
            if key not in self._made:
                self._made[key] = self._compute[component](number, arguments)
            return replace_tensors(self._made[key], lambda tensor: tensor.clone())  # pipelines may write to it

        return result

    def _computing(self, component: str) -> Stub:
        if self._shapes is not None:
            return _by_content(self._shapes[component])
        part = self.generator.parts[component]
        # Fetched before anybody listens to it.
        method: Callable[..., Any] = getattr(self.generator.module(component), part.method)
        return lambda _, arguments: method(**arguments)


def _rows(arguments: Any) -> int:
    tensors = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.ndim > 0]
    return tensors[0].shape[0] if tensors else 1


def _digest(arguments: Any, row: int | None = None, rows: int = 0) -> str:
    """Returns a hash of arguments; of one row of all tensors that have so many, where a row is given."""
    total = hashlib.sha256()
    for leaf in tree_leaves(arguments):
        if not isinstance(leaf, torch.Tensor):
            total.update(repr(leaf).encode())
            continue
        tensor = leaf[row] if row is not None and leaf.ndim and leaf.shape[0] == rows else leaf
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _by_content(shapes: Stub) -> Stub:
    """Returns a stand-in whose results are random numbers that the row of its inputs alone decides."""

    def result(number: int, arguments: Any) -> Any:
        offset = itertools.count()

        def made(tensor: torch.Tensor) -> torch.Tensor:
            which, rows = next(offset), tensor.shape[0] if tensor.ndim else 0
            if not tensor.dtype.is_floating_point or rows == 0:
                return tensor
            each = [
                noise.normal(int(_digest(arguments, row, rows)[:12], 16), which, tuple(tensor.shape[1:]))
                for row in range(rows)
            ]
            return torch.from_numpy(np.stack(each)).to(tensor.dtype)

        return replace_tensors(shapes(number, arguments), made)

    return result


def passes(found: Run, single: Run) -> list[float]:
    """Returns how much more than a run of one pass the networks of the loop computed, step by step."""

    def sizes(of: Run) -> list[int]:
        each = [0] * len(of.states)
        for call in of.denoiser_calls:
            each[call.steps_done] += sum(tensor.numel() for tensor in call.outputs.values())
        return each

    if len(found.states) != len(single.states):
        raise refuse(f"the generator makes {len(found.states)} steps with guidance and {len(single.states)} without")
    return [many / one for many, one in zip(sizes(found), sizes(single), strict=True)]


def branches(found: Run, single: Run, component: str, k: int) -> tuple[Branch, Branch]:
    """Returns the two passes of a network in a step, in the pipeline's order: one batch of both, or two calls.

    Raises:
        ExportError: they are neither.
    """
    ours = [call for call in found.of(component) if call.steps_done == k]
    one = next((call for call in single.of(component) if call.steps_done == k), None)
    if one is None or len(ours) not in (1, 2):
        raise refuse(f"{component} is called {len(ours)} times in step {k} with guidance, expected once or twice")
    if len(ours) == 2:
        return Branch(ours[0].inputs, ours[0].outputs), Branch(ours[1].inputs, ours[1].outputs)
    halves = [
        {name: _halves(component, name, tensor, of_one.get(name)) for name, tensor in many.items()}
        for many, of_one in ((ours[0].inputs, one.inputs), (ours[0].outputs, one.outputs))
    ]
    first, second = (Branch(*({name: pair[i] for name, pair in named.items()} for named in halves)) for i in range(2))
    return first, second


def _halves(
    component: str, name: str, tensor: torch.Tensor, one: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if one is not None and tensor.shape == one.shape:
        return tensor, tensor
    if one is not None and tensor.ndim and tensor.shape == (2 * one.shape[0], *one.shape[1:]):
        first, second = tensor.chunk(2)
        return first, second
    without = "nothing" if one is None else str(list(one.shape))
    raise refuse(
        f"{component}: {name} is {list(tensor.shape)} with guidance and {without} without, expected twice that"
    )


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns whether two tensors are the same to the rounding of a network's float32."""
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def failing(error: FewstepError) -> ExportError:
    """Returns an error of another kind as one of the description."""
    return error if isinstance(error, ExportError) else ExportError(str(error), hint=error.hint)

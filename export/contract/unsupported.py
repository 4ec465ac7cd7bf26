"""Refuses loops that a bundle cannot express, before anything is compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fewstep.bundle.contract import DENOISER, NOISE
from fewstep.errors import ExportError
from fewstep.export.contract.output_head import Post
from fewstep.export.record.run_record import Run
from fewstep.numerics.noise import DRAWS_OF_A_STEP, EARLY_DRAWS, draw_offset


def refuse_other_networks(run: Run, inside: Sequence[str], others: Sequence[Run]) -> None:
    """Raises ExportError if another network than those of every step takes part in some steps.

    Args:
        run: the recorded run.
        inside: the components that it calls once in every step.
        others: runs at other step counts.
    """
    end = len(run.states)
    for call in run.calls:
        if call.component not in inside and 0 < call.steps_done < end:
            raise ExportError(
                f"{call.component} runs after step {call.steps_done - 1} of {end}, expected it in every step or in "
                "none",
                hint=f"name a network that replaces {DENOISER} in some steps {DENOISER}_...: one of them in each",
            )
    ours = _outside(run, inside)
    for other in others:
        theirs = _outside(other, inside)
        for name in ours.keys() | theirs.keys():
            if ours[name] != theirs[name]:
                raise ExportError(
                    f"{name} is called {ours[name]} times in a loop of {end} calls of {DENOISER} and "
                    f"{theirs[name]} times in one of {len(other.states)}, expected {DENOISER} alone to be called "
                    "by the step",
                    hint=f"name a network that replaces {DENOISER} in some steps {DENOISER}_...: one of them in each",
                )


def refuse_changing_arguments(runs: Sequence[Run], inside: Sequence[str], options: Sequence[str]) -> None:
    """Raises ExportError if what a network of the loop is given beside tensors is not the same in every step.

    Args:
        runs: recorded runs of several step counts.
        inside: the networks of the loop.
        options: what the user chose of the pipeline, which may be why.
    """
    for component in inside:
        calls = [call for run in runs for call in run.of(component)]
        first = dict(_told(calls[0].arguments, ""))
        for call in calls[1:]:
            told = dict(_told(call.arguments, ""))
            for name in [*first, *told]:
                ours, theirs = first.get(name, "nothing"), told.get(name, "nothing")
                if ours != theirs:
                    chosen = f"; of the options given ({', '.join(options)}) one may say so" if options else ""
                    raise ExportError(
                        f"{component}: argument {name} is {ours} in step {calls[0].steps_done} and {theirs} in step "
                        f"{call.steps_done}, expected the same in every step, or a tensor of one number",
                        hint=f"leave out what switches something on or off in some steps{chosen}",
                    )


def _told(value: object, name: str) -> Iterator[tuple[str, str]]:
    """Yields numbers, texts and where tensors are among nested arguments, by dotted name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _told(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _told(item, f"{name}.{i}")
    elif isinstance(value, torch.Tensor):
        yield name, "a tensor"
    elif isinstance(value, (bool, int, float, str, type(None))):
        yield name, repr(value)


def refuse_other_shapes(run: Run, post: Post | None) -> None:
    """Raises ExportError if what a loop makes of its denoiser's output alone cannot be added to its latent."""
    shape = run.states[0].shape
    for call in run.denoiser_calls:
        name, F = next(iter(call.outputs.items()))
        F = F if post is None else post(F)
        if F.shape != shape:
            raise ExportError(
                f"{call.component}: output {name} is {list(F.shape)}, expected the latent's {list(shape)}",
                hint=f"move what makes one of the other into the network {call.component!r}",
            )


def refuse_further_noise(
    run: Run, inside: Sequence[str], given: Callable[[str, int], Mapping[str, torch.Tensor]], latent: str | None
) -> None:
    """Raises ExportError if a step draws beside its latent's noise what is not for a network of every step.

    Args:
        run: the recorded run.
        inside: the components that it calls once in every step.
        given: (component, step) -> the tensors that it was given there, by flat name.
        latent: which of the denoiser's is the latent.
    """
    further = {offset for offset in run.draws if offset >= draw_offset(1, 1)}
    numbers = range(1, 1 + len(run.step_draws()))
    for component in inside if further else ():
        for k in (call.steps_done for call in run.of(component) if call.steps_done):
            inputs = [t for name, t in given(component, k).items() if name != latent and run.tape.varies(t)]
            leaves = run.tape.cut(inputs, what=component).leaves
            further -= {draw_offset(k, n) for n in numbers if f"{NOISE}{draw_offset(k, n)}" in leaves}
    if further:
        gap = (min(further) - EARLY_DRAWS) // DRAWS_OF_A_STEP
        raise ExportError(
            f"step {gap - 1} draws noise more than once, expected at most one array for the latent",
            hint="draw all that a step adds to its latent as one array",
        )


def _outside(run: Run, inside: Sequence[str]) -> Counter[str]:
    """Returns how often each component outside the loop was called."""
    return Counter(call.component for call in run.calls if call.component not in inside)

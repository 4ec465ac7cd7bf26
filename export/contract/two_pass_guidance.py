"""Reads guidance with two passes off runs: how they are combined, and what the unconditional one is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fewstep.bundle.contract import (
    BEFORE,
    CONDITIONS,
    DRAW,
    GUIDANCE,
    LATENT,
    LOOP,
    TEXT,
    TIME,
    TIMESTEP,
    ZEROS,
    Guidance,
)
from fewstep.bundle.schedule import Schedule, advance
from fewstep.errors import FewstepError, ScheduleError
from fewstep.export.contract.guidance_probe import Branch, Probe, branches, close, failing, passes
from fewstep.export.record.run_record import Run
from fewstep.export.record.tape import GlueModule
from fewstep.export.schedule.extract import Anatomy, coefficients, refuse
from fewstep.export.trace.component_module import Wiring
from fewstep.numerics.guidance import combine

UNCONDITIONAL = "guidance/unconditional.safetensors"
# Scales that the formula is checked at, where the pipeline guides there.
_SCALES = (1.5, 3.0, 7.5)
# The reference combines in float32; a stand-in's outputs are of the order of 1.
_TOLERANCE = 1e-4
_LOOP_TOLERANCE = 1e-3
# With capitals and spaces, so that what is done to the prompt's text shows.
_NEGATIVE = "Blurry,  LOW quality"


@dataclass(frozen=True)
class Guided:
    """What the contract says of two passes, the values of the unconditional one, and which of them comes first."""

    guidance: Guidance
    values: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    conditional: int = 1


@dataclass(frozen=True)
class _Condition:
    """An argument of a network of the loop that is the same in all steps, and where its value comes from."""

    component: str
    argument: str
    origin: str | None


class TwoPass:
    """Reads one generator's guidance; see `read_two_passes`."""

    def __init__(
        self,
        probe: Probe,
        guidance: Guidance,
        anatomy: Anatomy,
        wirings: Mapping[str, Wiring],
        schedules: Mapping[int, Schedule],
    ) -> None:
        self._probe, self._guidance, self._anatomy = probe, guidance, anatomy
        self._wirings, self._schedules = wirings, schedules
        self._conditions = _conditions(wirings)
        self._w = next(w for w in (*_SCALES, 100.0) if guidance.two_passes(w))
        self._plain = [probe.run(which=i) for i in range(2)]
        self._default = [probe.run(self._w, which=i) for i in range(2)]
        self._conditional = self._order()

    def read(self, recorded: Run) -> Guided:
        """Returns what was found; ``recorded`` is the run with one pass that the generator is described by."""
        shift = self._combined()
        negative, replaced = self._unconditional()
        values = self._values(recorded, replaced)
        self._check_apart(replaced)
        if any(value.any() for value in values.values()):
            self._check_runs()  # zeros are in every network's range, a label may not be
        guidance = replace(
            self._guidance,
            shift=shift,
            negative=negative,
            unconditional={o: ZEROS if not v.any() else UNCONDITIONAL for o, v in values.items()},
            takes_negative=self._takes_negative(),
        )
        if guidance.takes_negative:
            guidance = self._with_empty(guidance, replaced)
        return Guided(guidance, {o: v for o, v in values.items() if v.any()}, self._conditional)

    # --- the formula

    def _combined(self) -> float:
        """Returns b of F = F_u + (w + b) (F_c - F_u), as it is at all scales, steps and step counts."""
        own = self._probe.generator.guidance
        scales = [w for w in {*_SCALES, own} if self._guidance.two_passes(w)]
        cases = [(w, self._probe.steps) for w in sorted(scales)] + [(self._w, n) for n in self._schedules]
        found = {self._shift(w, n) for w, n in cases}
        if len(found) != 1:
            raise refuse(f"the weight of guidance is w {' or w '.join(f'{b:+g}' for b in sorted(found))} by the scale")
        return found.pop()

    def _shift(self, w: float, steps: int) -> float:
        single, found = self._probe.run(steps=steps), self._probe.run(w, steps=steps)
        counts = passes(found, single)
        if any(count != 2 for count in counts):
            raise refuse(
                f"at guidance {w:g} the networks make {', '.join(f'{c:g}' for c in counts)} passes in {steps} steps, "
                "expected two in each"
            )
        return self._shift_of_loop(w, found, single) if not found.model_outputs else self._shift_of(w, found, single)

    def _shift_of(self, w: float, found: Run, single: Run) -> float:
        shifts = set()
        for k, call in enumerate(single.denoiser_calls):
            pair = self._pair(found, single, call.component, k)
            F_u, F_c = (self._output(branch) for branch in pair)
            given, x = found.once(found.model_outputs[k]), found.states[k]
            try:
                kept = coefficients(given, [F_u, F_c - F_u, x], f"at guidance {w:g} the model output of step {k}")
                plain = coefficients(single.model_outputs[k], [self._output(Branch({}, call.outputs)), x], "")
            except ScheduleError as error:
                raise refuse(f"{error.message}: guidance is not F_u + w (F_c - F_u)") from error
            same = np.allclose([kept[0], kept[2]], plain, rtol=_TOLERANCE, atol=_TOLERANCE)
            shift = kept[1] / kept[0] - w if kept[0] else float("nan")
            if not same or not abs(shift - round(shift)) <= _TOLERANCE * max(1.0, w):
                raise refuse(
                    f"at guidance {w:g} step {k} is made of {kept[0]:.4g} F_u and {kept[1]:.4g} (F_c - F_u), "
                    f"expected {plain[0]:.4g} (F_u + w (F_c - F_u))"
                )
            shifts.add(float(round(shift)))
        if len(shifts) != 1:
            raise refuse(f"at guidance {w:g} the weight differs from step to step")
        return shifts.pop()

    def _shift_of_loop(self, w: float, found: Run, single: Run) -> float:
        """Returns 0 if the table of a loop in plain PyTorch gives what the loop gave with combined outputs."""
        schedule = self._schedules[len(found.states)]
        for k, call in enumerate(single.denoiser_calls):
            F_u, F_c = (self._output(b).double().numpy() for b in self._pair(found, single, call.component, k))
            drawn = found.draws[k + 1].double().numpy() if schedule.uses_noise(k) else None
            if schedule.uses_anchor or any(map(any, schedule.h)):
                raise refuse("a loop in plain PyTorch with two passes and memory of earlier steps cannot be checked")
            F = combine(F_u, F_c, w)
            x, _ = advance(schedule, k, found.states[k].double().numpy(), F, drawn, [], None)
            wanted = found.latents[k].double().numpy()
            if not np.abs(x - wanted).max() <= _LOOP_TOLERANCE * max(np.abs(wanted).max(), 1e-30):
                raise refuse(f"at guidance {w:g} step {k} of the loop is not that of F_u + w (F_c - F_u)")
        return 0.0

    def _output(self, branch: Branch) -> torch.Tensor:
        F = next(iter(branch.outputs.values()))
        return F if self._anatomy.post is None else self._anatomy.post(F)

    # --- the branches

    def _order(self) -> int:
        """Returns which of the two passes is given what the only one is without guidance."""
        wrong = []
        for which in (1, 0):
            wrong = [self._differs(run, single, which) for run, single in self._both()]
            if wrong == [None, None]:
                return which
        raise refuse(f"{wrong[0] or wrong[1]} is another with guidance than without in both passes")

    def _both(self) -> list[tuple[Run, Run]]:
        return list(zip(self._default, self._plain, strict=True))

    def _differs(self, found: Run, single: Run, which: int) -> str | None:
        """Returns the first condition that a pass is given otherwise than the only pass is."""
        for c in self._conditions:
            k = _step_of(single, c.component)
            inputs = branches(found, single, c.component, k)[which].inputs
            if c.argument in inputs and not close(inputs[c.argument], _alone(single, c)):
                return f"{c.component}.{c.argument}"
        return None

    def _pair(self, found: Run, single: Run, component: str, k: int) -> tuple[Branch, Branch]:
        """Returns the unconditional and the conditional pass."""
        pair = branches(found, single, component, k)
        return pair[1 - self._conditional], pair[self._conditional]

    def _given(self, found: Run, single: Run, c: _Condition) -> torch.Tensor:
        """Returns a condition of the unconditional pass."""
        return self._pair(found, single, c.component, _step_of(single, c.component))[0].inputs[c.argument]

    # --- the unconditional one

    def _unconditional(self) -> tuple[str, tuple[_Condition, ...]]:
        """Returns the text of the unconditional pass, and the conditions that are no text's but always the same."""
        given = {c: [self._given(run, single, c) for run, single in self._both()] for c in self._conditions}
        self._refuse_mixed(given)
        options = self._probe.generator.options
        texts = dict.fromkeys([str(options.get("negative_prompt") or ""), ""])
        left: dict[str, list[_Condition]] = {}
        for text in texts:
            of_text = [self._probe.run(which=i, prompt=self._probe.text(text)) for i in range(2)]
            left[text] = [c for c in given if c.origin is not None and not _same(given[c], of_text, c)]
        negative = min(left, key=lambda text: len(left[text]))
        other = self._otherwise(
            self._probe.run(prompt=self._probe.text(negative)), [c for c in given if c not in left[negative]]
        )
        if other is not None:
            raise refuse(f"{other} is made otherwise of the text {negative!r} than of the prompt it is described with")
        for c in left[negative]:
            if not close(*given[c]):
                raise refuse(
                    f"{c.component}.{c.argument}: what the pipeline gives the unconditional pass is neither what the "
                    f"text {negative!r} gives nor the same for all prompts"
                )
        return negative, tuple(left[negative])

    def _refuse_mixed(self, given: Mapping[_Condition, Sequence[torch.Tensor]]) -> None:
        """Raises ExportError if what is mixed with the latent differs between the passes."""
        for c in given:
            for (run, single), ours in zip(self._both(), given[c], strict=True):
                k = _step_of(single, c.component)
                theirs = self._pair(run, single, c.component, k)[1].inputs[c.argument]
                if c.origin is None and not close(ours, theirs):
                    raise refuse(f"{c.component}.{c.argument} mixes the latent with what differs between two passes")

    def _values(self, recorded: Run, replaced: Sequence[_Condition]) -> dict[str, np.ndarray[Any, Any]]:
        """Returns one row of the value of each condition that is always the same, by origin."""
        found: dict[str, np.ndarray[Any, Any]] = {}
        run, single = self._default[0], self._plain[0]
        if any(self._given(run, single, c).any() for c in replaced) and self._probe.generator.stored is not None:
            probe = self._probe.with_values(recorded)  # stand-ins show which values are always the same, not which
            run, single = probe.run(self._w), probe.run()
        for c in replaced:
            tensor = self._given(run, single, c)
            rows = tensor.shape[0] // self._probe.generator.batch if tensor.ndim else 1
            if tensor.ndim and not all(close(part, tensor[:rows]) for part in tensor.split(rows)):
                raise refuse(f"{c.component}.{c.argument}: the unconditional pass differs between samples of a batch")
            value = (tensor[:rows] if tensor.ndim else tensor.reshape(1)).detach().contiguous().numpy().copy()
            assert c.origin is not None
            if c.origin in found and not np.allclose(found[c.origin], value, rtol=1e-4, atol=1e-5):
                raise refuse(f"{c.origin} has two values in the unconditional pass")
            found[c.origin] = value
        return found

    def _check_apart(self, replaced: Sequence[_Condition]) -> None:
        """Raises ExportError if what is still computed for the unconditional pass is made of what is not."""
        given = {c.origin for c in replaced}
        kept = {c.origin for c in self._conditions} - given
        for name, wiring in reversed(list(self._wirings.items())):
            if wiring.phase != BEFORE or not any(f"{name}.{output}" in kept for output in wiring.outputs):
                continue
            mixed = next((origin for origin in wiring.origins if origin in given), None)
            if mixed is not None:
                raise refuse(f"{name} is made of {mixed}, which the unconditional pass replaces, and is not replaced")
            kept |= set(wiring.origins)

    # --- a negative prompt of the user

    def _takes_negative(self) -> bool:
        """Returns whether the pipeline takes a negative prompt, and does with its text what it does with the prompt."""
        generator = self._probe.generator
        if generator.is_loop or not any(spec.kind == TEXT for spec in generator.inputs):
            return False
        if "negative_prompt" not in inspect.signature(generator.pipeline.__call__).parameters:
            return False
        return "negative_prompt" not in generator.options and self._is_text(_NEGATIVE)

    def _is_text(self, text: str) -> bool:
        """Returns whether a negative prompt gives the unconditional pass what the text gives as a prompt."""
        of_text = self._probe.run(prompt=self._probe.text(text))
        if self._otherwise(of_text, self._conditions) is not None:
            return False
        try:
            found = self._probe.run(self._w, negative=text)
            return all(
                close(self._given(found, self._plain[0], c), _alone(of_text, c))
                for c in self._conditions
                if c.origin is not None
            )
        except FewstepError:
            return False

    def _otherwise(self, found: Run, conditions: Sequence[_Condition]) -> str | None:
        """Returns the first condition that the described operations do not make of a run's text as the run does."""
        wiring = self._wirings.get(CONDITIONS)
        if wiring is None:
            return None
        made = GlueModule(wiring.before)(*(found.tape.tensor(origin) for origin in wiring.origins))
        by_origin = {f"{CONDITIONS}.{name}": tensor for name, tensor in zip(wiring.outputs, made, strict=True)}
        for c in conditions:
            if c.origin in by_origin and not close(by_origin[c.origin], _alone(found, c)):
                return f"{c.component}.{c.argument}"
        return None

    def _check_runs(self) -> None:
        """Raises ExportError if a network of the loop fails with what the unconditional pass is given."""
        generator, found = self._probe.generator, self._default[0]
        stored = None if generator.stored is None else generator.stored.loaded(generator)
        for name in {c.component for c in self._conditions}:
            part, arguments = generator.parts[name], found.of(name)[0].arguments
            try:
                with torch.no_grad():
                    if stored is None:
                        getattr(generator.module(name), part.method)(**arguments)
                    else:
                        stored[name](0, arguments)
            except Exception as error:  # whatever a network raises
                told = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                raise refuse(f"{name} fails with what the unconditional pass is given: {told}") from error

    def _with_empty(self, guidance: Guidance, replaced: Sequence[_Condition]) -> Guidance:
        """Returns what is said of an empty negative prompt: a text, or as none; where it is neither, none is taken."""
        if (not replaced and guidance.negative == "") or self._is_text(""):
            return guidance
        found = self._probe.run(self._w, negative="")
        none = all(
            close(*(self._given(run, self._plain[0], c) for run in (found, self._default[0]))) for c in self._conditions
        )
        return replace(guidance, empty_is_none=none, takes_negative=none)


def read_two_passes(
    probe: Probe,
    guidance: Guidance,
    anatomy: Anatomy,
    wirings: Mapping[str, Wiring],
    schedules: Mapping[int, Schedule],
    recorded: Run,
) -> Guided:
    """Returns how a generator guides with two passes.

    A generator that guides in a way that a bundle cannot express, but is not asked to, becomes one of a fixed scale.

    Args:
        probe: runs of the generator.
        guidance: what is known of it: where two passes begin.
        anatomy: of its loop.
        wirings: of its components.
        schedules: its tables.
        recorded: a run with one pass.

    Raises:
        ExportError: it guides in a way that a bundle cannot express, and the scale wanted asks for it.
    """
    try:
        return TwoPass(probe, guidance, anatomy, wirings, schedules).read(recorded)
    except FewstepError as error:
        if guidance.two_passes(guidance.scale):
            raise failing(error) from error
        fixed = Guidance("fixed", guidance.scale, own=guidance.own, reason=error.message)
        return Guided(fixed)


def _conditions(wirings: Mapping[str, Wiring]) -> tuple[_Condition, ...]:
    """Returns what networks of the loop are given that no step changes; what is mixed with the latent has no origin."""
    inside = [name for name, wiring in wirings.items() if wiring.phase == LOOP]
    found = []
    for name in inside:
        wiring = wirings[name]
        for argument, origin in zip(wiring.arguments, wiring.before.origins, strict=True):
            of_step = origin in (LATENT, TIMESTEP, GUIDANCE) or (origin or "").startswith((TIME, DRAW))
            if not of_step and (origin or "").partition(".")[0] not in inside:
                found.append(_Condition(name, argument, origin))
    return tuple(found)


def _step_of(single: Run, component: str) -> int:
    return single.of(component)[0].steps_done


def _alone(single: Run, c: _Condition) -> torch.Tensor:
    return single.of(c.component)[0].inputs[c.argument]


def _same(given: Sequence[torch.Tensor], runs: Sequence[Run], c: _Condition) -> bool:
    return all(close(tensor, _alone(single, c)) for tensor, single in zip(given, runs, strict=True))

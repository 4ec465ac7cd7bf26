"""Reads contract and components off one recorded run, without two-pass guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fewstep.bundle.contract import (
    AFTER,
    BEFORE,
    CONDITIONS,
    DECODER,
    DENOISER,
    DRAW,
    GUIDANCE,
    INITIAL,
    LATENT,
    LOOP,
    NOISE,
    SAMPLE,
    TIME,
    TIMESTEP,
    Contract,
    draw_offset,
    is_denoiser,
)
from fewstep.export.contract.guidance_embedding import Scale
from fewstep.export.contract.output_head import read_post
from fewstep.export.contract.output_transform import read_output
from fewstep.export.contract.unsupported import (
    refuse_changing_arguments,
    refuse_further_noise,
    refuse_other_networks,
    refuse_other_shapes,
)
from fewstep.export.generator import Generator
from fewstep.export.record.intercept import SCALED
from fewstep.export.record.run_record import Call, Run, name_inputs
from fewstep.export.record.tape import MADE, Glue, GlueModule, Ref
from fewstep.export.schedule.extract import Anatomy, is_scaled, refuse
from fewstep.export.trace.component_module import Wiring, glue_component, renamed, shorten, wire, with_outputs

# The reference and our own arithmetic for the same value differ by float32 rounding of a product or two.
_RTOL, _ATOL = 1e-5, 1e-6


class Reader:
    """Reads one recorded run, without two-pass guidance."""

    def __init__(self, generator: Generator, recorded: Run, scale: Scale, plain: float, others: Sequence[Run]) -> None:
        self._generator, self._run, self._scale = generator, recorded, scale
        self._others = others
        calls = recorded.denoiser_calls
        if len(calls) != len(recorded.states):
            raise refuse(f"the pipeline called the denoiser {len(calls)} times in {len(recorded.states)} steps")
        self._last = len(calls) - 1
        refuse_other_networks(recorded, self._loop_names(), others)
        self._denoisers = [name for name in self._loop_names() if is_denoiser(name)]
        self._loop_post = read_post(recorded) if generator.is_loop else None
        self._since = next(c.position for c in recorded.calls if c.component in self._loop_names())
        self._initial: tuple[int | None, Any] = (0, None)
        self._initial = self._read_initial()
        self.anatomy = Anatomy(
            latent=self._latent_argument(),
            times=tuple(self._time_arguments(DENOISER)),
            post=self._post_module(),
            initial=self._initial[1],
            initial_offset=self._initial[0],
            guidance=plain,
            clips=recorded.clips,
            post_after=None if self._loop_post is None else self._loop_post.after,
        )
        self._check_alike()
        refuse_changing_arguments((recorded, *others), self._loop_names(), tuple(generator.options))
        if generator.is_loop:
            refuse_other_shapes(recorded, self._loop_post)
        refuse_further_noise(recorded, self._loop_names(), self._originals, self.anatomy.latent)

    # --- the loop

    def _loop_names(self) -> list[str]:
        """Components that are called once in every step, or of which one is, in order."""
        done = list(range(len(self._run.states)))
        names = dict.fromkeys(call.component for call in self._run.calls)
        inside = [n for n in names if is_denoiser(n) or self._steps(n) == done]
        return [n for n in inside if is_denoiser(n) or len(done) > 1]

    def _steps(self, component: str) -> list[int]:
        """The steps that call a component."""
        return [call.steps_done for call in self._run.of(component)]

    def _at(self, component: str, k: int) -> Call:
        return next(call for call in self._run.of(component) if call.steps_done == k)

    def _check_alike(self) -> None:
        """Raises if the networks that take turns are not told of a step by the same arguments."""
        names = self._denoisers
        if len(names) == 1:
            return
        first, *others = [(self._scaled_argument(self._run.of(name)), *self._time_arguments(name)) for name in names]
        for name, told in zip(names[1:], others, strict=True):
            if told != first:
                raise refuse(
                    f"{name} is told of a step by {_listed(told)}, expected {_listed(first)} as {names[0]} is: "
                    "networks that take turns name their latent and times alike"
                )

    def _latent_argument(self) -> str | None:
        """The denoiser's argument that is the latent times a number at every step; None if there is none such."""
        return self._scaled_argument(self._run.denoiser_calls)

    def _scaled_argument(self, calls: Sequence[Call]) -> str | None:
        states = self._run.states
        for name in calls[0].inputs:
            if all(name in c.inputs and is_scaled(c.inputs[name], states[c.steps_done]) for c in calls):
                return name
        return None

    def _time_arguments(self, component: str) -> list[str]:
        """Arguments that are one number at each step and depend on nothing that the user gives."""
        last = self._steps(component)[-1]
        call, originals = self._at(component, last), self._originals(component, last)
        found = []
        for name, tensor in call.inputs.items():
            if self._run.tape.varies(originals[name]) or not self._moves(component, name):
                continue
            if bool((tensor == tensor.reshape(-1)[0]).all()):
                found.append(name)
        return sorted(found, key=lambda name: "timestep" not in name)

    def _moves(self, component: str, name: str) -> bool:
        """Whether an argument differs from step to step, or from step count to step count."""
        runs = (self._run, *self._others)
        calls = [c for r in runs for c in (r.denoiser_calls if is_denoiser(component) else r.of(component))]
        values = [c.inputs[name] for c in calls if name in c.inputs]
        return any(not torch.equal(v, values[0]) for v in values[1:])

    def _originals(self, component: str, k: int) -> dict[str, torch.Tensor]:
        call = self._at(component, k)
        return name_inputs(self._generator.parts[component].folder, call.arguments)

    def _post(self) -> Any:
        """The operations between the denoiser's first output and the scheduler, None where they are mere scaling."""
        run = self._run
        if not run.model_outputs:
            return None if self._loop_post is None else self._loop_post.glue
        k = self._last
        F = next(iter(run.denoiser_calls[k].outputs.values()))
        if F.shape == run.model_outputs[k].shape:
            return None
        glue = run.tape.cut([run.model_outputs[k]], what="model output", since=run.denoiser_calls[k].position)
        if len(glue.leaves) != 1 or not glue.leaves[0].startswith(f"{DENOISER}."):
            raise refuse(f"the model output is made of {', '.join(glue.leaves)}, expected the denoiser's output alone")
        return glue

    def _post_module(self) -> Any:
        glue = self._post()
        return None if glue is None else lambda F: GlueModule(glue)(F)[0]

    def _read_initial(self) -> tuple[int | None, Any]:
        """The draw that the first latent is made of, and how."""
        run = self._run
        x = run.states[0]
        if run.noised is not None:
            glue = run.tape.cut([run.noised[1]], what="the initial noise", through=LATENT)
        else:
            glue = run.tape.cut([x], what="the first latent", through=LATENT)
        if not glue.leaves or glue.leaves == (LATENT,):
            return None, lambda noise: noise
        anchor = self._plain_anchor()
        if anchor is not None and set(glue.leaves) <= {anchor, f"{NOISE}0"}:
            return 0, lambda noise: noise
        if len(glue.leaves) > 1 or not glue.leaves[0].startswith(NOISE):
            return None, lambda noise: noise
        offset = int(glue.leaves[0].removeprefix(NOISE))
        draw = run.draws[offset]
        if draw.shape == x.shape and is_scaled(GlueModule(glue)(draw)[0], draw):
            return offset, lambda noise: noise
        return offset, lambda noise: GlueModule(glue)(noise)[0]

    # --- components

    def read(self) -> tuple[Contract, dict[str, Wiring]]:
        """Returns the contract and the wiring of every component, in the order in which they run."""
        inside = self._loop_names()
        first_of_loop = next(i for i, c in enumerate(self._run.calls) if c.component in inside)
        before = [c for c in self._run.calls[:first_of_loop]]
        after = [c for c in self._run.calls if c.component not in inside and c not in before]
        wirings = {c.instance: self._wire(c, BEFORE) for c in before}
        loop = {name: self._wire_loop(name) for name in inside}
        conditions, origins, anchor = self._conditions(loop)
        ends, contract = self._ends(after)
        initial = self._initial_component()
        every = [
            *wirings.values(),
            *([initial] if initial else []),
            *([conditions] if conditions else []),
            *(renamed(wiring, origins) for wiring in loop.values()),
            *ends,
        ]
        wanted = {origin for wiring in every for origin in wiring.origins}
        wanted |= {anchor} if anchor else set()
        wanted |= {f"{name}.{n}" for name in self._denoisers for n in loop[name].outputs[:1]}
        if ends:
            wanted.add(f"{ends[-1].component}.{ends[-1].outputs[0]}")
        if initial:
            wanted.add(f"{INITIAL}.{initial.outputs[0]}")
        used = {}
        for wiring in every:
            names = [o.removeprefix(f"{wiring.component}.") for o in wanted if o.startswith(f"{wiring.component}.")]
            if names:
                used[wiring.component] = with_outputs(wiring, names)
        contract = replace(
            contract,
            initial=f"{INITIAL}.{initial.outputs[0]}" if initial else f"{NOISE}{self._initial[0]}",
            anchor=anchor,
        )
        return contract, used

    def _wire(self, call: Any, phase: str, direct: Mapping[str, str] | None = None, since: int = 0) -> Wiring:
        folder = self._generator.parts[call.component].folder
        return wire(self._run.tape, call, folder, phase, direct=direct, since=since)

    def _wire_loop(self, component: str) -> Wiring:
        k = self._steps(component)[-1]
        call = self._at(component, k)
        times = self._time_arguments(component)
        direct = {name: TIMESTEP if i == 0 else f"{TIME}{name}" for i, name in enumerate(times)}
        for name, tensor in call.inputs.items():
            if name in self._scale.arguments.get(component, ()):
                direct[name] = GUIDANCE
            elif name not in times and not self._varies(component, name) and self._moves(component, name):
                raise refuse(f"{component}: input {name} {list(tensor.shape)} differs from step to step")
        latent = self.anatomy.latent if is_denoiser(component) else self._same_as_latent(component)
        if latent is not None:
            direct[latent] = LATENT
        wiring = self._wire(call, LOOP, direct, self._since)
        draws = {f"{NOISE}{draw_offset(k, int(n.removeprefix(DRAW)))}": n for n in self._run.step_draws()} if k else {}
        wiring = renamed(wiring, {SCALED: LATENT, **draws})
        self._check_every_step(component, wiring)
        post = self._post() if is_denoiser(component) else None
        if post is not None and len(self._denoisers) > 1:
            raise refuse(f"what is done to the output of {component} differs between {', '.join(self._denoisers)}")
        if post is not None:
            result = post.leaves[0].removeprefix(f"{DENOISER}.")
            wiring = replace(wiring, after=post, results=(result,), outputs=(result,))
        elif is_denoiser(component):
            wiring = with_outputs(wiring, wiring.outputs[:1])
        return wiring

    def _varies(self, component: str, name: str) -> bool:
        return self._run.tape.varies(self._originals(component, self._steps(component)[-1])[name])

    def _same_as_latent(self, component: str) -> str | None:
        if self.anatomy.latent is None:
            return None
        latents = [c.inputs[self.anatomy.latent] for c in self._run.denoiser_calls]
        for name in self._run.of(component)[0].inputs:
            values = [c.inputs[name] for c in self._run.of(component)]
            if all(torch.equal(v, x) for v, x in zip(values, latents, strict=True)):
                return name
        return None

    def _check_every_step(self, component: str, wiring: Wiring) -> None:
        """Raises if what the last step shows is not what the others do."""
        *steps, last = self._steps(component)
        for k in steps:
            originals = self._originals(component, k)
            for name, direct in zip(wiring.arguments, wiring.before.origins, strict=True):
                if direct is not None and direct.startswith(DRAW):
                    if originals[name] is not self._run.step_draws()[direct][k]:
                        raise refuse(f"{component}: input {name} is not the same draw of step {k} and step {last}")
                if direct is None or self._of_step(direct):
                    continue
                if not torch.equal(self._run.tape.tensor(direct), originals[name]):
                    raise refuse(f"{component}: input {name} is not the same in step {k} and step {last}")

    def _of_step(self, origin: str) -> bool:
        """Whether an origin's value is another in every step: the latent, the step's numbers, a network's output."""
        inside = origin.partition(".")[0] in self._loop_names() and not origin.startswith(MADE)
        return origin in (LATENT, SCALED, TIMESTEP, GUIDANCE) or origin.startswith((TIME, DRAW)) or inside

    def _conditions(self, loop: Mapping[str, Wiring]) -> tuple[Wiring | None, dict[str, str], str | None]:
        """Returns the component that makes what the loop takes from before it, and new names for these origins."""
        tape = self._run.tape
        made: dict[str, str] = {}
        for wiring in loop.values():
            for origin in wiring.origins:
                if origin.startswith(MADE):
                    made.setdefault(origin, wiring.input_name(origin))
        targets = [tape.tensor(origin) for origin in made]
        if self._run.noised is not None:
            targets.append(self._run.noised[0])
        if not targets:
            return None, {}, self._plain_anchor()
        glue = shorten(tape.cut(targets, what=CONDITIONS), tape)
        names = _unique([n if not n.startswith(MADE) else "condition" for n in made.values()])
        origins = [leaf or f"{CONDITIONS}.{name}" for leaf, name in zip(glue.origins, [*names, "anchor"], strict=False)]
        renames = dict(zip(made, origins, strict=False))
        anchor = origins[-1] if self._run.noised is not None else self._plain_anchor()
        kept = [i for i, leaf in enumerate(glue.origins) if leaf is None]
        if not kept:
            return None, renames, anchor
        glue = replace(glue, targets=tuple(glue.targets[i] for i in kept))
        outputs = [origins[i].removeprefix(f"{CONDITIONS}.") for i in kept]
        return glue_component(CONDITIONS, glue, outputs, BEFORE), renames, anchor

    def _plain_anchor(self) -> str | None:
        """In a loop in plain PyTorch: an output of the latent's shape that was there before the loop."""
        if not self._generator.is_loop or self._initial[0] is None:
            return None
        shape = self._run.states[0].shape
        for call in self._run.calls:
            if is_denoiser(call.component):
                return None
            for name, tensor in call.outputs.items():
                if tensor.shape == shape:
                    return f"{call.instance}.{name}"
        return None

    def _initial_component(self) -> Wiring | None:
        run = self._run
        target = run.noised[1] if run.noised is not None else run.states[0]
        if self._initial[0] is None:
            glue = run.tape.cut([target], what="the first latent", through=LATENT)
            if glue.leaves == (LATENT,):
                glue = Glue((), (), (target,), (Ref(("constant", 0)),))
            return glue_component(INITIAL, glue, ["latent"], BEFORE)
        draw = run.draws.get(self._initial[0])
        if draw is None or torch.equal(self._initial[1](draw), draw):
            return None
        glue = run.tape.cut([target], what="the first latent", through=LATENT)
        return glue_component(INITIAL, glue, ["latent"], BEFORE)

    def _ends(self, after: Sequence[Any]) -> tuple[list[Wiring], Contract]:
        """Returns what runs after the loop, and the contract."""
        generator, run = self._generator, self._run
        final = run.latents[-1]
        config: Any = getattr(generator.module(DECODER), "config", None) if DECODER in generator.parts else None
        scale = float(getattr(config, "scaling_factor", None) or 1.0)
        shift = float(getattr(config, "shift_factor", None) or 0.0)
        scaled = final / scale + shift
        wirings, plain = [], True
        for call in after:
            direct = {
                name: SAMPLE
                for name, tensor in call.inputs.items()
                if tensor.shape == final.shape and torch.allclose(tensor, scaled, rtol=_RTOL, atol=_ATOL)
            }
            wiring = self._wire(call, AFTER, direct)
            if LATENT in wiring.origins:
                plain = False
            wirings.append(renamed(wiring, {LATENT: SAMPLE}))
        if not plain or not after:
            scale, shift = 1.0, 0.0
            wirings = [renamed(self._wire(call, AFTER), {LATENT: SAMPLE}) for call in after]
        output, finish = read_output(generator, run, after)
        prediction = getattr(getattr(generator.pipeline, "scheduler", None), "config", {})
        contract = Contract(
            latent_shape=tuple(final.shape[1:]),
            latent_scale=scale,
            latent_shift=shift,
            prediction_type=str(getattr(prediction, "prediction_type", "unknown")),
            guidance=self._scale.guidance,
            inputs=generator.inputs,
            output=output,
        )
        return ([*wirings, finish] if finish else wirings), contract


def _listed(arguments: Sequence[str | None]) -> str:
    return ", ".join(name or "no latent" for name in arguments)


def _unique(names: Sequence[str]) -> list[str]:
    """Returns the names with a number at each that was there before."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return found

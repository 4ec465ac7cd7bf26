"""Components as programs: what a network's own pipeline gave it, with everything that does not vary folded in.

No family is named here. What a network takes is what its pipeline passed to it; where each input comes from is what the
tape of that run says. An argument that depends on nothing that varies becomes a constant of the program, and operations
between two networks become part of the network that they feed, or, where they depend on the user's inputs alone and
feed the loop, a component of their own (``conditions``).
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fewstep.bundle.contract import ComponentSpec, TensorSpec
from fewstep.bundle.program import Program
from fewstep.errors import ExportError
from fewstep.export.generator import Generator
from fewstep.export.record.run_record import Call, name_inputs, name_outputs
from fewstep.export.record.tape import Glue, GlueModule, Ref, Tape
from fewstep.export.trace.fake_tensors import fake_trace
from fewstep.export.trace.real_valued import in_real_numbers
from fewstep.hashing import value_sha256

# Operations that only give the same numbers another shape or place.
_RESHAPES = frozenset(
    f"aten.{name}.default"
    for name in ("view", "_unsafe_view", "reshape", "expand", "repeat", "unsqueeze", "clone", "_to_copy")
) | {"aten.squeeze.dim", "aten.slice.Tensor", "aten.squeeze.default"}


@dataclass(frozen=True)
class Wiring:
    """How a component becomes a program.

    ``before`` makes the call's varying tensors (``arguments``, by flat name) from the program's inputs; ``after`` makes
    the program's outputs from the call's ``results``. ``call`` is None for a component that is glue alone.
    """

    component: str
    part: str
    folder: str
    call: Call | None
    arguments: tuple[str, ...]
    before: Glue
    results: tuple[str, ...]
    after: Glue | None
    outputs: tuple[str, ...]
    phase: str

    @property
    def origins(self) -> tuple[str, ...]:
        """Where the program's inputs come from, in order."""
        return self.before.leaves

    def input_name(self, origin: str) -> str:
        """Returns the name of a program's input: the argument that it is, if it is one unchanged."""
        for argument, direct in zip(self.arguments, self.before.origins, strict=True):
            if direct == origin:
                return argument
        name = origin.replace(":", "_")
        return f"{name}_in" if name in self.outputs else name


class WiredModule(torch.nn.Module):
    """A wired component: the program's inputs in, its outputs out."""

    def __init__(self, wiring: Wiring, module: torch.nn.Module | None, method: str) -> None:
        super().__init__()
        self.before = GlueModule(wiring.before)
        self.after = GlueModule(wiring.after) if wiring.after is not None else None
        self.module = module
        self._method = method
        self._wiring = wiring
        self._template: Mapping[str, Any] = {}
        if wiring.call is not None:
            self._template = self._with_constants(wiring)

    def _with_constants(self, wiring: Wiring) -> Mapping[str, Any]:
        """Returns the call's arguments with a `Ref` for each tensor; what does not vary becomes a buffer."""
        assert wiring.call is not None
        references = []
        for name, tensor in name_inputs(wiring.folder, wiring.call.arguments).items():
            if name in wiring.arguments:
                references.append(Ref(("argument", wiring.arguments.index(name))))
            else:
                self.register_buffer(f"argument_{len(references)}", tensor.detach().clone(), persistent=False)
                references.append(Ref(("buffer", len(references))))
        return {name: _replace(value, references) for name, value in wiring.call.arguments.items()}

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the program's outputs."""
        tensors = self.before(*inputs)
        if self.module is None:
            return tuple(tensors)

        def resolve(ref: Ref) -> torch.Tensor:
            kind, which = ref.key
            tensor: torch.Tensor = tensors[which] if kind == "argument" else getattr(self, f"argument_{which}")
            return tensor

        arguments = {name: _resolve(value, resolve) for name, value in self._template.items()}
        named = name_outputs(self._wiring.folder, getattr(self.module, self._method)(**arguments))
        results = tuple(named[name] for name in self._wiring.results)
        return results if self.after is None else tuple(self.after(*results))


def _replace(value: Any, queue: list[Ref]) -> Any:
    if isinstance(value, torch.Tensor):
        return queue.pop(0)
    if isinstance(value, Mapping):
        return {key: _replace(item, queue) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replace(item, queue) for item in value)
    return value


def _resolve(value: Any, resolve: Any) -> Any:
    if isinstance(value, Ref):
        return resolve(value)
    if isinstance(value, Mapping):
        return {key: _resolve(item, resolve) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resolve(item, resolve) for item in value)
    return value


def wire(
    tape: Tape,
    call: Call,
    folder: str,
    phase: str,
    *,
    direct: Mapping[str, str] | None = None,
    since: int = 0,
) -> Wiring:
    """Returns the wiring of a recorded call, all of its outputs included.

    Args:
        tape: the record of its run.
        call: the call.
        folder: of its artifact.
        phase: when it runs.
        direct: origins that are known already, by flat argument name.
        since: what was made before this position of the tape is the business of another component.
    """
    flat = name_inputs(folder, call.arguments)
    known = dict(direct or {})
    varying = [name for name, tensor in flat.items() if name not in known and tape.varies(tensor)]
    glue = shorten(tape.cut([flat[name] for name in varying], what=call.component, since=since), tape)
    references = {name: Ref(("leaf", origin)) for name, origin in known.items()}
    references |= dict(zip(varying, glue.targets, strict=True))
    arguments = tuple(name for name in flat if name in references)
    targets = tuple(references[name] for name in arguments)
    leaves = [ref.key[1] for ref in targets if ref.key[0] == "leaf"]
    leaves = list(dict.fromkeys([*leaves, *glue.leaves]))
    results = tuple(call.outputs)
    return Wiring(
        component=call.instance,
        part=call.component,
        folder=folder + call.instance.removeprefix(call.component),
        call=call,
        arguments=arguments,
        before=replace(glue, leaves=tuple(leaves), targets=targets),
        results=results,
        after=None,
        outputs=results,
        phase=phase,
    )


def shorten(glue: Glue, tape: Tape) -> Glue:
    """Returns the glue with each target that is a leaf in another guise replaced by the leaf.

    Pipelines repeat conditions once per picture and reshape them back; for one picture that changes nothing.
    """
    if not glue.steps:
        return glue
    chains = {i: (op, refs) for i, (op, args, _) in enumerate(glue.steps) for refs in [_refs(args)]}

    def source(ref: Ref) -> Ref | None:
        while ref.key[0] == "value":
            op, refs = chains[ref.key[1]]
            if str(op) not in _RESHAPES or len(refs) != 1:
                return None
            ref = refs[0]
        return ref

    values = GlueModule(glue)(*(tape.tensor(name) for name in glue.leaves))
    targets = []
    for target, value in zip(glue.targets, values, strict=True):
        leaf = source(target)
        same = leaf is not None and leaf.key[0] == "leaf" and _identical(tape.tensor(leaf.key[1]), value)
        targets.append(leaf if same and leaf is not None else target)
    if all(target.key[0] == "leaf" for target in targets):
        return Glue(glue.leaves, (), (), tuple(targets))
    return replace(glue, targets=tuple(targets))


def _refs(value: Any) -> list[Ref]:
    return [r for r in torch.utils._pytree.tree_flatten(value)[0] if isinstance(r, Ref)]


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def glue_component(component: str, glue: Glue, outputs: Sequence[str], phase: str) -> Wiring:
    """Returns a component that is glue alone."""
    return Wiring(component, component, component, None, tuple(outputs), glue, (), None, tuple(outputs), phase)


def renamed(wiring: Wiring, origins: Mapping[str, str]) -> Wiring:
    """Returns the wiring with other origins for some of its inputs."""

    def rename(ref: Ref) -> Ref:
        return Ref(("leaf", origins.get(ref.key[1], ref.key[1]))) if ref.key[0] == "leaf" else ref

    before = wiring.before
    steps = tuple(
        (op, *torch.utils._pytree.tree_map_only(Ref, rename, (args, kwargs))) for op, args, kwargs in before.steps
    )
    leaves = tuple(dict.fromkeys(origins.get(name, name) for name in before.leaves))
    return replace(
        wiring, before=Glue(leaves, steps, before.constants, tuple(rename(target) for target in before.targets))
    )


def with_outputs(wiring: Wiring, wanted: Sequence[str]) -> Wiring:
    """Returns the wiring with only some of its outputs, in the network's order."""
    if wiring.after is not None:
        return wiring
    if wiring.call is None:
        kept = [i for i, name in enumerate(wiring.outputs) if name in wanted]
        names = tuple(wiring.outputs[i] for i in kept)
        targets = tuple(wiring.before.targets[i] for i in kept)
        return replace(wiring, outputs=names, arguments=names, before=replace(wiring.before, targets=targets))
    names = tuple(name for name in wiring.results if name in wanted)
    return replace(wiring, results=names, outputs=names)


def digest(wiring: Wiring) -> str:
    """Returns a hash of all that goes into a program beside the network's weights: operations, constants, arguments."""
    glues = [glue for glue in (wiring.before, wiring.after) if glue is not None]
    constants = [_tensor_sha256(tensor) for glue in glues for tensor in glue.constants]
    operations = [str((glue.leaves, glue.steps, glue.targets)) for glue in glues]
    arguments: list[str] = []
    if wiring.call is not None:
        named = name_inputs(wiring.folder, wiring.call.arguments)
        constants += [_tensor_sha256(tensor) for name, tensor in named.items() if name not in wiring.arguments]
        arguments = [f"{name}={_plain(value)}" for name, value in wiring.call.arguments.items()]
    return value_sha256([operations, constants, arguments, list(wiring.arguments), list(wiring.results)])


def _tensor_sha256(tensor: torch.Tensor) -> str:
    values = tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor.flatten()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest() + str((tensor.dtype, tuple(tensor.shape)))


def _plain(value: Any) -> str:
    """Returns an argument as text, the same in every process: a tensor is its shape."""
    if isinstance(value, torch.Tensor):
        return str((value.dtype, tuple(value.shape)))
    if isinstance(value, Mapping):
        return str({key: _plain(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return str([_plain(item) for item in value])
    return str(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__


def wired_module(generator: Generator, wiring: Wiring) -> WiredModule:
    """Returns the module of a wired component, in evaluation mode."""
    if wiring.call is None:
        return WiredModule(wiring, None, "").eval()
    part = generator.parts[wiring.part]
    return WiredModule(wiring, generator.module(wiring.part), part.method).eval()


def running_module(generator: Generator, wiring: Wiring) -> WiredModule:
    """Returns the module of a wired component with its values, wherever these are."""
    if wiring.call is None or generator.stored is None:
        return wired_module(generator, wiring)
    part = generator.parts[wiring.part]
    module = generator.stored.module(part.attribute, generator.module(wiring.part))
    return WiredModule(wiring, module, part.method).eval()


def spec_of(wiring: Wiring, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> ComponentSpec:
    """Returns what a wired component takes and gives, for example tensors."""
    names = [wiring.input_name(origin) for origin in wiring.origins]
    return ComponentSpec(
        tuple(_tensor_spec(name, t) for name, t in zip(names, inputs, strict=True)),
        tuple(_tensor_spec(name, t) for name, t in zip(wiring.outputs, outputs, strict=True)),
        dict(zip(names, wiring.origins, strict=True)),
        wiring.phase,
    )


def trace(generator: Generator, wiring: Wiring, spec: ComponentSpec) -> Program:
    """Returns a component traced with static shapes and batch 1.

    Raises:
        ExportError: ``torch.export`` cannot trace it.
    """
    example = tuple(_example(tensor) for tensor in spec.inputs)
    module = wired_module(generator, wiring)
    if generator.stored is not None and module.module is not None:
        weights = generator.stored.weights(generator.parts[wiring.part].attribute, module.module)
        exported = in_real_numbers(module, lambda: fake_trace(module, example))
        normalise(exported)
        return Program(wiring.component, wiring.folder, exported, spec, weights.under("module"))
    try:
        with torch.no_grad(), warnings.catch_warnings(), _quiet_logs():
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            exported = in_real_numbers(module, lambda: torch.export.export(module, example))
    except ExportError:
        raise
    except Exception as error:  # torch.export raises many classes, most of them private; all mean the same here
        first_line = str(error).strip().split("\n", 1)[0]
        raise ExportError(
            f"{wiring.component} ({type(module.module).__name__}) cannot be traced: "
            f"{type(error).__name__}: {first_line}",
            hint="does torch.export.export trace this module on its own? data-dependent branches are the usual cause",
        ) from error
    normalise(exported)
    return Program(wiring.component, wiring.folder, exported, spec)


def normalise(exported: torch.export.ExportedProgram) -> None:
    """Removes from a traced program what backends take another way than PyTorch does, in place.

    Attention's traced kernel leaves its result in another order of memory than its decomposition, and views that were
    right for the one are impossible for the other. Squeezing a dimension that is not 1 does nothing in PyTorch, and is
    an error elsewhere.
    """
    aten = torch.ops.aten
    for node in list(exported.graph.nodes):
        if node.target is aten.squeeze.dim and node.args[0].meta["val"].shape[node.args[1]] != 1:
            node.replace_all_uses_with(node.args[0])
            exported.graph.erase_node(node)
            continue
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        elif node.target is aten.scaled_dot_product_attention.default:
            with exported.graph.inserting_after(node):
                dense = exported.graph.call_function(
                    aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
            dense.meta = {**node.meta, "val": node.meta["val"].contiguous()}
            node.replace_all_uses_with(dense, delete_user_cb=lambda user, dense=dense: user is not dense)
    exported.graph_module.recompile()


def _example(spec: TensorSpec) -> torch.Tensor:
    """Values do not matter to a trace, except that indices must be valid."""
    dtype = getattr(torch, spec.dtype)
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(spec.shape, generator=generator, dtype=torch.float32).to(dtype)
    return torch.ones(spec.shape, dtype=dtype)


def _tensor_spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape) if tensor.ndim else (1,))


class _quiet_logs:
    """Holds back the INFO and WARNING lines that torch.export writes about its own fallbacks."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("torch")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)

"""Records the tensor operations that a pipeline does between its networks, and cuts programs out of the record.

Pipelines are Python; what they do to tensors between two network calls is a handful of operations (concatenating two
text encoders' states, packing a latent into patches, scaling it for the decoder). Listening at PyTorch's dispatcher
gives these operations whatever the pipeline is, so that they can be compiled like the networks instead of being
written again for every family.

Only what depends on a *leaf* is recorded: an input of the user, a network's output, a draw of noise, the latent. All
else is the same at every run with these settings: a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from fewstep.errors import ExportError

MADE = "made."
# Another object of the same numbers: not worth a step.
_ALIASES = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default})

_READ, _CAT = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.cat.default
_SLICE = torch.ops.aten.slice.Tensor
_ZEROS = frozenset({torch.ops.aten.new_zeros.default, torch.ops.aten.zeros_like.default})
_CLAMPS = frozenset({torch.ops.aten.clamp.default, torch.ops.aten.clip.default})


@dataclass(frozen=True, eq=False)
class _Node:
    """One recorded operation, its tensor arguments as they were."""

    position: int
    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[Any, ...]


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in a `Glue`: ("leaf", name), ("value", step, which result) or ("constant", index)."""

    key: tuple[Any, ...]


@dataclass(frozen=True)
class Glue:
    """Operations cut out of a tape, in order, from named leaves to some targets; tensors are `Ref`."""

    leaves: tuple[str, ...]
    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...]
    constants: tuple[torch.Tensor, ...]
    targets: tuple[Ref, ...]

    @property
    def origins(self) -> tuple[str | None, ...]:
        """The leaf that each target is, None where operations lie between."""
        return tuple(t.key[1] if t.key[0] == "leaf" else None for t in self.targets)


class GlueModule(torch.nn.Module):
    """Runs a `Glue`: leaves in, targets out."""

    def __init__(self, glue: Glue) -> None:
        super().__init__()
        self.glue = glue
        for i, constant in enumerate(glue.constants):
            self.register_buffer(f"constant_{i}", constant.detach().clone(), persistent=False)

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the targets for the leaves, in the order of ``glue.leaves``."""
        named = dict(zip(self.glue.leaves, leaves, strict=True))
        values: list[Sequence[torch.Tensor]] = []

        def resolve(ref: Ref) -> torch.Tensor:
            kind, which = ref.key[:2]
            if kind == "leaf":
                return named[str(which)]
            if kind == "constant":
                constant: torch.Tensor = getattr(self, f"constant_{which}")
                return constant
            return values[int(which)][int(ref.key[2])]

        for op, args, kwargs in self.glue.steps:
            result = op(*tree_map_only(Ref, resolve, args), **tree_map_only(Ref, resolve, kwargs))
            values.append(result if isinstance(result, (list, tuple)) else [result])
        return tuple(resolve(target) for target in self.glue.targets)


@dataclass(frozen=True, eq=False)
class _Held:
    """A tensor argument as it was: in-place operations make a new version of the same object."""

    tensor: torch.Tensor
    key: tuple[int, int]


@dataclass(frozen=True)
class Made:
    """An operation on one tensor and what is made of it alone: so many of its arguments vary."""

    position: int
    op: Callable[..., Any]
    sources: int
    result: torch.Tensor


class Tape(TorchDispatchMode):
    """A context that records what its block does to leaves and to what was made of them, except where it is paused."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.position = 0
        self.clamps: list[int] = []
        self._names: dict[tuple[int, int], str] = {}
        self._leaves: dict[str, torch.Tensor] = {}
        self._made_by: dict[tuple[int, int], _Node] = {}
        self._versions: dict[int, int] = {}
        self._overwritten: set[int] = set()
        self._kept: list[Any] = []  # the id of a tensor is its own while the tensor lives
        self._paused = 0
        self._nodes: list[_Node] = []
        self._reads: list[tuple[int, torch.Tensor]] = []
        self.replacements: dict[int, torch.Tensor] = {}
        """What stands for the result of the operation at a position."""

    def leaf(self, name: str, tensor: torch.Tensor) -> None:
        """Names a tensor at which cutting stops; a tensor keeps the first name it is given."""
        self._kept.append(tensor)
        self._leaves.setdefault(name, tensor)
        self._names.setdefault(self._key(tensor), name)

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the first tensor that was given a name."""
        return self._leaves[name]

    def rename(self, name: str, tensor: torch.Tensor) -> None:
        """Names a tensor even if it had another name."""
        self._names.pop(self._key(tensor), None)
        self.leaf(name, tensor)

    def parents(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns what varies among the arguments of the operation that made a tensor; of a leaf, nothing."""
        made = self._made_by.get(self._key(tensor))
        return [] if made is None else [h.tensor for h in _held(made) if self.varies(h.tensor)]

    def is_clamp(self, tensor: torch.Tensor) -> bool:
        """Returns whether a tensor was made by clamping another."""
        made = self._made_by.get(self._key(tensor))
        return made is not None and made.op in _CLAMPS

    def made_of(self, tensor: torch.Tensor, since: int, until: int) -> list[Made]:
        """Returns the operations between two positions that depend on a tensor, and on nothing else that varies."""
        alone, found = {self._key(tensor)}, []
        for node in self._nodes[since:until]:
            sources = [held.key for held in _held(node) if self.varies(held.tensor)]
            if sources and alone.issuperset(sources):
                alone.update(result.key for result in node.results)
                found.append(Made(node.position, node.op, len(sources), node.results[0].tensor))
        return found

    def varies(self, tensor: torch.Tensor) -> bool:
        """Returns whether a tensor is a leaf or depends on one."""
        key = self._key(tensor)
        return key in self._names or key in self._made_by or id(tensor) in self._overwritten

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Returns a context in which nothing is recorded: the inside of a network."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation, and records it if what goes in matters."""
        kwargs = kwargs or {}
        if func is _READ and not self._paused and self.varies(args[0]):
            value = func(*args)
            self._reads += [(value, args[0])] if isinstance(value, int) else []
            return value
        if func is _CAT and not self._paused and (whole := self._zeroed(*args)) is not None:
            return whole
        if self._paused or not any(map(self.varies, _tensors((args, kwargs)))):
            return func(*args, **kwargs)
        op = func
        if func._schema.is_mutable:
            op = _functional(func)
            if op is None or args[0]._base is not None:
                self._overwritten.update(id(t) for t in (args[0], args[0]._base) if t is not None)
                self._kept.append(args[0])
                return func(*args, **kwargs)
            if not self.varies(args[0]):
                held = self._hold((args[0].clone(), *args[1:])), self._hold(kwargs)
            else:
                held = self._hold(args), self._hold(kwargs)
            self._versions[id(args[0])] = self._versions.get(id(args[0]), 0) + 1
        else:
            held = self._hold(args), self._hold(kwargs)
        result = self.replacements.get(self.position, func(*args, **kwargs))
        results = tuple(result) if isinstance(result, (list, tuple)) else (result,)
        node = _Node(self.position, op, *held, self._hold(results))
        if op in _CLAMPS:
            self.clamps.append(self.position)
        self.position += 1
        self._nodes.append(node)
        for tensor in results:
            self._made_by.setdefault(self._key(tensor), node)
        return result

    def _zeroed(self, parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor | None:
        """Returns what ``cat((x[:n], zeros))`` gives, as operations on ``n`` too; None where it is something else.

        Pipelines cut a text's states after the last token that is no padding, and fill up with zeros. They read the
        number of tokens off a tensor, as a number of Python: one that would stay that of the first text.
        """
        if len(parts) != 2 or not self.varies(parts[0]) or not self._is_zeros(parts[1]):
            return None
        kept, dim = parts[0].shape[dim], dim % parts[0].ndim
        read = next((tensor for value, tensor in reversed(self._reads) if value == kept), None)
        x = self._before_cutting(parts[0], dim)
        if read is None or x.shape[dim] != kept + parts[1].shape[dim]:
            return None
        places = torch.arange(x.shape[dim]).reshape(-1, *[1] * (x.ndim - dim - 1))
        inside = self.__torch_dispatch__(torch.ops.aten.gt.Tensor, (), (read, places))
        zeros = torch.zeros((), dtype=x.dtype)
        whole: torch.Tensor = self.__torch_dispatch__(torch.ops.aten.where.self, (), (inside, x, zeros))
        return whole

    def _is_zeros(self, tensor: torch.Tensor) -> bool:
        made = self._made_by.get(self._key(tensor))
        return made.op in _ZEROS if made is not None else not (self.varies(tensor) or bool(tensor.any()))

    def _before_cutting(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns what a tensor is the first part of; itself where that is all of it, for which nothing is recorded."""
        made = self._made_by.get(self._key(tensor))
        if made is None or made.op is not _SLICE:
            return tensor
        x, along, start = (*made.args, 0, 0)[:3]
        whole: torch.Tensor = x.tensor
        return whole if along % whole.ndim == dim and not start else tensor

    def _key(self, tensor: torch.Tensor) -> tuple[int, int]:
        return id(tensor), self._versions.get(id(tensor), 0)

    def _hold(self, value: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda t: _Held(t, self._key(t)), value)

    def cut(self, targets: Sequence[torch.Tensor], *, what: str, since: int = 0, through: str | None = None) -> Glue:
        """Returns the operations that make the targets from leaves.

        Args:
            targets: tensors of the recorded block.
            what: what the targets are, for messages.
            since: what was made before this position becomes a leaf, named ``made.<position>.<which result>``.
            through: leaves whose names start with this, and that were made on the tape, are looked through.

        Raises:
            ExportError: a tensor on the way was written to through a view.
        """
        leaves: list[str] = []
        constants: list[torch.Tensor] = []
        steps: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        known: dict[tuple[int, int], Ref] = {}
        transparent = (MADE, through) if through else (MADE,)

        def made_by(held: _Held) -> _Node | None:
            name = self._names.get(held.key)
            made = self._made_by.get(held.key)
            if made is None or (name is not None and not name.startswith(transparent)):
                return None
            return made if made.position >= since else None

        def end(held: _Held) -> Ref:
            if id(held.tensor) in self._overwritten:
                raise ExportError(
                    f"{what} depends on a tensor {list(held.tensor.shape)} that is written to through a view",
                    hint="compute it without in-place operations",
                )
            name = self._names.get(held.key)
            if name is None and (made := self._made_by.get(held.key)) is not None:
                which = next(i for i, result in enumerate(made.results) if result.key == held.key)
                name = f"{MADE}{made.position}.{which}"
                self._leaves[name] = held.tensor
                self._names[held.key] = name
            if name is not None:
                if name not in leaves:
                    leaves.append(name)
                return Ref(("leaf", name))
            constants.append(held.tensor)
            return Ref(("constant", len(constants) - 1))

        def follow(held: _Held) -> Ref:
            if held.key not in known:
                known[held.key] = end(held)
            return known[held.key]

        def place(node: _Node) -> None:
            args, kwargs = tree_map_only(_Held, follow, (node.args, dict(node.kwargs)))
            if node.op in _ALIASES:
                known[node.results[0].key] = args[0]
                return
            steps.append((node.op, args, kwargs))
            known.update({result.key: Ref(("value", len(steps) - 1, i)) for i, result in enumerate(node.results)})

        heads = self._hold(tuple(targets))
        for head in heads:
            stack = [node] if (node := made_by(head)) is not None else []
            while stack:
                sources = (made_by(h) for h in _held(stack[-1]) if h.key not in known)
                missing = [node for node in sources if node is not None]
                if missing:
                    stack.extend(missing)
                elif stack[-1].results[0].key in known:
                    stack.pop()
                else:
                    place(stack.pop())
        ends = tuple(follow(head) for head in heads)
        return Glue(tuple(leaves), tuple(steps), tuple(constants), ends)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor)]


def _held(node: _Node) -> list[_Held]:
    return [h for h in tree_flatten((node.args, dict(node.kwargs)))[0] if isinstance(h, _Held)]


def _functional(func: Any) -> Any | None:
    """Returns the operation without side effect that an in-place one stands for, None if there is none."""
    namespace, _, name = func._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None) if name.endswith("_") else None
    return getattr(packet, func._overloadname, None)

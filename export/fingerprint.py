"""One hash of everything that decides what a generator computes: the bytes of its weights, its code, its options.

Every cache key holds it. It is the same in every process: nothing of it depends on addresses, on the order of sets or
on where a folder lies. What only a run shows (a library that a network calls, a file that it reads) is in the recorded
outputs of the run that a generator is described with: see `with_outputs`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import site
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from fewstep.export.generator import Generator
    from fewstep.export.record.run_record import Run

# Fields of a module that say how it is used and not what it computes, and that runs or tracing change.
_OF_MODULES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})
# Where a configuration was read from, and which of its values are the class's own, in the order of a set.
_WHERE = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "_diffusers_version",
        "transformers_version",
        "_use_default_values",
    }
)
# Fields of a generator that say nothing of what it computes for a request; of its source, the hash does.
_LABELS = frozenset({"name", "source", "licences", "prompts", "calibration_prompts", "steps", "default_steps"})
_ATOMS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range)
# What is compared by value: whether two of them are one object is the interpreter's choice.
_VALUES = (tuple, frozenset, types.CodeType, np.generic, torch.dtype, torch.device, Path)
_OF_CLASSES = ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__firstlineno__")
_CHUNK = 1 << 26


def fingerprint(generator: Generator) -> str:
    """Returns the hash of a generator as it stands now: all of its fields, networks, tokenizers and code.

    Weights that are still in their files are those of the source's hash.
    """
    walk = _Walk()
    walk.add("source", generator.source.sha256)
    for field in dataclasses.fields(generator):
        value = getattr(generator, field.name)
        if field.name in _LABELS:
            continue
        if field.name == "pipeline":
            walk.add("pipeline", _pipeline_values(value))
        elif field.name == "stored":
            walk.add("stored", None if value is None else [value.halves, value.variant])
        else:
            walk.add(field.name, value)
    return walk.result()


def code_and_weights(values: Mapping[str, Any]) -> str:
    """Returns the hash of named networks, functions and values."""
    walk = _Walk()
    for name, value in values.items():
        walk.add(name, value)
    return walk.result()


def with_outputs(mark: str, run: Run) -> str:
    """Returns a fingerprint with what a run left behind: latents, and all that its networks took and gave."""
    walk = _Walk()
    walk.add("fingerprint", mark)
    walk.add("latents", run.latents)
    walk.add("output", run.output)
    for call in run.every_call:
        walk.add(call.instance, [dict(call.inputs), dict(call.outputs)])
    return walk.result()


def _pipeline_values(pipeline: Any) -> dict[str, Any]:
    """Returns what decides what a pipeline does; attributes that begin with an underscore are the state of a call."""
    if not hasattr(pipeline, "components"):
        return {"class": type(pipeline), **vars(pipeline)}
    values: dict[str, Any] = {"class": type(pipeline), "config": _configuration(dict(pipeline.config))}
    own = {name: value for name, value in vars(pipeline).items() if not name.startswith("_")}
    return {**values, "attributes": own, "scheduler": [type(pipeline.scheduler), dict(pipeline.scheduler.config)]}


def _configuration(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in values.items() if name not in _WHERE}


class _Walk:
    """Feeds nested values into one hash, each object once."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no identity is used again
        self._later: list[Any] = []  # functions and classes, whose graph may be deep

    def result(self) -> str:
        """Returns the hash of all that was added, and of the code that it names."""
        while self._later:
            code = self._later.pop(0)
            self._class(code) if isinstance(code, type) else self._function(code)
        return self.digest.hexdigest()

    def add(self, name: str, value: Any) -> None:
        """Adds a named value."""
        self._text(f"{name}=")
        self._value(value)

    def _text(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self.digest.update(len(data).to_bytes(8, "little"))
        self.digest.update(data)

    def _value(self, value: Any) -> None:
        self._text(f"{type(value).__module__}.{type(value).__qualname__}")
        if isinstance(value, _ATOMS):
            return self._text(value.hex() if isinstance(value, (float, bytes)) else repr(value))
        if isinstance(value, _VALUES):
            return self._object(value)
        if id(value) in self._seen:  # a cycle, or an object that is shared: which of those before
            return self._text(f"seen {self._seen[id(value)]}")
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        self._object(value)
        return None

    def _object(self, value: Any) -> None:
        for kind, add in self._kinds():
            if isinstance(value, kind):
                return add(value)
        if hasattr(value, "backend_tokenizer") or hasattr(value, "get_vocab"):
            return self._tokenizer(value)
        if hasattr(value, "set_timesteps") and hasattr(value, "config"):  # a scheduler: the rest is a call's state
            return self._sequence([type(value), _configuration(dict(value.config))])
        if callable(getattr(value, "to_dict", None)) and hasattr(value, "model_type"):  # a transformers configuration
            return self._items(_configuration(value.to_dict()))
        return self._instance(value)

    def _kinds(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        yield torch.Tensor, self._tensor
        yield torch.nn.Module, self._module
        yield np.ndarray, self._array
        yield np.generic, lambda v: self._array(np.asarray(v))
        yield (torch.dtype, torch.device, torch.layout, Path), lambda v: self._text(str(v))
        yield torch.Generator, lambda _: None  # its state is that of a call
        yield enum.Enum, lambda v: self._text(v.name)
        yield Mapping, lambda v: self._items(_configuration(v) if _is_config(v) else v)
        yield AbstractSet, lambda v: self._text(" ".join(sorted(map(_alone, v))))
        yield (str, bytes, bytearray), lambda v: self._text(repr(v))
        yield Sequence, self._sequence
        yield type, self._later.append
        yield types.ModuleType, lambda v: self._text(v.__name__)
        yield functools.partial, lambda v: self._sequence([v.func, v.args, v.keywords])
        yield types.MethodType, lambda v: self._sequence([v.__func__, v.__self__])
        yield types.FunctionType, self._later.append
        yield types.CodeType, self._code
        yield types.CellType, self._cell
        yield (types.BuiltinFunctionType, types.MethodWrapperType), lambda v: self._text(v.__qualname__)
        yield property, lambda v: self._sequence([v.fget, v.fset])
        yield (staticmethod, classmethod), lambda v: self._value(v.__func__)

    def _tensor(self, tensor: torch.Tensor) -> None:
        self._text(f"{tensor.dtype} {list(tensor.shape)} {tensor.device.type}")
        if tensor.is_meta or type(tensor).__name__ == "FakeTensor" or tensor.is_sparse:
            return
        values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if values.numel():
            self._bytes(values.view(torch.uint8).numpy())

    def _array(self, array: np.ndarray[Any, Any]) -> None:
        self._text(f"{array.dtype} {list(array.shape)}")
        if array.dtype.hasobject:
            return self._sequence(array.reshape(-1).tolist())
        if array.size:
            self._bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return None

    def _bytes(self, values: np.ndarray[Any, Any]) -> None:
        for start in range(0, len(values), _CHUNK):
            self.digest.update(values[start : start + _CHUNK].data)

    def _module(self, module: torch.nn.Module) -> None:
        """Adds a network: class and code, parameters, buffers, inner networks, and every other attribute."""
        self._value(type(module))
        for kind in ("_parameters", "_buffers", "_modules"):
            for name, value in vars(module).get(kind, {}).items():
                self.add(name, value)
        self.add("not persistent", module._non_persistent_buffers_set)
        for name in sorted(vars(module).keys() - _OF_MODULES - _WHERE):
            self.add(name, vars(module)[name])

    def _items(self, values: Mapping[Any, Any]) -> None:
        for name, value in values.items():
            self._value(name)
            self._value(value)
        self._text("end")

    def _sequence(self, values: Sequence[Any]) -> None:
        for value in values:
            self._value(value)
        self._text("end")

    def _instance(self, value: Any) -> None:
        """Adds any other object: its class and its attributes."""
        self._value(type(value))
        slots = [s for cls in type(value).__mro__ for s in _slots(cls) if hasattr(value, s)]
        attributes = {**{s: getattr(value, s) for s in slots}, **getattr(value, "__dict__", {})}
        for name in sorted(attributes):
            self.add(name, attributes[name])

    def _tokenizer(self, tokenizer: Any) -> None:
        """Adds a tokenizer: a call leaves its own padding and truncation in it, which are none of the tokenizer's."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            self._value({k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")})
        elif hasattr(tokenizer, "get_vocab"):
            self._value(dict(sorted(tokenizer.get_vocab().items())))
        for name in ("model_max_length", "padding_side", "truncation_side", "special_tokens_map", "chat_template"):
            self.add(name, getattr(tokenizer, name, None))

    def _class(self, cls: type) -> None:
        """Adds a class: the version of its library, or the code of its own methods and of its bases."""
        self._text(f"{cls.__module__}.{cls.__qualname__}")
        if (version := _library(cls.__module__)) is not None:
            return self._text(version)
        for base in cls.__mro__[1:]:
            self._value(base)
        for name, value in sorted(vars(cls).items()):
            if name not in _OF_CLASSES and name != "__static_attributes__":
                self.add(name, value)
        return None

    def _function(self, function: types.FunctionType) -> None:
        """Adds a function: its code, its defaults, what it closes over, and the globals that it names."""
        self._text(f"{function.__module__}.{function.__qualname__}")
        if (version := _library(function.__module__)) is not None:
            return self._text(version)
        self._value(function.__code__)
        self._value(function.__defaults__)
        self._value(function.__kwdefaults__)
        self._value(function.__closure__)
        names = _names(function.__code__)
        for name in sorted(names):
            if name in function.__globals__:
                self.add(name, _named(function.__globals__[name], names))
            elif name in sys.modules:  # imported where it is used
                self.add(name, _named(sys.modules[name], names))
        return None

    def _code(self, code: types.CodeType) -> None:
        self._value(code.co_code)
        self._value([c for c in code.co_consts if not isinstance(c, frozenset)])
        self._value([sorted(map(repr, c)) for c in code.co_consts if isinstance(c, frozenset)])
        self._value([code.co_names, code.co_varnames, code.co_freevars, code.co_flags, code.co_exceptiontable])

    def _cell(self, cell: types.CellType) -> None:
        try:
            self._value(cell.cell_contents)
        except ValueError:  # not filled yet
            self._text("empty")


def _alone(value: Any) -> str:
    walk = _Walk()
    walk.add("", value)
    return walk.result()


def is_own_code(generator: Generator) -> bool:
    """Returns whether code of a generator is its author's own, of which only a run shows all that it does."""
    modules = (inner for name in generator.parts for inner in generator.module(name).modules())
    return generator.is_loop or any(_library(type(o).__module__) is None for o in (generator.pipeline, *modules))


def _is_config(value: Mapping[Any, Any]) -> bool:
    return type(value).__name__ == "FrozenDict"


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(s for s in slots if s not in ("__dict__", "__weakref__"))


def _names(code: types.CodeType) -> set[str]:
    """Returns the names that a function and those inside it look up."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _named(value: Any, names: AbstractSet[str]) -> Any:
    """Returns what a function may take of a global: of a module of the user's, all that the function's names fit."""
    if not isinstance(value, types.ModuleType) or _library(value.__name__) is not None:
        return value
    return {name: _named(vars(value)[name], names - {name}) for name in sorted(names) if name in vars(value)}


@functools.cache
def _library(module_name: str) -> str | None:
    """Returns the version of the library that a module is of, None for a module of the user's own.

    The versions of what fewstep compiles with are in every key beside this, and so is its own code.
    """
    top = module_name.partition(".")[0]
    if top in sys.stdlib_module_names or top in ("fewstep", "torch"):
        return top
    module = sys.modules.get(module_name)
    file = getattr(module, "__file__", None)
    if file is None or not any(Path(file).resolve().is_relative_to(folder) for folder in _library_folders()):
        return None
    version = getattr(sys.modules.get(top), "__version__", None)
    return f"{top} {version}" if isinstance(version, str) else None


@functools.cache
def _library_folders() -> tuple[Path, ...]:
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    return tuple(Path(path).resolve() for path in (*paths, *site.getsitepackages(), site.getusersitepackages()))

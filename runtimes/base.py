"""What every runtime is: two verbs, compile and open, and a session that takes and gives named arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from fewstep.bundle.contract import ComponentSpec
from fewstep.bundle.manifest import Artifact
from fewstep.bundle.program import Program
from fewstep.errors import ContractError, RuntimeMissingError
from fewstep.progress import Progress

if TYPE_CHECKING:
    from fewstep.bundle.bundle import Bundle

Array = npt.NDArray[Any]
RunModel = Callable[[Path, Mapping[str, Array], Sequence[str]], dict[str, Array]]
"""(path of a model, inputs, names of outputs) -> outputs by name, wherever it is run."""


class Session(Protocol):
    """One component, ready to run. A context manager: leaving it frees its memory."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name, for inputs by name."""
        ...

    def close(self) -> None:
        """Frees what the session holds; closing twice is fine."""
        ...


@dataclass(frozen=True)
class Stored:
    """What an artifact's file holds, read without torch.

    Attributes:
        constants: (name, values) of every constant, read anew and one at a time on each call; 4-bit integers as int8.
        grids: every scale and zero point that an activation is written or read with, by the name that the program has
            for it, where they are constants; None where the format does not keep those names.
    """

    constants: Callable[[], Iterator[tuple[str, Array]]]
    grids: Mapping[str, Sequence[tuple[float, int]]] | None = None


@dataclass(frozen=True)
class Availability:
    """Whether a runtime can compile and run on this machine, why not, and what would change that."""

    runtime: str
    compiles: bool
    runs: bool
    version: str | None
    detail: str
    remedy: str | None = None
    stand_in: str | None = None
    """What computes the artifacts here in place of a runtime that cannot run."""

    @property
    def builds(self) -> bool:
        """Whether a bundle for this runtime can be compiled and its numbers compared here."""
        return self.compiles and (self.runs or self.stand_in is not None)


@dataclass(frozen=True)
class OpenLoop:
    """One file that samples, ready to run: the shapes of its inputs by name, and what computes the picture of them."""

    inputs: Mapping[str, Sequence[int]]
    run: Callable[[Mapping[str, Array]], Array]


@dataclass(frozen=True)
class SingleFile:
    """How a runtime has a whole generator in one file, its steps unrolled."""

    write: Callable[[Bundle, Path, int], Path]
    """(bundle, path, steps) -> the file."""
    open: Callable[[Path], OpenLoop]
    """The file with fp32 arithmetic."""


@dataclass(frozen=True)
class Runtime:
    """A backend: one line in the table of `fewstep.runtimes`."""

    name: str
    availability: Callable[[], Availability]
    compile: Callable[[Program, Path, str], Artifact]
    """(program, runtime folder, weights) -> artifact, its path relative to the runtime folder."""
    open: Callable[[Path, ComponentSpec, int | None], CheckedSession]
    """(artifact path, spec, threads) -> session."""
    compare_integers: Callable[[Program, Path, Mapping[str, Array]], list[PointResult]] | None = None
    """(quantized program, artifact path, inputs) -> how every quantized tensor compares with the program's own."""
    compare_integers_at: Callable[[Program, Path, Mapping[str, Array], RunModel], list[PointResult]] | None = None
    """The same, of an artifact that is run elsewhere."""
    compile_variants: Callable[[Iterable[Program], Path, str], list[Artifact]] | None = None
    """(programs of one component, runtime folder, weights) -> artifacts that share one set of weights."""
    open_exact: Callable[[Path, ComponentSpec, int | None], CheckedSession] | None = None
    """The same with fp32 arithmetic, for a runtime whose own arithmetic is narrower."""
    open_mapped: Callable[[Path, ComponentSpec, int | None], CheckedSession] | None = None
    """The same for one of several graphs on one file of weights, which are to be in memory once."""
    at_function: Callable[[str], Runtime] | None = None
    """(function) -> the runtime whose artifacts are that function of theirs, where a file can have several."""
    executor: Callable[[], str] | None = None
    """What runs artifacts here, where that is not the runtime itself."""
    stored: Callable[[Path], Stored] | None = None
    """(artifact path) -> what its file holds, for comparing integers exactly; None where the format cannot be read."""
    run_cut: Callable[[Path, Mapping[str, Array], Mapping[str, Array], Sequence[str]], dict[str, Array]] | None = None
    """(artifact path, inputs, quantized tensors to give to their readers, names of those wanted) -> these by name."""
    session_settings: Callable[[Path], Mapping[str, str]] = lambda _: {}
    """(artifact path) -> settings of a session that computes its integers exactly, by the runtime's names."""
    single_file: SingleFile | None = None
    """How it samples with one file, where it can."""
    image_outputs: bool = False
    """Whether artifacts can give pictures of 8 bits in place of arrays (`Program.picture`)."""

    def of(self, artifact: Artifact) -> Runtime:
        """Returns the runtime for an artifact: as it is, or at the function of a file with several.

        Raises:
            RuntimeMissingError: the artifact is a function, which this runtime cannot open.
        """
        if not artifact.function:
            return self
        if self.at_function is None:
            raise RuntimeMissingError(
                f"runtime {self.name} opens no single function of a file, and {artifact.component} is "
                f"{artifact.function!r} of {artifact.path}",
                hint="build the bundle in the table form, with one shape and no batch",
            )
        return self.at_function(artifact.function)


@dataclass(frozen=True)
class ExecutorState:
    """Whether an executor can run artifacts from here, why not, and what would change that."""

    executor: str
    ready: bool
    detail: str
    remedy: str | None = None


@dataclass(frozen=True)
class Executor:
    """A place where artifacts run: one line in the table of `fewstep.runtimes.executors`.

    It gives a runtime back as it is there, with `Runtime.open` and what else computes replaced; whatever compares
    artifacts goes on with that and knows of no place.
    """

    name: str
    state: Callable[[], ExecutorState]
    at: Callable[[Runtime, Progress], AbstractContextManager[Runtime]]
    """(runtime, progress) -> the runtime as it is there, while the block runs. Prepares the place if need be."""


@dataclass(frozen=True)
class PointResult:
    """How a quantized tensor differs from the reference's: how many of its values, and the most by how much.

    ``unexplained`` are those of them that no rounding explains: where the reference's value before rounding does not
    lie within its float error of the middle between two integers.

    Of a tensor in float, ``sqnr_db`` says it, and nothing is counted. ``noise_db`` is the SQNR that grids inside of the
    operation which computes it leave of it, None where there are none.
    """

    tensor: str
    module_path: str
    values: int
    differing: int
    largest: int
    unexplained: int = 0
    sqnr_db: float | None = None
    noise_db: float | None = None

    @property
    def equal(self) -> float:
        """Share of the values that are equal."""
        return 1 - self.differing / self.values


class CheckedSession:
    """A session whose inputs are checked against the manifest, here and nowhere else."""

    def __init__(self, component: str, spec: ComponentSpec, session: Session) -> None:
        self.component = component
        self.spec = spec
        self._session = session

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name.

        Raises:
            ContractError: an input is missing, unknown, or of another dtype or shape than the manifest says.
        """
        expected = {spec.name for spec in self.spec.inputs}
        if feeds.keys() != expected:
            missing, unknown = sorted(expected - feeds.keys()), sorted(feeds.keys() - expected)
            raise ContractError(f"{self.component}: inputs missing {missing}, unknown {unknown}")
        for spec in self.spec.inputs:
            array = feeds[spec.name]
            spec.check(array.shape, str(array.dtype), self.component)
        return self._session.run({name: np.ascontiguousarray(array) for name, array in feeds.items()})

    def close(self) -> None:
        """Frees what the session holds."""
        self._session.close()

    def __enter__(self) -> Self:
        """Returns the session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Frees what the session holds."""
        self.close()

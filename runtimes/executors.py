"""Where artifacts run: this machine, or another one that is reached through a `Device`.

An executor does not know what it runs. It gives a runtime back as it is there, with `open` and what else computes
replaced, and whatever compares artifacts goes on with that.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.errors import RuntimeMissingError

if TYPE_CHECKING:
    from fewstep.progress import Progress
    from fewstep.runtimes.base import Runtime

NATIVE = "native"


@dataclass(frozen=True)
class ExecutorState:
    """Whether an executor can run artifacts from here, why not, and what would change that."""

    executor: str
    ready: bool
    detail: str
    remedy: str | None = None


@dataclass(frozen=True)
class Executor:
    """A place where artifacts run: one line in the table of this module."""

    name: str
    state: Callable[[], ExecutorState]
    at: Callable[[Runtime, Progress], Runtime]
    """(runtime, progress) -> the runtime as it is there. Prepares the place if need be."""
    emulated: bool = False


def _native_state() -> ExecutorState:
    return ExecutorState(NATIVE, True, f"this machine: {platform.system()} {platform.machine()}")


EXECUTORS: dict[str, Executor] = {
    NATIVE: Executor(NATIVE, _native_state, lambda runtime, _: runtime),
}


def get_executor(name: str) -> Executor:
    """Returns an executor by name.

    Raises:
        RuntimeMissingError: no such executor.
    """
    try:
        return EXECUTORS[name]
    except KeyError:
        raise RuntimeMissingError(
            f"unknown executor {name!r}, expected one of {', '.join(EXECUTORS)}", hint="see `fewstep runtimes`"
        ) from None

"""The places where artifacts run: this machine, and an emulated ARM64 one."""

from __future__ import annotations

import platform
from contextlib import nullcontext

from fewstep.errors import RuntimeMissingError
from fewstep.runtimes.base import Executor, ExecutorState
from fewstep.runtimes.executors import arm64

NATIVE = "native"


def _native_state() -> ExecutorState:
    return ExecutorState(NATIVE, True, f"this machine: {platform.system()} {platform.machine()}")


EXECUTORS: dict[str, Executor] = {
    NATIVE: Executor(NATIVE, _native_state, lambda runtime, _: nullcontext(runtime)),
    arm64.NAME: arm64.EXECUTOR,
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

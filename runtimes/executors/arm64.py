"""Runs artifacts on ARM64: on this machine if it is one, else under QEMU with Debian's Python and the runtime's wheel.

Emulation shows what ARM kernels compute, and nothing of how fast they are. What it takes is fetched once, into the
user's cache folder: see `fewstep.runtimes.executors.arm64_environment`.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata

from fewstep.errors import RuntimeMissingError
from fewstep.progress import Progress
from fewstep.runtimes.base import Executor, ExecutorState, Runtime
from fewstep.runtimes.executors.arm64_environment import (
    A76,
    DOWNLOAD_MB,
    Cpu,
    Environment,
    environment_folder,
    is_prepared,
    prepare,
)
from fewstep.runtimes.executors.remote import Guest, Launch, remote_runtime

NAME = "arm64"
# The package of a runtime's ARM64 build and its version, None for the one that is installed here. A further runtime is
# a line here and an opener in `fewstep.runtimes.executors.worker`.
_WHEELS: Mapping[str, tuple[str, str | None]] = {
    "onnxruntime": ("onnxruntime", None),
    "litert": ("ai-edge-litert", None),
}
_SIGILL = 4


def is_native() -> bool:
    """Returns whether this machine is ARM64 itself."""
    return platform.machine().lower() in ("aarch64", "arm64")


def can_emulate() -> bool:
    """Returns whether QEMU's user mode emulates ARM64 here."""
    return platform.system() == "Linux" and platform.machine() == "x86_64"


def state() -> ExecutorState:
    """Returns whether ARM64 artifacts can run here, and what is prepared."""
    if is_native():
        return ExecutorState(NAME, True, f"this machine: {platform.system()} {platform.machine()}, not emulated")
    if not can_emulate():
        return ExecutorState(NAME, False, _no_host(), "use Linux on x86-64 or any ARM64 machine")
    if is_prepared():
        return ExecutorState(NAME, True, f"emulated by QEMU ({A76.name}), prepared in {environment_folder()}")
    return ExecutorState(
        NAME,
        True,
        f"emulated by QEMU ({A76.name}); not prepared yet",
        f"its first use fetches about {DOWNLOAD_MB} MB from Debian and PyPI into {environment_folder()}",
    )


@contextmanager
def at(runtime: Runtime, progress: Progress, cpu: Cpu = A76) -> Iterator[Runtime]:
    """Yields a runtime as it is on ARM64, natively or emulated.

    Raises:
        RuntimeMissingError: it cannot run on ARM64, ARM64 cannot be emulated here, or what that takes cannot be had.
    """
    if is_native():
        yield replace(runtime, executor=lambda: f"ARM64, natively ({platform.system()})")
        return
    if runtime.name not in _WHEELS:
        raise RuntimeMissingError(
            f"runtime {runtime.name} cannot be run on emulated ARM64, expected one of {', '.join(_WHEELS)}",
            hint="choose another of the bundle's runtimes with --runtime",
        )
    if not can_emulate():
        raise RuntimeMissingError(_no_host(), hint="use Linux on x86-64 or any ARM64 machine")
    package, pinned = _WHEELS[runtime.name]
    environment = prepare({package: pinned or _version_here(package, runtime.name)}, progress)
    guest = Guest(launch(environment, cpu), runtime.name)
    try:
        yield remote_runtime(runtime, guest)
    finally:
        guest.close()


def _version_here(package: str, runtime: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise RuntimeMissingError(
            f"{package} is not installed, and its version on ARM64 has to be the same",
            hint=f"pip install 'fewstep[{runtime}]'",
        ) from None


def launch(environment: Environment, cpu: Cpu) -> Launch:
    """Returns how the guest script starts in an environment, on a processor."""

    def explain(signal: int) -> str | None:
        if signal != _SIGILL:
            return None
        return (
            f"an instruction that {cpu.emulated} does not have: {cpu.name} is described to programs as having "
            f"{', '.join(cpu.features)}"
        )

    return Launch(
        environment.argv(cpu),
        f"emulated ARM64 ({environment.qemu_version}, {cpu.name})",
        explain=explain,
        environment=environment.variables,
    )


def _no_host() -> str:
    return f"ARM64 is emulated on Linux on x86-64 only, and this is {platform.system()} on {platform.machine()}"


EXECUTOR = Executor(NAME, state, at)

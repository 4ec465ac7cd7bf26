"""How a long operation tells where it is. The command line shows bars or lines; a library call stays silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

Advance = Callable[[], None]


class Progress(Protocol):
    """Something that shows tasks."""

    def task(self, description: str, total: int) -> Advance:
        """Starts a task of ``total`` parts and returns what to call after each."""
        ...


class Silent:
    """Shows nothing."""

    def task(self, description: str, total: int) -> Advance:
        """Returns a call that does nothing."""
        return lambda: None


@contextmanager
def stage(progress: Progress, description: str) -> Iterator[None]:
    """Shows a block of work as a task of one part."""
    advance = progress.task(description, 1)
    yield
    advance()

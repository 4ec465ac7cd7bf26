"""What the command line prints: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from fewstep.progress import Advance, Progress

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False)


class _Bars:
    """Progress as bars on stderr."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars

    def task(self, description: str, total: int) -> Advance:
        """Returns a call that moves the task's bar on by one."""
        task = self._bars.add_task(description, total=total)
        return lambda: self._bars.advance(task)


class _Lines:
    """Progress as lines on stderr, where no terminal shows bars: one for each task, and one a minute of a long one."""

    def __init__(self, every: float) -> None:
        self._started = time.monotonic()
        self._running: dict[int, _Task] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._tell, args=(every,), daemon=True)
        self._beat.start()

    def task(self, description: str, total: int) -> Advance:
        """Returns a call that moves the task on by one; a task of no parts is over at once."""
        task = _Task(description, total)
        with self._lock:
            if total:
                self._running[id(task)] = task
        self._print(description if total < 2 else f"{description} ({total})")

        def advance() -> None:
            with self._lock:
                task.done += 1
                if task.done >= task.total:
                    self._running.pop(id(task), None)

        return advance

    def close(self) -> None:
        """Ends the lines of every minute."""
        self._stop.set()
        self._beat.join()

    def _tell(self, every: float) -> None:
        while not self._stop.wait(every):
            with self._lock:
                running = list(self._running.values())
            for task in running[-1:]:  # the innermost
                self._print(f"... {task.description}, {task.done} of {task.total} done")

    def _print(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        ERR.print(f"[{minutes}:{seconds:02}] {text}", markup=False, soft_wrap=True)


@dataclass
class _Task:
    description: str
    total: int
    done: int = 0


@contextmanager
def progress_bars(*, every: float = 60.0) -> Iterator[Progress]:
    """Shows progress on stderr while the block runs: as bars, or without a terminal as lines, ``every`` s and more."""
    if not ERR.is_terminal:
        lines = _Lines(every)
        try:
            yield lines
        finally:
            lines.close()
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with RichProgress(*columns, console=ERR) as bars:
        yield _Bars(bars)


def print_json(value: Any) -> None:
    """Prints a value on stdout, for programs."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def print_parity(summary: Mapping[str, Any], caveats: tuple[str, ...]) -> None:
    """Prints the summary of a parity report: the verdict, the worst of each level, and what is not proved."""
    verdict = "verified" if summary["passed"] else "FAILED"
    OUT.print(
        f"{verdict}  {summary['checks']} checks, {summary['failed']} failed, against {summary['reference']}",
        markup=False,
    )
    for level, worst in summary["worst"].items():
        text = (
            f"{worst['metric']} {worst['value']:.1f}"
            if isinstance(worst["value"], float)
            else f"{worst['metric']} {worst['value']}"
        )
        OUT.print(
            f"  worst {level}: {text} (limit {worst['limit']}), {worst['component']}, {worst['sample']}", markup=False
        )
    for caveat in caveats:
        OUT.print(f"  note: {caveat}", markup=False)


def print_paths(paths: list[Path]) -> None:
    """Prints paths on stdout, a line each."""
    for path in paths:
        OUT.print(str(path), markup=False)


def yes_or_no(value: bool) -> str:
    """Returns a word for a cell of a table."""
    return "yes" if value else "no"

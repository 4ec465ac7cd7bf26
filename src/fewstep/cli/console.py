"""What the command line prints: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Shows progress as bars on stderr, while the block runs."""
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

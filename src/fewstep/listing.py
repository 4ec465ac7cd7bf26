"""Tables of the command line: what can compile or run here, and what came of trying it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fewstep.runtimes.base import Availability
from fewstep.runtimes.executors import ExecutorState
from fewstep.selftest import Trial

_out = Console(highlight=False, soft_wrap=True)


def print_runtimes(states: Sequence[Availability], executors: Sequence[ExecutorState], *, as_json: bool) -> None:
    """Prints what compiles and runs here, why something does not, and the remedy."""
    if as_json:
        values = {"runtimes": [asdict(s) for s in states], "executors": [asdict(e) for e in executors]}
        return click.echo(json.dumps(values, indent=1, ensure_ascii=False))
    table = Table("runtime", "compiles", "runs", "version", "detail", "remedy")
    for s in states:
        runs = "yes" if s.runs else "no" if s.stand_in is None else f"no; checked by {s.stand_in}"
        # Remedies hold [extras], which would read as markup.
        cells = (runs, s.version or "", s.detail, s.remedy or "")
        table.add_row(s.runtime, _yes(s.compiles), *map(escape, cells))
    _out.print(table)
    table = Table("executor", "ready", "detail", "remedy", title="where `fewstep verify --executor` can run bundles")
    for e in executors:
        table.add_row(e.executor, _yes(e.ready), escape(e.detail), escape(e.remedy or ""))
    _out.print(table)


def print_trials(runtime: str, trials: Sequence[Trial], *, as_json: bool) -> None:
    """Prints what came of each recipe of a self-test."""
    if as_json:
        return click.echo(json.dumps([asdict(trial) for trial in trials], indent=1, ensure_ascii=False))
    for trial in trials:
        said = "FAILED" if trial.error else "passed"
        text = f"{trial.checks} checks, {trial.executor}" if trial.error is None else trial.error
        _out.print(f"{said}  {runtime} {trial.recipe}: {text}", markup=False)


def _yes(value: bool) -> str:
    return "yes" if value else "no"

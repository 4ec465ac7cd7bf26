"""What this machine can compile and run, and what came of trying it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.markup import escape
from rich.table import Table

from fewstep.cli.console import OUT, print_json, progress_bars, yes_or_no
from fewstep.cli.options import json_option
from fewstep.errors import RuntimeMissingError
from fewstep.pipeline.selftest import Trial, self_test
from fewstep.runtimes import RUNTIMES, get_runtime
from fewstep.runtimes.base import Availability, ExecutorState
from fewstep.runtimes.executors import EXECUTORS


@click.command()
@click.option("--self-test", "tried", metavar="RUNTIME", help="Compile and run a small generator for it, and compare.")
@json_option
@click.pass_context
def runtimes(context: click.Context, tried: str | None, as_json: bool) -> None:
    """Say what can compile or run here and, if not, why and the remedy."""
    if tried is not None:
        return _try(context, tried, as_json=as_json)
    states = [runtime.availability() for runtime in RUNTIMES.values()]
    places = [executor.state() for executor in EXECUTORS.values()]
    if as_json:
        return print_json({"runtimes": [asdict(s) for s in states], "executors": [asdict(e) for e in places]})
    _print_runtimes(states)
    _print_executors(places)


def _try(context: click.Context, name: str, *, as_json: bool) -> None:
    """Prints what came of a self-test; exit 1 if something departed, 2 if the runtime itself could not run."""
    with progress_bars() as progress:
        trials = self_test(name, progress=progress)
    if as_json:
        print_json([asdict(trial) for trial in trials])
    else:
        print_trials(name, trials)
    if any(trial.error for trial in trials):
        context.exit(1)
    state = get_runtime(name).availability()
    if not state.runs:
        raise RuntimeMissingError(
            f"{name} itself was not tried: {state.stand_in} computed its artifacts ({state.detail})", hint=state.remedy
        )


def print_trials(runtime: str, trials: Sequence[Trial]) -> None:
    """Prints what came of each recipe of a self-test."""
    for trial in trials:
        said = "FAILED" if trial.error else "passed"
        text = f"{trial.checks} checks, {trial.executor}" if trial.error is None else trial.error
        OUT.print(f"{said}  {runtime} {trial.recipe}: {text}", markup=False)


def _print_runtimes(states: Sequence[Availability]) -> None:
    table = Table("runtime", "compiles", "runs", "version", "detail", "remedy")
    for s in states:
        runs = "yes" if s.runs else "no" if s.stand_in is None else f"no; checked by {s.stand_in}"
        # Remedies hold [extras], which would read as markup.
        cells = (runs, s.version or "", s.detail, s.remedy or "")
        table.add_row(s.runtime, yes_or_no(s.compiles), *map(escape, cells))
    OUT.print(table)


def _print_executors(places: Sequence[ExecutorState]) -> None:
    table = Table("executor", "ready", "detail", "remedy", title="where `fewstep verify --executor` can run bundles")
    for e in places:
        table.add_row(e.executor, yes_or_no(e.ready), escape(e.detail), escape(e.remedy or ""))
    OUT.print(table)


COMMANDS = (runtimes,)

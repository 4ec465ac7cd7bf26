"""The command line. Results go to stdout, progress and errors to stderr; how it ends is in `fewstep.cli.endings`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

import fewstep
from fewstep.cli import bundles, machines, stages, storage
from fewstep.cli.console import ERR
from fewstep.cli.endings import BUG, INTERRUPTED, Interruptions, interruptible, of_a_bug, told

_BROKEN_PIPE = 128 + 13  # what a shell says of a program that ended because nobody read on


class _Group(click.Group):
    """Commands whose ends are ours: click prints an empty line for an interruption, and exits 1 for a broken pipe."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.exceptions.Abort() from error
        except BrokenPipeError:
            sys.stdout = Path(os.devnull).open("w")
            ctx.exit(_BROKEN_PIPE)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fewstep.__version__, prog_name="fewstep")
def cli() -> None:
    """Compile few-step generators for devices, with proof.

    SOURCE is a diffusers folder, a single-file checkpoint (with --config), a hub id (owner/name@revision),
    module:function, or stickers, the built-in generator.
    """


for _command in (*bundles.COMMANDS, *stages.COMMANDS, *machines.COMMANDS, *storage.COMMANDS):
    cli.add_command(_command)


def main() -> NoReturn:
    """Runs the command line and exits with its status."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries, for their developers; `python -W` brings them back
    with interruptible() as taken:
        try:
            status = _run()
        except (click.exceptions.Abort, KeyboardInterrupt):
            status = _interrupted(taken)
        except click.ClickException as error:
            error.show()
            status = error.exit_code if error.exit_code != 1 else 2
        except Exception as error:
            status = _interrupted(taken) if taken.number else _failed(error)
        sys.exit(status)


def _run() -> int:
    """Returns what the command exits with: 0, or what a command asked for."""
    return cli.main(standalone_mode=False) or 0  # click raises nothing for it


def _interrupted(taken: Interruptions) -> int:
    ERR.print(INTERRUPTED)
    return taken.status


def _failed(error: Exception) -> int:
    """Says what went wrong, and returns the exit status."""
    known = told(error)
    ERR.print("error:", style="bold red", end=" ")
    # Not through rich's markup: messages hold [1, 4, 16, 16] and paths.
    ERR.print(str(known) if known is not None else of_a_bug(error), markup=False, soft_wrap=True)
    return BUG if known is None else known.exit_status

"""The command line. Results go to stdout, progress and errors to stderr; exit 0 fine, 1 parity, 2 anything else."""

from __future__ import annotations

import sys
import warnings
from typing import NoReturn

import click

import fewstep
from fewstep.cli import bundles, machines, stages
from fewstep.cli.console import ERR
from fewstep.errors import FewstepError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fewstep.__version__, prog_name="fewstep")
def cli() -> None:
    """Compile few-step generators for devices, with proof.

    SOURCE is a diffusers folder, a single-file checkpoint (with --config), a hub id (owner/name@revision),
    module:function, or stickers, the built-in generator.
    """


for _command in (*bundles.COMMANDS, *stages.COMMANDS, *machines.COMMANDS):
    cli.add_command(_command)


def main() -> NoReturn:
    """Runs the command line and exits with its status."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries, for their developers; `python -W` brings them back
    try:
        status = cli.main(standalone_mode=False)  # what a command exits with: click raises nothing for it
    except FewstepError as error:
        # Not through rich's markup: messages hold [1, 4, 16, 16] and paths.
        ERR.print("error:", style="bold red", end=" ")
        ERR.print(str(error), markup=False, soft_wrap=True)
        sys.exit(error.exit_status)
    except click.exceptions.Abort:
        ERR.print("interrupted; nothing was written, finished stages are cached")
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except OSError as error:
        ERR.print("error:", style="bold red", end=" ")
        ERR.print(_told(error), markup=False)
        sys.exit(2)
    sys.exit(status or 0)


def _told(error: OSError) -> str:
    """Returns what an error of the operating system says; libraries raise some of no file, with a text alone."""
    if error.filename is None:
        return str(error) or type(error).__name__
    return f"{error.filename}: {error.strerror}\n\nhint: check the path and its permissions"

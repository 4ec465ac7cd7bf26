"""The command `fewstep` from its first moment: importing the rest takes a second, in which it may be interrupted.

A package of its own, because Python imports all of a package before anything in it.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Runs the command line and exits with its status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from fewstep.cli import main as run

    run()


def _leave(number: int, _: FrameType | None) -> None:
    os.write(2, b"interrupted; nothing was written\n")
    os._exit(128 + number)

"""Watches what a process does while it reads something hostile: imports, writes, other processes, the network."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Python's events (its documentation has a table) of what reading never does.
_NEVER = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|startfile|fork|forkpty|mkdir|rename|remove|rmdir|link|symlink|truncate|chmod|"
    r"chown|putenv|kill)|shutil\..*|subprocess\.Popen|socket\.(connect|bind|getaddrinfo|gethostbyname|sendto)|"
    r"webbrowser\.open|urllib\.Request|tempfile\..*|pty\.spawn|ftplib\..*|smtplib\..*"
)
_HARMLESS = ("/dev/null", "/proc/")


def allowed_modules() -> frozenset[str]:
    """Returns the top-level modules of Python, of fewstep, and of all that it says it depends on."""
    wanted, seen = ["fewstep"], set()
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in seen:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        seen.add(name)
        needed = [line for line in requires if not re.search(r"extra == .(test|dev).", line)]
        wanted += [re.split(r"[ \[<>=!~;(]", line, maxsplit=1)[0] for line in needed]
    found = {
        module
        for module, owners in metadata.packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", owner).lower() in seen for owner in owners)
    }
    return frozenset(sys.stdlib_module_names) | found | {"fewstep", "tests", "__main__"}


class Watch:
    """What was done while it was armed."""

    def __init__(self) -> None:
        self.armed = False
        self.seen: list[str] = []
        self._allowed = allowed_modules()
        sys.addaudithook(self._hook)

    @contextmanager
    def __call__(self) -> Iterator[list[str]]:
        """Yields the list of what is done in the block and should not be."""
        self.seen, self.armed = [], True
        try:
            yield self.seen
        finally:
            self.armed = False

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.armed:
            return
        if event == "import":
            name = str(arguments[0])
            if name.partition(".")[0] not in self._allowed:
                self.seen.append(f"import {name}")
        elif event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & _WRITES
            if (writes or (isinstance(mode, str) and set(mode) & set("wax+"))) and not str(path).startswith(_HARMLESS):
                self.seen.append(f"write {path}")
        elif _NEVER.fullmatch(event):
            self.seen.append(f"{event} {arguments[:1]}")

"""Packages that pipelines clean texts with where they are installed, and do without where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

# What is imported -> what is installed.
CLEANERS: Mapping[str, str] = {"bs4": "beautifulsoup4", "ftfy": "ftfy"}
ABSENT = "not installed"


def cleaners() -> dict[str, str]:
    """Returns the version of each package here, or `ABSENT`."""
    found = {}
    for name, distribution in CLEANERS.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = ABSENT
    return found


def cleaner_notes(versions: Mapping[str, str]) -> list[str]:
    """Returns a note for each package that is here and was not where a bundle was described, or the other way round."""
    notes = []
    for name, here in cleaners().items():
        then = versions.get(name, ABSENT)
        if (then == ABSENT) != (here == ABSENT):
            was, is_now = ("was not", "is") if then == ABSENT else ("was", "is not")
            notes.append(
                f"{name} {was} installed where the bundle was built and {is_now} here: a pipeline may read prompts "
                "otherwise with it"
            )
    return notes

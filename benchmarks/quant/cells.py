"""Finished measurements: one JSON file each, which holds as long as everything that determined it is the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.hashing import file_sha256, value_sha256

Values = dict[str, Any]


class Cells:
    """The cells of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> Values | None:
        """Returns what was measured, None if nothing was."""
        path = self._path(name)
        cell: Values | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return cell

    def holds(self, name: str, key: Mapping[str, Any]) -> bool:
        """Returns whether a cell has values, of this key."""
        cell = self.read(name)
        return cell is not None and cell["key"] == value_sha256(key) and "error" not in cell["values"]

    def get_or_make(
        self, name: str, key: Mapping[str, Any], make: Callable[[], Values], *, again: bool = False
    ) -> Values:
        """Returns a cell's values, measured now unless the cell is there with the same key.

        A tool that fails is a result: the cell then holds its message under ``error``, and is tried again next time.
        """
        cell = self.read(name)
        if not again and cell is not None and self.holds(name, key):
            return dict(cell["values"])
        try:
            values = make()
        except FewstepError as error:
            values = {"error": error.message}
        self._write(name, {"key": value_sha256(key), "determined_by": dict(key), "values": values})
        return values

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _write(self, name: str, cell: Values) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def sources_sha256(*paths: Path) -> dict[str, str]:
    """Returns the hashes of the files that a cell's values depend on, by name."""
    return {path.name: file_sha256(path)[:16] for path in paths}

"""Content hashes of files, folders and values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

_CHUNK = 1 << 20


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content as hex, reading it in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def folder_sha256(folder: Path, files: Iterable[Path] | None = None) -> str:
    """Returns one hash for a folder: of the relative path and content of every file (or of ``files``), in order."""
    chosen = sorted(files) if files is not None else sorted(p for p in folder.rglob("*") if p.is_file())
    return value_sha256([[p.relative_to(folder).as_posix(), file_sha256(p)] for p in chosen])


def value_sha256(value: object) -> str:
    """Returns the hash of a JSON-ready value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()

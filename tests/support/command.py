"""The command line in this process, and what a refusal looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Run = Callable[..., tuple[int, str, str]]


def refused(run: Run, source: str | Path, tmp_path: Path, *options: str) -> str:
    """Builds, expects exit status 2 with a hint and no bundle or rest of one, and returns what was said."""
    out = tmp_path / "out" / "bundle"
    status, stdout, stderr = run("build", source, "-o", out, *options)
    assert status == 2, stderr
    assert "hint: " in stderr
    assert stdout == ""
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    return " ".join(stderr.split())

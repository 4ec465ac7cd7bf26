"""Writes the good bundles and the good source that `make test-hostile` spoils."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from tests.support.bundles import built, plain


def main(folder: Path) -> None:
    """Writes them, unless they are there."""
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    lcm = built("lcm")
    shutil.copytree(lcm.bundle.path, partial / "lcm")
    shutil.copytree(lcm.source, partial / "source")
    shutil.copytree(plain().path, partial / "plain")
    partial.rename(folder)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(Path(sys.argv[1]))

"""Seeds every fault, verifies live and by the golden pack alone, and writes the table of docs/parity.md.

Goes on where it was interrupted: what each fault came to is kept beside the bundles. ``python -m tests.faults [WORDS]``
runs those whose name has one of the words, and ``--table`` writes the table alone.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fewstep.bundle import Bundle
from fewstep.errors import FewstepError
from fewstep.verify import Verification, verify
from tests.faults.bundles import ROOT, WORK, folder_of
from tests.faults.edits import Folder
from tests.faults.seeded import FAULTS, Fault

RESULTS = WORK / "results.json"
PAGE = ROOT / "docs" / "parity.md"
BEGIN, END = "<!-- seeded faults: written by make test-faults -->", "<!-- end of seeded faults -->"
# What a level cannot see, and which command can.
EXPLAINED = {
    ("decoder x (1 + 1e-4 N)", "live"): "100 dB allow it: float weights are compared by what they compute",
    ("decoder x (1 + 1e-4 N)", "golden"): "as live",
    ("one convolution's result through fp16", "live"): "100 dB allow one rounding to fp16",
    ("one convolution's result through fp16", "golden"): "as live",
    ("constant picture, golden pack agrees", "golden"): "",
    (
        "wrong denoiser, golden pack agrees",
        "golden",
    ): "the golden pack is the reference: `verify` with the source sees it",
}


@dataclass(frozen=True)
class Seen:
    """What a fault came to: whether each level noticed it, and what was named."""

    name: str
    recipe: str
    live: bool
    golden: bool
    localised: bool
    said: str


def main() -> None:
    """Runs the faults that are left, then writes the table."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    WORK.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with remembered():
        for fault in () if "--table" in sys.argv else FAULTS:
            if fault.name in known if not words else not any(word in fault.name for word in words):
                continue
            seen = look(fault, folder_of(fault.recipe))
            known[fault.name] = asdict(seen)
            RESULTS.write_text(json.dumps(known, indent=1))
            sys.stderr.write(f"{seen}\n")
    write_table([Seen(**known[fault.name]) for fault in FAULTS if fault.name in known])


def look(fault: Fault, bundle: Path, *, live: bool = True) -> Seen:
    """Returns what verification says of a bundle with a fault; ``live`` False leaves the source alone."""
    with tempfile.TemporaryDirectory() as work:
        folder = Folder(Path(work) / "bundle")
        shutil.copytree(bundle, folder.path)
        fault.seed(folder)
        folder.rehash()
        seen, place = _verdict(lambda: _live(folder.path)) if live else (False, "")
        golden, from_golden = _verdict(lambda: _golden(folder.path))
    said = place if seen else from_golden
    # Faults of integers are told by the module whose integers they are.
    named = (
        any(fault.place in text for text in (place, from_golden)) if fault.place else "." in place or "stored" in place
    )
    return Seen(fault.name, fault.recipe, seen, golden, (seen or golden) and named, said[:160])


def _verdict(run: Callable[[], Verification]) -> tuple[bool, str]:
    """Returns whether a verification noticed something, and all that it names."""
    try:
        result = run()
    except FewstepError as error:
        return True, f"refused: {error}"
    if result.report:
        return False, ""
    departures = [f"{name}: {d.module_path} {d.tensor}" for name, d in result.departures.items() if d is not None]
    first = result.report.failures[0]
    stored = [f"{c.level} {c.component} {c.tensor or c.metric}" for c in result.report.failures if c.level == "stored"]
    told = [result.place or "", *departures, *stored[:2], f"{first.level} {first.where} {first.metric}"]
    return True, "; ".join(filter(None, told))


def _live(path: Path) -> Verification:
    return verify(Bundle.open(path), prompts=1, seeds=1, bisect=True)


def _golden(path: Path) -> Verification:
    module = sys.modules[verify.__module__]  # `fewstep.verify` is the function
    with mock.patch.object(module, "usable_source", lambda *_: (None, "it is not asked for")):
        return verify(Bundle.open(path))


def remembered() -> mock._patch[Any]:
    """Returns a patch under which a source is loaded once: it is the same for every fault."""
    from fewstep import export

    plain = export.load

    @functools.cache
    def load(spec: Any, guidance: float | None, eager: bool) -> Any:
        return plain(spec, guidance=guidance, eager=eager)

    def once(spec: Any, *, guidance: float | None = None, eager: bool = False) -> Any:
        return load(spec, guidance, eager)

    return mock.patch("fewstep.export.load", once)


def write_table(rows: list[Seen]) -> None:
    """Writes the table between its markers."""
    count = {level: sum(getattr(row, level) for row in rows) for level in ("live", "golden", "localised")}
    lines = [
        BEGIN,
        "",
        f"{len(rows)} faults, seeded into verified bundles of `stickers` with the hashes made to fit. Noticed:",
        f"{count['live']} with the source, {count['golden']} by the golden pack alone (without PyTorch);",
        f"{count['localised']} were named by their place.",
        "The app's device check was not run on them.",
        "",
        "| fault | recipe | live | golden pack | named |",
        "|---|---|---|---|---|",
    ]
    mark = {True: "yes", False: "**no**"}
    for row in rows:
        cells = [f"{mark[getattr(row, level)]}{_why(row, level)}" for level in ("live", "golden")]
        lines.append(f"| {row.name} | {row.recipe} | {' | '.join(cells)} | {mark[row.localised]} |")
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(head + "\n".join([*lines, "", END]) + rest.partition(END)[2], encoding="utf-8")


def _why(row: Seen, level: str) -> str:
    why = EXPLAINED.get((row.name, level), "")
    return f": {why}" if why and not getattr(row, level) else ""


if __name__ == "__main__":
    main()

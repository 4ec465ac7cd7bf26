"""Seeds every fault, verifies live and by the golden pack alone, and writes the table of docs/parity.md.

Goes on where it was interrupted: what each fault came to is kept beside the bundles. ``python -m tests.faults [WORDS]``
runs those whose name has one of the words, ``--table`` writes the table alone, and ``--tiny`` seeds faults of integers
into a small network of the tests, which takes seconds to build.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fewstep.bundle.bundle import Bundle
from fewstep.errors import FewstepError
from fewstep.pipeline.verify import Verification, verify
from tests.faults.bundles import PAINTER, ROOT, STICKERS, WORK, folder_of
from tests.faults.edits import Folder
from tests.faults.seeded import FAULTS, W8A8, Fault

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
            source = PAINTER if "--tiny" in sys.argv and fault.recipe == W8A8 else STICKERS
            seen = look(fault, folder_of(fault.recipe, source), against=source)
            known[fault.name] = asdict(seen)
            RESULTS.write_text(json.dumps(known, indent=1))
            sys.stderr.write(f"{seen}\n")
    write_table([Seen(**known[fault.name]) for fault in FAULTS if fault.name in known])


def look(fault: Fault, bundle: Path, *, against: str | None = None) -> Seen:
    """Returns what verification says of a bundle with a fault: with a source if one is given, and without."""
    with tempfile.TemporaryDirectory() as work:
        folder = Folder(Path(work) / "bundle")
        shutil.copytree(bundle, folder.path)
        fault.seed(folder)
        folder.rehash()
        seen, place = _verdict(lambda: _live(folder.path, against)) if against is not None else (False, "")
        golden, from_golden = _verdict(lambda: _golden(folder.path))
    said = place if seen else from_golden
    # Faults of integers are told by the module whose integers they are.
    named = any(fault.place in text if fault.place else "stored denoiser" in text for text in (place, from_golden))
    where = f"{fault.recipe}, painter" if against == PAINTER else fault.recipe
    return Seen(fault.name, where, seen, golden, (seen or golden) and named, said[:160])


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


def _live(path: Path, against: str) -> Verification:
    return verify(Bundle.open(path), against=against, prompts=1, seeds=1, bisect=True)


def _golden(path: Path) -> Verification:
    module = sys.modules[verify.__module__]  # `fewstep.pipeline.verify` is the function
    with mock.patch.object(module, "usable_source", lambda *_: (None, "it is not asked for")):
        return verify(Bundle.open(path))


@contextmanager
def remembered() -> Iterator[None]:
    """Computes once, for the length of a block, what depends on the source alone and not on a bundle with a fault."""
    from fewstep import calibration, export
    from fewstep.runtimes.onnxruntime.debug import bisect as ort_bisect

    known: dict[Any, Any] = {}

    def once(key: Any, make: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = make()
        return known[key]

    def source(generator: Any) -> Any:
        return generator.source.sha256, generator.guidance, generator.name

    def load(spec: Any, *, guidance: float | None = None, eager: bool = False) -> Any:
        return once(("load", str(spec), guidance), lambda: plain[0](spec, guidance=guidance, eager=True))

    def describe(generator: Any, steps: Any) -> Any:
        return once(("describe", *source(generator), tuple(steps)), lambda: plain[1](generator, steps))

    def programs_of(generator: Any, described: Any, recipe: Any) -> Any:
        key = ("programs", *source(generator), id(described), str(recipe))
        return once(key, lambda: plain[2](generator, described, recipe))

    def record_samples(generator: Any, described: Any, requests: Any) -> Iterator[Any]:
        for request in requests:
            key = ("sample", *source(generator), id(described), request.prompt, request.seed, request.steps)
            key = (*key, request.guidance)
            yield once(key, lambda one=request: next(plain[3](generator, described, [one])))  # type: ignore[misc]

    def translate(program: Any) -> Any:
        return once(("onnx", id(program.exported)), lambda: (plain[4](program), program.exported))[0]

    changed = [
        (export, "load", load),
        (export, "describe", describe),
        (export, "programs_of", programs_of),
        (calibration, "record_samples", record_samples),
        (ort_bisect, "translate", translate),
    ]
    plain = [getattr(module, name) for module, name, _ in changed]
    with ExitStack() as stack:
        for module, name, function in changed:
            stack.enter_context(mock.patch.object(module, name, function))
        yield


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

"""Measures quantized generators against fp32, and writes tables and a plot.

``python -m benchmarks.quant`` goes on where it was interrupted: a cell whose determining files, prompts and options are
the same is not measured again. Rows can be named; ``--again latency`` measures latencies again, on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.quant import evaluation, latency, models, quality, reference
from benchmarks.quant.cells import Cells, sources_sha256
from benchmarks.quant.plot import scatter
from benchmarks.quant.prompts import CALIBRATION, HELD_OUT, HELD_OUT_SEEDS, check_disjoint
from benchmarks.quant.rows import Row, rows
from benchmarks.quant.table import DEFAULT_FORM, markdown, points
from benchmarks.scale.table import describe_machine
from fewstep.bundle.bundle import Bundle
from fewstep.cache import code_sha256
from fewstep.errors import FewstepError
from fewstep.hashing import value_sha256
from fewstep.run_in_subprocess import run_isolated

HERE = Path(__file__).parent
RESULTS, WORK = HERE / "results", Path("build/quant")
STAGES = ("quality", "latency")


class Benchmark:
    """Makes and measures rows against one fp32 bundle."""

    def __init__(self, bundle: Path, again: set[str]) -> None:
        self._reference = Bundle.open(bundle)
        self._again = again
        self._evaluation = sources_sha256(HERE / "evaluation.py")
        self._unscored: dict[str, tuple[Path, dict[str, Any]]] = {}
        self._cells = Cells(RESULTS / "cells")
        calibration, held_out = list(CALIBRATION), list(HELD_OUT)
        check_disjoint(calibration, held_out)
        self._networks = models.networks(self._reference)
        recorder = sources_sha256(HERE / "reference.py")
        common = {"networks": self._networks, "steps": reference.STEPS, **recorder}
        self._judged = {**common, "prompts": held_out, "seeds": list(HELD_OUT_SEEDS)}
        self._calls = self._recorded(reference.record_calls, "calls", calibration, {**common, "prompts": calibration})
        self._samples = self._recorded(reference.record_reference, "reference", held_out, self._judged)

    def measure(self, row: Row) -> None:
        """Makes a row's bundle and measures it; what fails is kept as the row's result."""
        try:
            bundle = self._bundle(row)
        except FewstepError as error:
            tell(f"{row.name}: {error.message}")
            return
        made = models.networks(bundle)
        key = {"networks": made, "judged": value_sha256(self._judged), **sources_sha256(HERE / "quality.py")}
        pictures = WORK / "pictures" / f"{row.name}.npz"
        arguments = {"bundle": str(bundle.path), "reference": str(self._samples), "pictures": str(pictures)}
        scored = self._cells.holds(f"evaluation/{row.name}", {**key, **self._evaluation})
        self._cell("quality", row, key, quality.measure, arguments, again=not (scored or pictures.is_file()))
        if not scored and pictures.is_file():
            self._unscored[row.name] = (pictures, {**key, **self._evaluation})
        key = {
            "networks": made,
            "reference": self._networks,
            "machine": describe_machine()["processor"],
            "onnxruntime": onnxruntime.__version__,
            **sources_sha256(HERE / "latency.py"),
        }
        arguments = {"bundle": str(bundle.path), "reference": str(self._reference.path)}
        self._cell("latency", row, key, latency.measure, {**arguments, "steps": reference.STEPS})
        sizes = {a.component: size_bytes(bundle, a.path) for a in bundle.manifest.artifacts}
        self._cells.get_or_make(f"size/{row.name}", {"networks": made}, lambda: {"bytes": sizes})

    def sizes_by_default(self) -> None:
        """Measures fp32 and w8a8 in the form that a build takes by default, which is not the one compared here."""

        def make() -> dict[str, Any]:
            found = {}
            for recipe in ("fp32", "w8a8"):
                tell(f"{recipe}: size in the default form")
                out = WORK / "bundles" / f"{recipe}-default"
                run_isolated(models.build_recipe, {"recipe": recipe, "out": str(out), "form": None})
                bundle = Bundle.open(out)
                found[recipe] = sum(size_bytes(bundle, a.path) for a in bundle.manifest.artifacts)
            return found

        self._cells.get_or_make(f"size/{DEFAULT_FORM}", {"code": code_sha256()}, make)

    def evaluate(self) -> None:
        """Scores the pictures of the rows that were measured and have no score, in one process."""
        if not self._unscored:
            return
        tell(f"evaluation of {len(self._unscored)} rows")
        pictures = {name: str(path) for name, (path, _) in self._unscored.items()}
        scores = run_isolated(evaluation.evaluate, {"pictures": pictures, "steps": reference.STEPS}).result
        for name, (_, key) in self._unscored.items():
            self._cells.get_or_make(f"evaluation/{name}", key, lambda name=name: scores[name])  # type: ignore[misc]

    def _cell(
        self, stage: str, row: Row, key: dict[str, Any], job: Any, arguments: dict[str, Any], *, again: bool = False
    ) -> None:
        def make() -> dict[str, Any]:
            tell(f"{row.name}: {stage}")
            result: dict[str, Any] = run_isolated(job, arguments).result
            return result

        self._cells.get_or_make(f"{stage}/{row.name}", key, make, again=again or stage in self._again)

    def _bundle(self, row: Row) -> Bundle:
        """Returns a row's bundle, made unless it is there with the same key."""
        if row.recipe == "fp32":
            self._cells.get_or_make(f"make/{row.name}", {"networks": self._networks}, lambda: {"seconds": 0.0})
            return self._reference
        out = WORK / "bundles" / row.name
        if row.recipe is not None:
            key: dict[str, Any] = {"recipe": row.recipe, "code": code_sha256(), "source": self._reference.manifest.name}
            arguments = {"recipe": row.recipe, "out": str(out)}
            self._made(f"make/{row.name}", key, out, lambda: run_isolated(models.build_recipe, arguments).result)
            return Bundle.open(out)
        return self._assembled(row, out)

    def _assembled(self, row: Row, out: Path) -> Bundle:
        assert row.method is not None
        method, made, keys = row.method, {}, {}
        for artifact in self._reference.manifest.artifacts:
            component = artifact.component
            if row.components is not None and component not in row.components:
                continue
            target = WORK / "models" / method.name / f"{component}.onnx"
            key = {
                "network": self._networks[artifact.path],
                "calls": [method.calls, value_sha256(json.loads((self._calls / "key.json").read_text()))],
                "options": dict(method.options),
                "pins": sources_sha256(models.environments.constraints_file(method.environment)),
                "script": sources_sha256(models.PEERS / f"{method.script}.py", models.PEERS / "calls.py"),
            }
            model = self._reference.file(artifact.path)
            calls = self._calls / method.calls / f"{component}.npz"

            def make(component: str = component, model: Path = model, calls: Path = calls, out: Path = target) -> Any:
                tell(f"{method.name}: {component}")
                return models.quantize(method, component, model, calls, out)

            values = self._made(f"make/{method.name}.{component}", key, target, make)
            keys[component], made[component] = values, target
        return models.assemble(self._reference, made, out, row.name)

    def _made(self, name: str, key: dict[str, Any], out: Path, make: Any) -> dict[str, Any]:
        """Returns the cell of something made at ``out``; raises what made it fail, as the cell says."""
        values = self._cells.get_or_make(name, key, make, again=not out.exists())
        if "error" in values:
            raise FewstepError(values["error"])
        return values

    def _recorded(self, job: Any, name: str, prompts: list[str], key: dict[str, Any]) -> Path:
        folder = WORK / name
        stamp = folder / "key.json"
        if not stamp.is_file() or json.loads(stamp.read_text()) != key:
            tell(f"record {name}")
            shutil.rmtree(folder, ignore_errors=True)
            run_isolated(job, {"bundle": str(self._reference.path), "prompts": prompts, "out": str(folder)})
            stamp.write_text(json.dumps(key, indent=1))
        return folder


def size_bytes(bundle: Bundle, artifact: str) -> int:
    """Returns the bytes of an artifact with the weights that lie beside it."""
    files = bundle.manifest.files
    return sum(entry.bytes for path, entry in files.items() if path == artifact or path.startswith(f"{artifact}."))


def write_results() -> None:
    """Writes the tables and the plot of all cells."""
    cells = Cells(RESULTS / "cells")
    listed = rows()
    (RESULTS / "psnr-size.svg").write_text(scatter(points(listed, cells)), encoding="utf-8")
    (RESULTS / "README.md").write_text(markdown(listed, cells, json.loads((RESULTS / "machine.json").read_text())))


def tell(text: str) -> None:
    """Writes a line of progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measures the rows that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quant", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(r.name for r in rows())}; default: all")
    parser.add_argument(
        "--bundle", type=Path, default=Path("build/stickers-step"), help="stickers in fp32 and step form"
    )
    parser.add_argument("--again", action="append", default=[], choices=STAGES, help="measure this again")
    parser.add_argument("--without-evaluation", action="store_true", help="leave retrieval and Frechet for another run")
    parser.add_argument("--table-only", action="store_true", help="write the tables of what has been measured")
    options = parser.parse_args()
    known = {row.name: row for row in rows()}
    if unknown := set(options.rows) - known.keys():
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    if not options.table_only:
        benchmark = Benchmark(options.bundle, set(options.again))
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "machine.json").write_text(json.dumps(describe_machine(), indent=1) + "\n")
        for row in [known[name] for name in options.rows or known]:
            benchmark.measure(row)
            write_results()
        if not options.rows or "w8a8" in options.rows:
            benchmark.sizes_by_default()
        if not options.without_evaluation:
            benchmark.evaluate()
    write_results()


if __name__ == "__main__":
    main()

"""Compiles every network of the zoo's families for a runtime and runs it: docs/coreml-families.md, and the like.

``python -m tests.backends.families litert [FAMILY ...]``, in the runtime's environment. Each family leaves a record in
``build/litert-families``, so that the run goes on where it was interrupted; a family that is named is run again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fewstep.calibration import SampleRequest, record_samples
from fewstep.errors import FewstepError
from fewstep.export import describe, programs_of
from fewstep.numerics.metrics import sqnr_db
from fewstep.recipe.recipe import Limits, Recipe
from fewstep.runtimes import get_runtime
from fewstep.runtimes.base import Runtime
from tests.support import zoo
from tests.support.families import REFUSED, generator_of
from tests.support.zoo.family import Family


@dataclass(frozen=True)
class Network:
    """How one network of a family went: the worst SQNR of its outputs in all recorded calls, or what stopped it."""

    family: str
    component: str
    sqnr_db: float | None
    calls: int
    error: str = ""


def evaluate(family: Family, runtime: Runtime) -> list[Network]:
    """Returns how every network of a family compiles and runs, in fp32 on the calls of one sample."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        generator = generator_of(family, folder / "source")
        steps = family.steps[-1]
        programs = programs_of(generator, describe(generator, [steps]), Recipe("fp32"))
        prompts = generator.prompts[:1] or ("",)
        (request,) = SampleRequest.grid(generator, prompts, range(1), steps, generator.guidance)
        (sample,) = programs.restate(list(record_samples(generator, programs.described, [request])))
        found = []
        for component in programs.components:
            program = programs.make(component)
            calls = [feed for feed in sample.feeds if feed.component == component]
            try:
                path = folder / runtime.compile(program, folder, "fp32").path
                with (runtime.open_exact or runtime.open)(path, program.spec, 1) as session:
                    values = [
                        sqnr_db(feed.outputs[output], result)
                        for feed in calls
                        for output, result in session.run(feed.inputs).items()
                    ]
            except FewstepError as error:
                found.append(Network(family.name, component, None, len(calls), error.message))
                continue
            assert values, f"{family.name}: {component} was never called"
            found.append(Network(family.name, component, min(values), len(calls)))
        return found


def page(runtime: str, families: Iterable[str], networks: Sequence[Network]) -> str:
    """Returns the page of what was run."""
    run = {network.family for network in networks}
    missing = [name for name in families if name not in run]
    limit = Limits().component_sqnr_db
    fine = [network for network in networks if network.sqnr_db is not None and network.sqnr_db >= limit]
    lines = [
        f"# Families of generators on {runtime}",
        "",
        f"Written by `make {runtime}-families`: do not edit. {len(fine)} of {len(networks)} networks of {len(run)} "
        f"families compile and keep {limit:.0f} dB. Each is one of a tiny generator with random weights "
        "(`tests/support/zoo`), run on the calls of one sample, against PyTorch. Figures are the worst of all calls "
        "and outputs.",
        "",
    ]
    if missing:
        lines += [f"Not run: {', '.join(missing)}.", ""]
    lines += ["| family | networks, with SQNR in dB |", "|---|---|"]
    for family in families:
        of_family = [network for network in networks if network.family == family]
        if of_family:
            lines.append(f"| {family} | {', '.join(map(_told, of_family))} |")
    lines += ["", "## What stops the others", ""]
    others = [network for network in networks if network not in fine]
    lines += [f"- {n.family}, {n.component}: {n.error or f'{n.sqnr_db:.0f} dB'}" for n in others] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _told(network: Network) -> str:
    return f"{network.component} " + ("**no**" if network.sqnr_db is None else f"{network.sqnr_db:.0f}")


def main(name: str, *names: str) -> None:
    """Runs the named families, or all that have no record, and prints the page of all records."""
    runtime, results = get_runtime(name), Path(f"build/{name}-families")
    results.mkdir(parents=True, exist_ok=True)
    families = [family for family in zoo.FAMILIES if family.name not in REFUSED]
    networks = []
    for family in families:
        record = results / f"{family.name}.json"
        if family.name in names or not (names or record.is_file()):
            found = evaluate(family, runtime)
            record.write_text(json.dumps([dataclasses.asdict(network) for network in found]), encoding="utf-8")
            sys.stderr.write(f"{family.name}: {', '.join(map(_told, found))}\n")
        if record.is_file():
            networks += [Network(**values) for values in json.loads(record.read_text(encoding="utf-8"))]
    sys.stdout.write(page(name, [family.name for family in families], networks))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What is proved of a bundle beside its networks: the host, the golden pack, the manifest, and the plan's integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.samples import Sample
from fewstep.errors import ContractError
from fewstep.numerics.guidance import read_unconditional
from fewstep.pipeline.bisect import answering
from fewstep.pipeline.references import Live, golden_samples, known_floor
from fewstep.progress import Progress, stage
from fewstep.proof.golden_tokens import compare_golden, token_checks
from fewstep.proof.manifest_ties import contract_ties, golden_ties
from fewstep.recipe.recipe import Limits
from fewstep.runtimes import get_runtime
from fewstep.runtimes.parity.harness import Check, Floor
from fewstep.runtimes.parity.host_arithmetic import host_checks
from fewstep.runtimes.parity.quantized import operation_checks, recorded_floor_checks
from fewstep.runtimes.parity.stored_integers import load_table
from fewstep.runtimes.sampling.sampler import open_tokenizers

if TYPE_CHECKING:
    from fewstep.optimize.quantize import QuantizedPrograms


def recorded_checks(bundle: Bundle, samples: Sequence[Sample]) -> list[Check]:
    """Returns the checks that take no network: how samples were recorded, and what the host makes of them."""
    tokenizers = open_tokenizers(bundle.path, bundle.manifest.tokenizers)
    return [*golden_ties(bundle.manifest, samples), *host_of(bundle, samples), *token_checks(bundle, tokenizers)]


def host_of(bundle: Bundle, samples: Sequence[Sample]) -> list[Check]:
    """Returns the checks of what the host makes of samples, see `fewstep.runtimes.parity.host_arithmetic`."""
    manifest = bundle.manifest
    tokenizers = open_tokenizers(bundle.path, manifest.tokenizers)
    unconditional = read_unconditional(manifest.contract.guidance, bundle.file)
    return host_checks(manifest, tokenizers, samples, manifest.recipe["limits"]["picture_psnr_db"], unconditional)


def source_checks(
    bundle: Bundle, live: Live, limits: Limits, floor: Floor | None
) -> tuple[list[Check], tuple[str, ...]]:
    """Returns the checks of what the source says of contract, golden pack and plan, and what was left out.

    Args:
        bundle: the bundle, at its first shape.
        live: what it is compared with, computed now.
        limits: of float arithmetic.
        floor: what two executions of the network agree to, measured now, where it computes in integers.
    """
    manifest, golden = bundle.manifest, golden_samples(bundle, "")
    checks = [*host_of(bundle, live.recorded), *contract_ties(manifest, live.programs)]
    checks += recorded_checks(bundle, golden)
    pack, compared = compare_golden(golden, live.samples, limits, floor)
    checks += pack
    if live.quantized is not None:
        from fewstep.optimize.quantize import table_checks  # torch: with the source alone

        made = {name: live.quantized.make(name) for name in live.quantized.components}
        checks += table_checks(load_table(bundle) or {}, made)
    if floor is not None:
        checks += recorded_floor_checks(known_floor(bundle), floor, limits)
    left = len(golden) - compared
    note = f"{left} of the golden pack's {len(golden)} samples were not drawn again: give more prompts and seeds"
    return checks, (note,) if left else ()


def compare_operations(
    bundle: Bundle,
    runtime: str,
    components: Sequence[str],
    quantized: QuantizedPrograms,
    sample: Sample,
    progress: Progress,
) -> list[Check]:
    """Returns the checks of every quantized tensor of a sample's calls, with the quantized network at hand."""
    checks: list[Check] = []
    with stage(progress, "compare operations"):
        for component in components:
            made = quantized.make(component)
            for feed in (f for f in sample.feeds if f.component == component):
                program, inputs, variant = answering(bundle.manifest, made, feed.inputs)
                artifact = bundle.manifest.artifact(runtime, component, variant)
                compare = get_runtime(runtime).of(artifact).compare_integers
                if compare is None:
                    raise ContractError(f"{runtime} computes with whole numbers and has nothing to compare them with")
                path = bundle.file(artifact.path)
                checks += operation_checks(component, sample, feed.step, compare(program, path, inputs))
    return checks

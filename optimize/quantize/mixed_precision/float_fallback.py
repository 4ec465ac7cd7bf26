"""Which operations compute in float although the target has whole numbers for them: where 8 bits hurt most.

MixDQ (Zhao et al. 2024, arXiv:2405.17873, section 4.3) shares out 8 and 16 bits for activations by sensitivity. The
targets here have no kernels for 16-bit integers: what is above 8 bits is float, and what it costs are multiplications.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import GraphModule

from fewstep.calibration.observe import Calls
from fewstep.optimize.quantize.mixed_precision.ilp import Item, allocate
from fewstep.optimize.quantize.mixed_precision.sensitivity import measure_activation_noise
from fewstep.optimize.quantize.plan import Grid
from fewstep.optimize.quantize.quantizable_ops import Site


def kept_in_float(
    module: GraphModule, sites: Sequence[Site], grids: Mapping[str, Grid], calls: Calls, budget: int
) -> dict[str, str]:
    """Returns the sites to compute in float for the least noise of the component's output, each with the reason.

    Noise of single operations adds up, so that one integer program over all of them finds the choice.

    Args:
        module: the component's graph in float.
        sites: that could compute in whole numbers.
        grids: of their activations, by the name of the node.
        calls: (step, inputs) of the calls to measure in.
        budget: multiplications of a call that float may take.
    """
    noise = measure_activation_noise(module, sites, grids, calls)
    items = [Item((0, site.macs), (noise[site.name].mean, 0.0)) for site in sites]
    chosen = allocate(items, budget)
    return {site.name: _reason(noise[site.name].sqnr_db) for site, i in zip(sites, chosen, strict=True) if i}


def _reason(sqnr_db: Sequence[float | None]) -> str:
    worst = min((value for value in sqnr_db if value is not None), default=None)
    alone = "nothing" if worst is None else f"{worst:.1f} dB of the output at its worst step"
    return f"among the most sensitive for what they cost: 8-bit activations here alone leave {alone}"

"""Schedules that correct a quantized denoiser's output."""

from __future__ import annotations

from collections.abc import Mapping

from fewstep.bundle.contract import LATENT, LOOP, is_denoiser
from fewstep.bundle.schedule import Schedule
from fewstep.calibration import CalibrationSet
from fewstep.export import Programs
from fewstep.optimize.quantize.apply import quantize
from fewstep.optimize.quantize.plan import QuantPlan
from fewstep.optimize.rounding.output_correction import CorrectionFit
from fewstep.runtimes.pytorch.reference import open_program


def corrected_schedules(programs: Programs, plan: QuantPlan, calls: CalibrationSet) -> Mapping[int, Schedule]:
    """Returns the generator's schedules, that of the calibrated step count with the correction folded in.

    A correction is fitted to the steps that were recorded: tables of other step counts are left as they are.
    """
    fit = CorrectionFit(calls.steps)
    for component, spec in programs.components.items():
        if spec.phase != LOOP or not is_denoiser(component):
            continue
        latent = next(name for name, origin in spec.bindings.items() if origin == LATENT)
        name = spec.outputs[0].name
        with open_program(quantize(programs.make(component), plan.components[component])) as session:
            for sample in calls.samples():
                for feed in (f for f in programs.restate([sample])[0].feeds if f.component == component):
                    assert feed.step is not None
                    quantized = session.run(feed.inputs)[name]
                    fit.add(feed.step, feed.inputs[latent], quantized, feed.outputs[name])
    schedules = dict(programs.described.schedules)
    schedules[calls.steps] = fit.result().applied_to(schedules[calls.steps])
    return schedules

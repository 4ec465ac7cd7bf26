"""Quantization, decided once in the torch graph: sites, the plan, and the graph that follows it."""

from __future__ import annotations

from fewstep.optimize.quantize.apply import quantize
from fewstep.optimize.quantize.corrected_schedules import corrected_schedules
from fewstep.optimize.quantize.integer_table import integer_table, table_checks, write_table
from fewstep.optimize.quantize.plan import ComponentPlan, Grid, QuantPlan
from fewstep.optimize.quantize.planner import make_plan
from fewstep.optimize.quantize.quantizable_ops import Site, find_sites
from fewstep.optimize.quantize.quantized_programs import QuantizedPrograms
from fewstep.optimize.quantize.quantizer import PlanQuantizer

__all__ = [
    "ComponentPlan",
    "Grid",
    "PlanQuantizer",
    "QuantPlan",
    "QuantizedPrograms",
    "Site",
    "corrected_schedules",
    "find_sites",
    "integer_table",
    "make_plan",
    "quantize",
    "table_checks",
    "write_table",
]

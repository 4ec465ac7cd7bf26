"""A program and a plan in, the quantized program out: the reference that every backend is compared with."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fewstep.bundle.contract import STEP
from fewstep.bundle.program import Program
from fewstep.errors import QuantizationError
from fewstep.optimize.quantize.dynamic import find_grids
from fewstep.optimize.quantize.plan import ComponentPlan, network_sha256
from fewstep.optimize.quantize.quantizable_ops import Site, find_sites
from fewstep.optimize.quantize.quantizer import PlanQuantizer
from fewstep.optimize.quantize.split_concat import split_concatenations


def float_graph(program: Program, *, split: bool = False) -> tuple[GraphModule, tuple[Site, ...]]:
    """Returns a program's graph with its parameters as attributes, and its sites.

    ``split`` gives every part of a concatenation a site of its own: see `fewstep.optimize.quantize.split_concat`.

    Raises:
        QuantizationError: the program's weights are not in memory.
    """
    if program.weights is not None:
        raise QuantizationError(
            f"{program.component} is too large to hold in memory, and quantizing needs its values",
            hint="load it with eager=True, or use the recipe fp16",
        )
    module = program.exported.module()
    assert isinstance(module, GraphModule)
    if split:
        split_concatenations(module)
    return module, find_sites(program, module)


def quantize(program: Program, plan: ComponentPlan) -> Program:
    """Returns a program that computes what the plan says, with quantize and dequantize operations in its graph.

    Raises:
        QuantizationError: the plan is for another network.
    """
    module, sites = float_graph(program, split=plan.split)
    if network_sha256(sites) != plan.network:
        known = {site.weight for site in sites}
        stranger = next((name for name in plan.weights if name not in known), None)
        raise QuantizationError(
            f"the plan of {program.component} is for another network"
            + (f": it has no weight {stranger}" if stranger else ""),
            hint="make a plan for this generator",
        )
    nodes = {node.name: node for node in module.graph.nodes}
    find_grids(module, [nodes[site.node] for site in sites if site.name in plan.dynamic])
    example = tuple(node.meta["val"] for node in module.graph.nodes if node.op == "placeholder")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export and torchao warn about their own internals
        logging.disable(logging.WARNING)
        try:
            prepared = prepare_pt2e(module, PlanQuantizer(plan, sites, _step(program, module)))
            converted = convert_pt2e(prepared, fold_quantize=False)
            inputs = tuple(torch.zeros(value.shape, dtype=value.dtype) for value in example)
            exported = torch.export.export(converted, inputs)
        finally:
            logging.disable(logging.NOTSET)
    return replace(program, exported=exported)


def _step(program: Program, module: GraphModule) -> str | None:
    """Returns the name of the node that takes the row of the table of steps, None where none does."""
    placeholders = (node.name for node in module.graph.nodes if node.op == "placeholder")
    named = zip(program.spec.inputs, placeholders, strict=True)
    return next((node for spec, node in named if program.spec.bindings[spec.name] == STEP), None)

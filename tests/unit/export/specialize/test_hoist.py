"""Networks specialized for steps that are known: the same numbers, without the time path."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep
from fewstep.bundle.bundle import write_seal
from fewstep.bundle.program import Program
from fewstep.errors import ContractError
from fewstep.export import describe, load, programs_of, trace
from fewstep.export.specialize.constant_fold import fold, parameter_reader
from fewstep.export.specialize.dependencies import dependence, user_inputs
from fewstep.export.specialize.hoist import Static, specialize
from fewstep.numerics.metrics import psnr_db, sqnr_db
from fewstep.runtimes.pytorch.reference import open_program
from tests.support.bundles import STEPS, built
from tests.support.time_paths import ROWS, SHAPES, Everything, feeds_of, onnx_time_path, program_of


def run_static(static: Static, feeds: Mapping[str, np.ndarray], row: int) -> np.ndarray:
    """Returns what both halves make of a network's inputs."""
    values = dict(feeds) | {"step": np.array([row])}
    for program in (static.conditions, static.step):
        if program is not None:
            with open_program(program) as session:
                values |= session.run({spec.name: values[spec.name] for spec in program.spec.inputs})
    return values["out"]


def worst_db(program: Program, static: Static) -> float:
    """Returns the least SQNR over the rows."""
    names = tuple(spec.name for spec in program.spec.inputs)
    with open_program(program) as session:
        pairs = [
            (session.run(f)["out"], run_static(static, f, i)) for i, f in enumerate(feeds_of(names, r) for r in ROWS)
        ]
    return min(sqnr_db(*pair) for pair in pairs)


def time_path(program: Program) -> list[str]:
    """Returns the operations of a program that depend on the step and not on the latent, but for reads of its row."""
    names = user_inputs(program.exported, tuple(spec.name for spec in program.spec.inputs))
    depends = dependence(program.exported.graph, {node: program.spec.bindings[name] for node, name in names.items()})
    reads = ("index_select", "slice", "reshape", "expand", "unsqueeze", "dropout")
    of_step = {"step", "timestep", "time:r"}
    late = [n for n, found in depends.items() if n.op == "call_function" and "latent" not in found and found & of_step]
    return [str(n.target) for n in late if not str(n.target).startswith(tuple(f"aten.{r}" for r in reads))]


def test_everything_that_is_known_leaves_the_loop() -> None:
    program = program_of(Everything())
    static = specialize(program, ROWS)
    assert worst_db(program, static) >= 120  # the same operations; batching rows reorders sums of 8
    assert time_path(program)  # the query finds what there is
    assert time_path(static.step) == []
    assert [spec.name for spec in static.step.spec.inputs] == [
        "sample",
        "condition_0",
        "condition_1",
        "step_vectors",
        "step",
    ]
    assert static.conditions is not None
    assert static.conditions.spec.bindings == {"prompt": "text_encoder.state", "w": "guidance_embedding"}
    assert static.conditions.spec.phase == "before"
    parameters = {name for name in static.step.exported.state_dict if "weight" in name}
    assert parameters == {"body.weight"}


def test_the_original_is_left_as_it_is() -> None:
    program = program_of(Everything())
    before = str(program.exported.graph), list(program.exported.state_dict)
    specialize(program, ROWS)
    assert (str(program.exported.graph), list(program.exported.state_dict)) == before


class TimeOnly(torch.nn.Module):
    def forward(self, sample: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor]:
        return (sample * t[:, None, None] + torch.nn.functional.silu(t)[:, None, None].expand(1, 6, 8),)


def test_without_a_prompt_there_is_nothing_to_run_before() -> None:
    program = program_of(TimeOnly(), ("sample", "t"))
    static = specialize(program, ROWS)
    assert static.conditions is None
    assert worst_db(program, static) >= 120
    # Of what is only spread over tokens, one number a step is kept.
    assert static.step.exported.state_dict["step_table"].shape == (3, 2)


class InPlace(torch.nn.Module):
    def forward(self, sample: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor]:
        time = torch.sin(t)
        kept = time * 2
        time.add_(1)
        return (sample * time[:, None, None] + kept,)


def test_in_place_operations_are_understood() -> None:
    program = program_of(InPlace(), ("sample", "t"))
    assert worst_db(program, specialize(program, ROWS)) >= 120


def test_token_sequences_that_depend_on_the_step_stay_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.export.specialize.hoist._LARGEST_VECTOR", 7)
    program = program_of(Everything())
    static = specialize(program, ROWS)
    assert worst_db(program, static) >= 120
    assert "step_vectors" not in [spec.name for spec in static.step.spec.inputs]
    assert "w" not in [spec.name for spec in static.step.spec.inputs]  # its projection is fixed for a picture


def test_folding_gives_the_networks_own_bits() -> None:
    program = program_of(Everything())
    graph = program.exported.graph
    names = user_inputs(program.exported, tuple(SHAPES))
    depends = dependence(graph, names)
    late = [n for n in graph.nodes if n.op == "call_function" and depends[n] <= {"t", "r"} and n.users]
    placeholders = {names[n.name]: n for n in graph.nodes if n.name in names}
    given = {placeholders["t"]: torch.tensor([999.0]), placeholders["r"]: torch.tensor([0.5])}
    feeds = {name: torch.zeros(SHAPES[name]) for name in SHAPES} | {
        "t": torch.tensor([999.0]),
        "r": torch.tensor([0.5]),
    }

    class Watch(torch.fx.Interpreter):
        seen: dict[str, torch.Tensor] = {}  # noqa: RUF012

        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            self.seen[n.name] = result
            return result

    Watch(program.exported.module()).run(*feeds.values())
    folded = fold(late, [given], parameter_reader(program))
    assert len(late) > 5
    for node, (value,) in zip(late, folded, strict=True):
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, Watch.seen[node.name]), node


# A network of random operations: each step takes one or two of the values so far.
operation = st.tuples(
    st.sampled_from(["linear", "add", "mul", "silu", "norm", "chunk", "cat"]), st.integers(0, 30), st.integers(0, 30)
)


class Random(torch.nn.Module):
    def __init__(self, operations: list[tuple[str, int, int]]) -> None:
        super().__init__()
        torch.manual_seed(len(operations))
        self.operations = operations
        self.linears = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in operations)

    def forward(
        self, sample: torch.Tensor, t: torch.Tensor, r: torch.Tensor, prompt: torch.Tensor, w: torch.Tensor
    ) -> tuple[torch.Tensor]:
        scale = torch.linspace(0.1, 1, 8)
        values = [
            sample,
            torch.sin(t * scale)[None, None],
            torch.cos(r * scale)[None, None],
            prompt.mean(1, keepdim=True),
            w[None],
        ]
        for (kind, i, j), linear in zip(self.operations, self.linears, strict=True):
            a, b = values[i % len(values)], values[j % len(values)]
            made = {
                "linear": lambda a, b, f: f(a),
                "add": lambda a, b, f: a + b,
                "mul": lambda a, b, f: torch.tanh(a) * b,
                "silu": lambda a, b, f: torch.nn.functional.silu(a),
                "norm": lambda a, b, f: torch.nn.functional.layer_norm(a, (8,)),
                "chunk": lambda a, b, f: torch.cat(a.chunk(2, dim=-1)[::-1], dim=-1),
                "cat": lambda a, b, f: torch.cat([a, b], dim=1).mean(1, keepdim=True),
            }[kind](a, b, linear)
            values.append(made)
        return (torch.stack([value.mean(1) for value in values]).sum(0) + sample,)


@given(st.lists(operation, min_size=1, max_size=12))
@settings(max_examples=15)
def test_any_network_computes_the_same(operations: list[tuple[str, int, int]]) -> None:
    program = program_of(Random(operations))
    static = specialize(program, ROWS)
    assert worst_db(program, static) >= 110  # float32 sums of up to 17 values in another order
    assert time_path(static.step) == []


@functools.cache
def step_form() -> fewstep.Bundle:
    """Returns the bundle of the tiny LCM in step form."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-step-"))
    lcm = built("lcm")
    return fewstep.build(str(lcm.source), out=folder / "b", steps=STEPS, form="step", options=lcm.options)


@pytest.mark.parametrize("steps", STEPS)
def test_both_forms_draw_the_same_picture(steps: int) -> None:
    table = built("lcm").bundle
    assert (table.manifest.contract.form, step_form().manifest.contract.form) == ("table", "step")
    for w in (8.5, 2.0):
        ours, theirs = (b.generate("a cat", 3, steps=steps, guidance=w) for b in (table, step_form()))
        assert psnr_db(theirs.picture_HWC, ours.picture_HWC) >= 100
        assert min(map(sqnr_db, theirs.latents, ours.latents)) >= 100


def test_the_step_form_takes_any_schedule_and_the_table_form_says_what_to_do() -> None:
    unheard = replace(step_form().manifest.schedule(1), timesteps=(777.0,))

    def draw(bundle: fewstep.Bundle) -> object:
        from fewstep.runtimes.sampling.sampler import open_sampler

        sampler = open_sampler(bundle)
        try:
            return sampler("a cat", 0, unheard)
        finally:
            sampler.close()

    assert draw(step_form())
    with pytest.raises(ContractError, match="step 0 of 1 has timestep 777, which is none of the 4 steps") as caught:
        draw(built("lcm").bundle)
    assert "--form step" in str(caught.value.hint)
    with pytest.raises(ContractError, match="no schedule for 3 steps, it has 1, 2, 4") as caught:
        built("lcm").bundle.generate("a cat", steps=3)
    assert "--form step" in str(caught.value.hint)


def test_the_model_of_a_bundle_has_no_time_path() -> None:
    table, step = built("lcm").bundle, step_form()
    path = table.file(table.manifest.artifact("onnxruntime", "denoiser").path)
    assert onnx_time_path(path) == []
    timed = ir.load(step.file(step.manifest.artifact("onnxruntime", "denoiser").path))
    assert "Sin" in {node.op_type for node in timed.graph}
    assert "Sin" not in {node.op_type for node in ir.load(path).graph}


def test_stickers_without_its_time_path() -> None:
    """The built-in generator: every weight of the time path is gone from the loop, and the numbers are the same."""
    generator = load("stickers")
    described = describe(generator, [1, 2, 4, 8])
    programs = programs_of(generator, described, fewstep.Recipe("fp32"))
    original = trace(generator, described.wirings["denoiser"], described.components["denoiser"])
    static = programs.static["denoiser"]
    assert static.conditions is not None
    assert time_path(static.step) == []
    left = [name for name in static.step.exported.state_dict if "time" in name or "attn2.to_k" in name]
    assert left == []
    sizes = [sum(v.numel() for v in p.exported.state_dict.values()) for p in (static.step, static.conditions, original)]
    assert sizes[0] + sizes[1] <= 1.02 * sizes[2]
    random = np.random.default_rng(0)
    feeds = {s.name: random.standard_normal(s.shape).astype(s.dtype) for s in original.spec.inputs}
    names = {spec.name: spec for spec in original.spec.outputs}
    with open_program(original) as session:
        for i, row in enumerate(programs.contract.rows):
            expected = session.run(feeds | {"timestep": np.array([row["timestep"]], np.int64)})
            values = dict(feeds) | {"step": np.array([i])}
            for program in (static.conditions, static.step):
                with open_program(program) as part:
                    values |= part.run({spec.name: values[spec.name] for spec in program.spec.inputs})
            for name in names:
                assert sqnr_db(expected[name], values[name]) >= 100


def test_few_steps_are_a_table_and_many_are_not() -> None:
    generator = load(str(built("lcm").source))
    few, many = describe(generator, [1, 8]), describe(generator, [1, 9])
    assert programs_of(generator, few, fewstep.Recipe("fp32")).contract.form == "table"
    assert programs_of(generator, many, fewstep.Recipe("fp32")).contract.form == "step"
    assert programs_of(generator, many, fewstep.Recipe("", form="table")).contract.form == "table"
    assert len(programs_of(generator, few, fewstep.Recipe("fp32")).contract.rows) == 8  # the first step is shared


def test_older_manifests_are_of_the_step_form(tmp_path: Path) -> None:
    folder = shutil.copytree(step_form().path, tmp_path / "old")
    path = folder / "manifest.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["contract"]["form"], values["contract"]["rows"]
    path.write_text(json.dumps(values), encoding="utf-8")
    write_seal(folder)
    assert fewstep.Bundle.open(folder).manifest.contract.form == "step"

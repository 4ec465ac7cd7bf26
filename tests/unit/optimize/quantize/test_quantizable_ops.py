"""Where a program can be quantized: found by what operations do and depend on, not by their modules' names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.bundle.contract import CONDITIONS, GUIDANCE, LATENT, STEP, TIME, TIMESTEP
from fewstep.errors import QuantizationError
from fewstep.optimize.quantize.apply import float_graph
from fewstep.optimize.quantize.decisions import decide
from fewstep.recipe.quantization import Quantization
from fewstep.recipe.target_profiles import get_profile
from tests.support.networks import network
from tests.support.quantized import program_of, random, sites_of


class _Conditioned(nn.Module):
    """Two layers that see only the time, one that sees time and text, and the ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.anything = nn.Linear(2, 16)
        self.scale = nn.Linear(16, 16)
        self.joint = nn.Linear(16, 16)
        self.text = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        time = self.scale(torch.relu(self.anything(torch.cat([torch.sin(t), torch.cos(t)], dim=-1))))
        joint = self.joint(time + self.text(text))
        x = self.middle(self.first(x) + joint[:, :, None, None])
        result: torch.Tensor = self.last(x)
        return result


@pytest.mark.parametrize("origin", [TIMESTEP, f"{TIME}r"])
def test_time_path_is_found_by_dependence(origin: str) -> None:
    inputs = random(1, 4, 8, 8), random(1, 1), random(1, 8)
    sites = sites_of(program_of(_Conditioned(), *inputs, origins=[LATENT, origin, CONDITIONS]))
    assert [name for name, site in sites.items() if site.on_time_path] == ["anything", "scale"]
    assert sites["joint"].depends == {origin, CONDITIONS}
    # Nothing comes before the layer that reads the text: it is at an end too.
    assert [name for name, site in sites.items() if site.outermost] == ["anything", "text", "first", "last"]


def test_guidance_alone_is_no_time_path() -> None:
    sites = sites_of(program_of(nn.Linear(8, 8), random(1, 8), origins=[GUIDANCE]))
    (site,) = sites.values()
    assert site.of_guidance_scale
    assert not site.on_time_path


def test_the_row_of_a_table_is_no_time_path_of_its_own() -> None:
    """A table form has folded the time path away: what is left reads vectors that are there for every row."""
    inputs = random(1, 4, 8, 8), random(1, 1), random(1, 8)
    sites = sites_of(program_of(_Conditioned(), *inputs, origins=[LATENT, STEP, CONDITIONS]))
    assert not any(site.on_time_path for site in sites.values())


class _Variety(nn.Module):
    """Every operation that has a weight, some read twice or by name of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.wave = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, groups=4, padding=1)
        self.up = nn.ConvTranspose1d(8, 4, 2, stride=2)
        self.twice = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.wave(self.embed(ids).transpose(1, 2)))
        x = torch.relu(self.grouped(x)) + x
        x = self.twice(self.twice(self.up(x)))
        return x @ x.transpose(1, 2)


def test_operations_shapes_and_results() -> None:
    program = program_of(_Variety(), torch.arange(8)[None], origins=[CONDITIONS])
    sites = sites_of(program)
    module, _ = float_graph(program)
    nodes = {node.name: node for node in module.graph.nodes}
    assert {name: site.op for name, site in sites.items()} == {
        "embed": "embedding",
        "wave": "conv1d",
        "grouped": "conv1d",
        "up": "conv_transpose1d",
        "twice": "linear",
        "twice#2": "linear",
    }
    assert sites["twice"].weight == sites["twice#2"].weight == "module.twice.weight"
    assert (sites["grouped"].groups, sites["wave"].groups) == (4, 1)
    assert [sites[n].channel_axis for n in ("embed", "wave", "up", "twice")] == [0, 0, 1, 0]
    assert sites["up"].weight_shape == (8, 4, 2)
    assert (sites["embed"].macs, sites["embed"].parameters) == (0, 60)
    # Each of 4 places of the result is a product of 8 channels with 3 x 6 values.
    assert (sites["wave"].rows, sites["wave"].macs, sites["wave"].unfolded) == (4, 4 * 8 * 18, 4 * 18)
    # A ReLU that alone reads a result is its result: the grid is laid after it.
    assert nodes[sites["grouped"].result].target is torch.ops.aten.relu.default
    assert nodes[sites["wave"].result].target is torch.ops.aten.relu.default, "whoever reads the ReLU"
    assert sites["twice"].result == sites["twice"].node
    assert sites["embed"].bias is None
    assert sites["wave"].bias == "module.wave.bias"


def test_two_readers_see_the_result_before_a_relu() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return torch.relu(y) + y

    sites = sites_of(program_of(Both(), random(1, 2, 4, 4)))
    assert sites["conv"].result == sites["conv"].node


def test_a_linear_layer_that_was_taken_apart() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(random(5, 6)), nn.Parameter(random(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.matmul(x, torch.ops.aten.t(self.weight)) + self.bias

    (site,) = sites_of(program_of(Apart(), random(1, 3, 6))).values()
    assert (site.op, site.weight, site.channel_axis, site.bias, site.rows) == ("matmul", "module.weight", 0, None, 3)
    assert site.reader != site.node

    class Untransposed(Apart):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.matmul(x, self.weight)

    assert sites_of(program_of(Untransposed(), random(1, 3, 5))) == {}


def test_weights_that_the_network_computes_are_no_sites() -> None:
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(random(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight * x.mean())

    assert sites_of(program_of(Modulated(), random(2, 4))) == {}


@pytest.mark.parametrize("name", ["clip", "sd3"])
def test_every_weight_of_a_family_is_a_site(name: str) -> None:
    """The oracle is the list of the modules that PyTorch has."""
    made = network(name)
    method = getattr(made.module, made.part.method)
    keys = [k for k, v in made.arguments.items() if isinstance(v, torch.Tensor)]
    constants = {k: v for k, v in made.arguments.items() if k not in keys}

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made.module

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            result = method(**dict(zip(keys, given, strict=True)), **constants)
            first: torch.Tensor = result[0]
            return first

    program = program_of(Call(), *(made.arguments[k] for k in keys))
    found = {site.weight for site in sites_of(program).values()}
    modules = {n: m for n, m in program.exported.module().named_parameters() if n.endswith("weight") and m.ndim > 1}
    assert found == set(modules)


def test_decisions_and_their_reasons() -> None:
    inputs = random(1, 4, 8, 8), random(1, 1), random(1, 8)
    program = program_of(_Conditioned(), *inputs, origins=[LATENT, TIMESTEP, CONDITIONS])
    _, sites = float_graph(program)
    decisions = {
        d.site.name: d for d in decide(program, sites, Quantization(weights=4, activations=8), get_profile("x86"))
    }
    assert "time path" in str(decisions["scale"].weight_reason)
    assert decisions["scale"].weights == 32
    assert "128 values" in str(decisions["text"].weight_reason)
    assert "64 values" in str(decisions["last"].weight_reason)
    assert decisions["first"].weights == 8, "an end gets 8 bits at least"
    assert decisions["first"].computes, "it is a large part of the products"
    assert (decisions["middle"].weights, decisions["middle"].computes) == (4, True)
    assert "1 row" in str(decisions["joint"].activation_reason)
    assert decisions["joint"].weights == 4
    weight_only = {d.site.name: d for d in decide(program, sites, Quantization(weights=4), get_profile("x86"))}
    assert weight_only["middle"].activation_reason == "the recipe computes in float"


def test_weights_that_are_not_in_memory_are_refused() -> None:
    from dataclasses import replace

    program = replace(program_of(nn.Linear(4, 4), random(1, 4)), weights={})
    with pytest.raises(QuantizationError, match="too large to hold in memory") as caught:
        float_graph(program)
    assert "eager=True" in str(caught.value.hint)

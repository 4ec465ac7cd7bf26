"""Programs cut out of a recording compute what was recorded, for other numbers too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.errors import ExportError
from fewstep.export.record.tape import GlueModule, Tape

Program = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def recorded(program: Program) -> tuple[Tape, torch.Tensor]:
    """Returns the tape of a program of two leaves, ``a`` and ``b`` [2, 3, 4], and its result."""
    a, b = values(0, 2, 3, 4), values(1, 2, 3, 4)
    tape = Tape()
    tape.leaf("a", a)
    tape.leaf("b", b)
    with tape:
        return tape, program(a, b)


def assert_cut_is_the_program(program: Program) -> None:
    tape, result = recorded(program)
    glue = tape.cut([result], what="result")
    other = {"a": values(2, 2, 3, 4), "b": values(3, 2, 3, 4)}
    expected = program(other["a"].clone(), other["b"].clone())
    (found,) = GlueModule(glue)(*(other[name].clone() for name in glue.leaves))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def in_place(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x = a * 2
    before = x + b
    x.add_(b).mul_(0.5)  # `before` saw the version without them
    return before - x


def into_a_constant(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x = torch.ones(2, 3, 4)
    x.add_(a)
    return x * b


def several_results(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    first, _, third = a.chunk(3, dim=1)
    return torch.cat([third, first], dim=1) * b[:, :2]


@pytest.mark.parametrize(
    "program",
    [
        lambda a, b: a + b,
        lambda a, b: a.view(6, 4).permute(1, 0)[1:].reshape(3, 6) @ b.reshape(6, 4),
        lambda a, b: (a * torch.arange(4.0)).softmax(-1) + b.mean(),
        lambda a, b: a.detach() + b.clone().detach(),
        lambda a, b: b,
        in_place,
        into_a_constant,
        several_results,
    ],
    ids=["sum", "views", "constants", "aliases", "leaf", "in place", "into a constant", "several results"],
)
def test_cut(program: Program) -> None:
    assert_cut_is_the_program(program)


def test_leaves_are_those_that_matter() -> None:
    tape, result = recorded(lambda a, b: (a * 2, b * 3)[1])
    glue = tape.cut([result], what="result")
    assert glue.leaves == ("b",)
    assert len(glue.steps) == 1


def test_alias_of_a_leaf_is_the_leaf() -> None:
    tape, result = recorded(lambda a, b: a.detach())
    glue = tape.cut([result], what="result")
    assert (glue.origins, glue.steps) == (("a",), ())


def test_what_varies() -> None:
    tape, result = recorded(lambda a, b: a + 1)
    constant = torch.ones(2)
    assert tape.varies(result)
    assert not tape.varies(constant)
    (found,) = GlueModule(tape.cut([constant], what="constant"))()
    torch.testing.assert_close(found, constant, rtol=0, atol=0)


def test_paused_is_not_recorded() -> None:
    tape = Tape()
    a = values(0, 3)
    tape.leaf("a", a)
    with tape:
        with tape.paused():
            hidden = a * 2
        seen = a * 3
    assert not tape.varies(hidden)
    assert tape.varies(seen)
    assert tape.position == 1


def test_what_was_made_before_a_position_becomes_a_leaf() -> None:
    tape = Tape()
    a = values(0, 3)
    tape.leaf("a", a)
    with tape:
        half = a * 0.5
        position = tape.position
        result = half + a
    glue = tape.cut([result], what="result", since=position)
    assert glue.leaves == ("made.0.0", "a")
    assert tape.tensor("made.0.0") is half
    (found,) = GlueModule(glue)(torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(found, torch.ones(3), rtol=0, atol=0)
    assert tape.cut([result], what="result").leaves == ("a",)  # the name does not stop a cut of the whole


def test_leaf_that_was_made_is_looked_through_if_asked() -> None:
    tape = Tape()
    noise = values(0, 3)
    tape.leaf("noise:0", noise)
    with tape:
        latent = noise * 14.6
        tape.leaf("latent", latent)
        result = latent + 1
    assert tape.cut([result], what="result").leaves == ("latent",)
    assert tape.cut([result], what="result", through="latent").leaves == ("noise:0",)


def test_write_through_a_view_is_refused() -> None:
    def program(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(2, 3, 4)
        x[0] = a[0]
        return x + b

    tape, result = recorded(program)
    with pytest.raises(ExportError, match=r"result depends on a tensor \[2, 3, 4\] that is written to") as caught:
        tape.cut([result], what="result")
    assert caught.value.hint == "compute it without in-place operations"


# Each takes two tensors [2, 3, 4] and returns one.
OPERATIONS: Sequence[Program] = (
    torch.add,
    torch.sub,
    torch.mul,
    torch.maximum,
    lambda x, y: x.clamp(-1, 1),
    lambda x, y: torch.cat([x, y], dim=1)[:, 1:4],
    lambda x, y: x.flip(2).transpose(0, 1).reshape(2, 3, 4),
    lambda x, y: x.view(6, 4).view(2, 3, 4) * 0.5,
    lambda x, y: torch.where(x > y, x, y * 2),
    lambda x, y: x.unbind(1)[2].unsqueeze(1).expand(2, 3, 4) + torch.ones(4),
    lambda x, y: x.clone().mul_(0.5).add_(y),
    lambda x, y: x.detach(),
)


@given(st.lists(st.tuples(*(st.integers(0, n) for n in (len(OPERATIONS) - 1, 99, 99))), min_size=1, max_size=12))
def test_random_programs(lines: list[tuple[int, int, int]]) -> None:
    def program(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        made = [a, b]
        for operation, first, second in lines:
            made.append(OPERATIONS[operation](made[first % len(made)], made[second % len(made)]))
        return made[-1]

    assert_cut_is_the_program(program)

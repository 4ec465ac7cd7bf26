"""The report's account of static steps: what left the networks of the loop when their steps became known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fewstep.report.bought import Account

if TYPE_CHECKING:
    from fewstep.export.specialize.counts import Removed

_COLUMNS = (
    "network", "parameters before", "in every step", "once a picture", "folded", "numbers of the tables",
    "M multiply-adds of a step before", "in every step", "once a picture",
)  # fmt: skip


def removed_of(networks: Mapping[str, Removed]) -> Account | None:
    """Returns the account of the networks by name; None for a bundle whose networks are told the time."""
    if not networks:
        return None
    before, left = (sum(getattr(r, at).parameters for r in networks.values()) for at in ("before", "step"))
    lead = (
        f"A step reads {left:,} of {before:,} parameters ({left / max(1, before):.1%}). What depends on the step alone "
        "is folded into tables; what depends on the prompt, and vectors that depend on both, is computed once a "
        "picture for all steps."
    )
    return Account(lead, _COLUMNS, tuple(_row(name, removed) for name, removed in networks.items()))


def _row(name: str, removed: Removed) -> tuple[str | int | float, ...]:
    before, step, once = removed.before, removed.step, removed.once
    macs = (round(counts.macs / 1e6, 1) for counts in (before, step, once))
    return (
        name, before.parameters, step.parameters, once.parameters, removed.folded, step.tables + once.tables, *macs,
    )  # fmt: skip

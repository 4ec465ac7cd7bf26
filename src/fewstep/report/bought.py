"""The report's account of mixed precision: what the bytes of every weight bought."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_COLUMNS = ("weight", "values", "bits", "scales", "bytes", "least bytes", "picture, dB", "at least bytes, dB")


@dataclass(frozen=True)
class Account:
    """A paragraph, and a table of the weights, those whose extra bytes spared the picture most first."""

    lead: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float, ...], ...]


def bought_of(quality: Mapping[str, Any]) -> Account | None:
    """Returns the account of a plan's ``quality``; None for a plan without mixed precision.

    A weight's dB is the PSNR that pictures would have if it alone were stored so.
    """
    if not quality:
        return None
    rows = sorted(quality["weights"], key=_spared, reverse=True)
    lead = (
        f"{quality['weight_bytes']:,} bytes of weights, {quality['bits']:g} bits each with their scales, of "
        f"{quality['budget_bytes']:,} allowed; {quality['other_bytes']:,} bytes for what is no quantized weight. "
        f"From each weight alone, pictures are expected at {_db(quality['expected_psnr_db'])} dB."
    )
    return Account(lead, _COLUMNS, tuple(_row(row) for row in rows))


def _row(row: Mapping[str, Any]) -> tuple[str | int | float, ...]:
    least, chosen = row["options"][0], row["options"][row["chosen"]]
    return (
        f"{row['component']}: {row['site']}",
        row["parameters"],
        chosen["bits"],
        chosen["scales"],
        chosen["bytes"],
        least["bytes"],
        _db(chosen["picture_psnr_db"]),
        _db(least["picture_psnr_db"]),
    )


def _db(value: float | None) -> str | float:
    return "exact" if value is None else value


def _spared(row: Mapping[str, Any]) -> float:
    """Returns the square error of the picture that a weight's extra bytes avoid."""
    least, chosen = row["options"][0], row["options"][row["chosen"]]
    return _error(least["picture_psnr_db"]) - _error(chosen["picture_psnr_db"])


def _error(psnr_db: float | None) -> float:
    return 0.0 if psnr_db is None else float(10 ** (-psnr_db / 10))

"""What a recipe says of quantization: bits, grids, rounding and calibration, with overrides by operation and by name.

A recipe's ``[quantization]`` table::

    [quantization]
    weights = 8                 # bits of weights: 8, 4 or 2; 32 keeps them in float
    activations = 8             # bits of activations: 8; 32 computes in float (weight-only)
    dynamic = false             # each call puts activations onto grids of its own: the range of each row of their data
    granularity = "channel"     # scales of weights: tensor | channel | group
    group_size = 32             # input channels that share a scale, for group
    rounding = "gptq"           # nearest | gptq | adaround
    ranges = "mse"              # how ranges are chosen: minmax percentile mse lp kl cosine l1 ema
    step_grids = "shared"       # activations of the loop: one grid for all steps, or "grouped", or one for "each"
    profile = "x86"             # what the target computes well: see target_profiles; some targets bring theirs
    sampler = "own"             # which network calls calibrate: see fewstep.calibration.samplers
    samples = 32                # prompts (or noise seeds) to calibrate with
    split = true                # each part of a concatenation gets a grid of its own
    exact_time = true           # the time path stays in float, where the form leaves it in the networks
    protect = true              # what depends on the prompt alone computes in float: its first token is an outlier
    float_products = 0.0        # share of multiplications in float, where 8 bits of activations hurt most
    correction = false          # the schedule corrects each step's output, in closed form
    bits = 5.0                  # mixed precision: bits a weight takes in the mean, scales included, by sensitivity
    max_bytes = 12_000_000      # or: bytes that all components take together

    [quantization.ops.linear]   # overrides for an operation: conv2d, linear, embedding, ...
    granularity = "group"
    weights = 4

    [quantization.names."denoiser/conv_*"]  # overrides for sites by name, shell pattern; the last match wins
    activations = 32
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from fewstep.errors import RecipeError
from fewstep.recipe.target_profiles import PROFILES, REQUIRED

FLOAT_BITS = 32
MAX_INTEGER = 1 << 53
WEIGHT_BITS = (2, 4, 8, FLOAT_BITS)
ACTIVATION_BITS = (8, FLOAT_BITS)
GRANULARITIES = ("tensor", "channel", "group")
ROUNDINGS = ("nearest", "gptq", "adaround")
RANGES = ("minmax", "percentile", "mse", "lp", "kl", "cosine", "l1", "ema")
STEP_GRIDS = ("shared", "grouped", "each")
SAMPLERS = ("own", "uniform", "ndtc", "tdac", "single", "qsample", "first", "random")

_CHOICES: Mapping[str, Collection[object]] = {
    "weights": WEIGHT_BITS,
    "activations": ACTIVATION_BITS,
    "granularity": GRANULARITIES,
    "rounding": ROUNDINGS,
    "ranges": RANGES,
    "step_grids": STEP_GRIDS,
    "sampler": SAMPLERS,
    "profile": tuple(PROFILES),
}


@dataclass(frozen=True)
class SiteChoice:
    """What an override may say of a site; None leaves it as the level above has it."""

    weights: int | None = None
    activations: int | None = None
    dynamic: bool | None = None
    granularity: str | None = None
    group_size: int | None = None
    rounding: str | None = None
    ranges: str | None = None


@dataclass(frozen=True)
class Quantization:
    """How a recipe quantizes. See the module's text for the keys."""

    weights: int = 8
    activations: int = FLOAT_BITS
    dynamic: bool = False
    """Whether each call puts the rows of its activations onto grids of their own, in place of calibrated ones."""
    granularity: str = "channel"
    group_size: int = 32
    rounding: str = "gptq"
    ranges: str = "mse"
    step_grids: str = "shared"
    """Whether steps share the grid of an activation: see `fewstep.optimize.quantize.per_step_qparams`."""
    profile: str = "x86"
    sampler: str = "own"
    samples: int = 32
    seed: int = 0
    exact_time: bool = True
    """Whether the time path, where it is left in the networks, stays in float."""
    protect: bool = True
    """Whether what depends on the prompt alone computes in float (MixDQ's outlier token)."""
    float_products: float = 0.0
    """Share of a component's multiplications that compute in float where whole numbers hurt its output most."""
    correction: bool = False
    """Whether the schedule carries a closed-form correction of the quantized network's output."""
    bits: float | None = None
    max_bytes: int | None = None
    """Largest size of all components together; like ``bits``, it asks for mixed precision."""
    split: bool = True
    """Whether each part of a concatenation that is multiplied gets a grid of its own."""
    ops: Mapping[str, SiteChoice] = field(default_factory=dict)
    names: Mapping[str, SiteChoice] = field(default_factory=dict)

    @property
    def mixed(self) -> bool:
        """Whether bits differ from site to site by sensitivity."""
        return self.bits is not None or self.max_bytes is not None

    def at(self, op: str, name: str) -> Quantization:
        """Returns the choices for one site: these, overridden by its operation, then by every pattern it matches."""
        found = self
        patterns = [choice for pattern, choice in self.names.items() if fnmatchcase(name, pattern)]
        for choice in [self.ops.get(op), *patterns]:
            if choice is not None:
                given = {k: v for k, v in dataclasses.asdict(choice).items() if v is not None}
                found = dataclasses.replace(found, **given)
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns the choices as JSON-ready values; `parse_quantization` gives them back."""
        return dataclasses.asdict(self)


def parse_quantization(values: object, where: str, base: Quantization | None = None) -> Quantization:
    """Returns the quantization that a recipe's table describes, over ``base`` for what it leaves out.

    Raises:
        RecipeError: an unknown key, a wrong type, or a value that is none of the choices.
    """
    table = _table(values, where)
    known = [f.name for f in dataclasses.fields(Quantization)]
    refuse_unknown(table, known, where)
    given: dict[str, Any] = {}
    for key, value in table.items():
        if key in ("ops", "names"):
            given[key] = {
                str(name): _site_choice(choice, f"{where}: {key}.{name}")
                for name, choice in _table(value, f"{where}: {key}").items()
            }
        else:
            given[key] = _value(key, value, f"{where}: {key}")
    found = dataclasses.replace(base or Quantization(), **given)
    if found.bits is not None and found.max_bytes is not None:
        raise RecipeError(f"{where} has both bits and max_bytes, expected one budget", hint="remove one of them")
    if found.step_grids != "shared" and found.sampler == "single":
        raise RecipeError(
            f"{where}: step_grids is {found.step_grids!r} and the sampler records a single step",
            hint="choose the sampler own, or shared grids",
        )
    if found.dynamic and found.activations == FLOAT_BITS:
        raise RecipeError(
            f"{where}: dynamic is true and activations are in float, expected activations of 8 bits",
            hint="add activations = 8, or leave dynamic out",
        )
    if found.dynamic and (found.step_grids != "shared" or found.float_products > 0):
        key = "step_grids" if found.step_grids != "shared" else "float_products"
        raise RecipeError(
            f"{where}: dynamic is true and {key} is given, which chooses among calibrated grids",
            hint=f"leave {key} or dynamic out",
        )
    _check_storable(found, where)
    return found


def _check_storable(quantization: Quantization, where: str) -> None:
    """Raises RecipeError for bits of weights that the profile's target would store in more, without a word."""
    stored = PROFILES[quantization.profile].weight_bits
    overrides = {"ops": quantization.ops, "names": quantization.names}
    chosen = {"weights": quantization.weights} | {
        f"{level}.{name}.weights": choice.weights or FLOAT_BITS
        for level, choices in overrides.items()
        for name, choice in choices.items()
    }
    for key, bits in chosen.items():
        if bits not in (*stored, FLOAT_BITS):
            raise RecipeError(
                f"{where}: {key} is {bits}, but targets of profile {quantization.profile} store weights in "
                f"{' or '.join(map(str, stored))} bits",
                hint="for coreml, palettes go down to 2 bits: --recipe palette2",
            )


def parse_size(text: str, where: str) -> int:
    """Returns the bytes of a size such as ``12MB`` or ``11.5MiB``.

    Raises:
        RecipeError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?i?B)", text.strip())
    if match is None or match[2] == "iB" or float(match[1]) == 0:
        raise RecipeError(f"{where} is {text!r}, expected a size", hint="for example 12MB (of 10^6 bytes) or 11.5MiB")
    unit = 1024 if "i" in match[2] else 1000
    return int(float(match[1]) * unit ** " kMG".index(match[2][0] if len(match[2]) > 1 else " "))


def with_budget(
    quantization: Quantization | None, where: str, *, bits: float | None, max_bytes: int | None
) -> Quantization | None:
    """Returns the choices with another budget for mixed precision; as they are if none is given.

    Raises:
        RecipeError: the recipe is not of mixed precision, or there are two budgets or impossible ones.
    """
    given = {key: value for key, value in (("bits", bits), ("max_bytes", max_bytes)) if value is not None}
    if not given:
        return quantization
    if quantization is None or not quantization.mixed:
        raise RecipeError(
            f"{where} gives every weight the same bits, and a budget is for mixed precision",
            hint="use --recipe mixed, or add bits or max_bytes to the recipe's [quantization]",
        )
    return parse_quantization(given, "the command line", dataclasses.replace(quantization, bits=None, max_bytes=None))


def for_targets(quantization: Quantization | None, targets: Collection[str]) -> Quantization | None:
    """Returns the choices with the profile that the targets need, where one of them runs graphs of one profile only.

    Raises:
        RecipeError: the recipe names another profile, or other targets would have to run the same plan.
    """
    needs = {target: REQUIRED[target] for target in targets if target in REQUIRED}
    if quantization is None:
        return None
    _check_dynamic(quantization, targets)
    if not needs:
        return quantization
    target, profile = next(iter(needs.items()))
    if quantization.step_grids != "shared" and not PROFILES[profile].step_grids:
        raise RecipeError(
            f"step_grids is {quantization.step_grids!r}, and {target} has one grid for a tensor",
            hint="leave step_grids out of the recipe, or build for onnxruntime",
        )
    if set(needs.values()) == {quantization.profile}:
        return quantization
    if quantization.profile != Quantization.profile:
        raise RecipeError(
            f"the recipe's profile is {quantization.profile!r}, and {target} runs graphs of {profile!r} only",
            hint="leave the profile out of the recipe",
        )
    if len(set(targets)) > 1:
        raise RecipeError(
            f"{target} takes a plan of the profile {profile!r}, and a bundle has one plan for all of its targets",
            hint=f"build one bundle for each target, or write profile = {profile!r} into the recipe for all of them",
        )
    if not PROFILES[profile].weight_only and quantization.activations == FLOAT_BITS:
        raise RecipeError(
            f"the recipe computes in float with stored whole numbers, and {target} can only multiply those",
            hint="use w8a8, or fp32; litert runs recipes that quantize weights only",
        )
    return dataclasses.replace(quantization, profile=profile)


def _check_dynamic(quantization: Quantization, targets: Collection[str]) -> None:
    """Raises RecipeError for grids of each call and a target that has no kernels which find them."""
    choices: list[Quantization | SiteChoice] = [quantization, *quantization.ops.values(), *quantization.names.values()]
    if not any(choice.dynamic for choice in choices):
        return
    able = [name for name, profile in REQUIRED.items() if PROFILES[profile].dynamic]
    for target in targets:
        if target not in able:
            raise RecipeError(
                f"the recipe puts activations onto grids of each call, and fewstep has no such kernels for {target}",
                hint=f"use w8a8, whose grids are calibrated, or build for {' or '.join(able)}",
            )


def refuse_unknown(values: Mapping[str, object], known: Collection[str], where: str) -> None:
    """Raises RecipeError for the first key that is none of the known ones, with what it may have been meant as."""
    for key in values:
        if key not in known:
            hint = suggestion(key, known) or f"known keys: {', '.join(known)}"
            raise RecipeError(f"{where}: unknown key {key!r}", hint=hint)


def suggestion(word: str, known: Collection[str]) -> str | None:
    """Returns a hint that names the known word most like an unknown one, None where none is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else None


def _site_choice(values: object, where: str) -> SiteChoice:
    table = _table(values, where)
    refuse_unknown(table, [f.name for f in dataclasses.fields(SiteChoice)], where)
    given: dict[str, Any] = {key: _value(key, value, f"{where}.{key}") for key, value in table.items()}
    return SiteChoice(**given)


def _table(values: object, where: str) -> Mapping[str, object]:
    if not isinstance(values, Mapping):
        raise RecipeError(
            f"{where} is {values!r}, expected a table", hint="write it in [brackets] on a line of its own"
        )
    return values


def _value(key: str, value: object, where: str) -> object:
    if key in _CHOICES:
        if isinstance(value, (bool, float)) or value not in _CHOICES[key]:
            choices = ", ".join(str(choice) for choice in _CHOICES[key])
            raise RecipeError(f"{where} is {value!r}, expected one of {choices}", hint="edit the recipe")
        return value
    if key in ("split", "exact_time", "protect", "correction", "dynamic"):
        if not isinstance(value, bool):
            raise RecipeError(f"{where} is {value!r}, expected true or false", hint="edit the recipe")
        return value
    if key == "bits":
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 2 <= value <= 8):
            return None if value is None else float(value)
        raise RecipeError(f"{where} is {value!r}, expected a number from 2 to 8", hint="the average bits of a weight")
    if key == "float_products":
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
            return float(value)
        raise RecipeError(f"{where} is {value!r}, expected a share from 0 to 1", hint="0.05 is a twentieth")
    if key == "max_bytes" and value is None:
        return None
    least = 0 if key == "seed" else 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < MAX_INTEGER:
        expected = "a whole number from 0" if least == 0 else "a whole number above 0"
        raise RecipeError(f"{where} is {value!r}, expected {expected}", hint="edit the recipe")
    return value

"""What to do to a generator: precision, step counts and the limits that a build must keep.

A recipe is a preset (``fp32 fp16 w8 w8a8 w8a8-dynamic w4 w4a8 mixed``, ``palette8`` to ``palette2``,
``palette-mixed``) or a file of TOML::

    base = "w8a8"               # the preset that it starts from; fp32 unless named
    weights = "fp16"            # fp32 | fp16: what is not quantized
    steps = [1, 2, 4]           # step counts whose schedules the bundle carries
    form = "table"              # step (any step count) | table (the listed ones, faster) | specialized (a graph
                                # for each of their steps on one set of weights); see docs/static.md
    row_graphs = "mapped"       # how a device holds specialized graphs: all open on weights that are mapped into memory
                                # once | packed, a copy each, faster | one open at a time
    palette = 6                 # Core ML: weights as indices of 1, 2, 3, 4, 6 or 8 bits into palettes of halves
    palette_choices = {"denoiser/conv_in.weight" = 8}  # bits of single weights
    palette_mean_bits = 4.5     # Core ML: bits of every palette chosen by sensitivity, so many in the mean
    sparsity = 0.5              # Core ML: share of each weight's values that become zero
    guidance = 3.0              # guidance scale that samples use unless told otherwise
    loras = ["lcm.safetensors=0.8"]  # FILE or FILE=SCALE, merged into the weights
    decoder = "taesd"           # folder of another decoder; paths are relative to the recipe's folder
    shape = "512x512,512x768"   # heights and widths of the pictures, in pixels; the first is the default
    decoder_tile = 256          # decode in overlapping tiles of so many pixels to a side
    batch = 4                   # draw so many pictures at once too, on the same weights
    image_output = true         # Core ML: the decoder gives an image of 8 bits instead of an array
    inputs = ["image"]          # images that the pipeline can do without and that the bundle takes

    [options]                   # further arguments of every call of the pipeline, by their names there
    strength = 0.5

    [limits]
    component_sqnr_db = 100.0   # lowering: the artifact against the network it was compiled from
    picture_psnr_db = 80.0      # lowering: the final picture
    compression_psnr_db = 45.0  # compression: that network's picture against the original's

and a ``[quantization]`` table: see `fewstep.recipe.quantization`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.bundle.source import Lora, SourceSpec
from fewstep.errors import RecipeError, SourceError
from fewstep.recipe import call_options
from fewstep.recipe.quantization import Quantization, parse_quantization, refuse_unknown, suggestion
from fewstep.strict import parse_toml, read_file

WEIGHTS = ("fp32", "fp16")
FORMS = ("step", "table", "specialized")
ROW_GRAPHS = ("mapped", "packed", "one")
PALETTE_BITS = (1, 2, 3, 4, 6, 8)
MAX_STEPS = 64
# Far beyond what a build can do: such values are slips, and some of them would ask for memory that no machine has.
MAX_BATCH, MAX_TILE, MAX_NUMBER, MAX_TEXT = 4_096, 65_536, 1e9, 1_000
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The least that a build must reach, in dB.

    Lowering in fp32 keeps 100 dB a component: kernels sum in another order, which costs about 1e-6 of the signal
    (120 dB) in networks of this depth, so 100 dB leaves an order of magnitude for long reductions and none for a
    wrong op. A picture is the sum of several calls, and 80 dB is far below one 8-bit level (59 dB).
    """

    component_sqnr_db: float = 100.0
    picture_psnr_db: float = 80.0
    compression_psnr_db: float = 80.0


@dataclass(frozen=True)
class Recipe:
    """A named set of decisions; ``None`` leaves the choice to the generator."""

    name: str
    weights: str = "fp32"
    steps: tuple[int, ...] | None = None
    guidance: float | None = None
    loras: tuple[Lora, ...] = ()
    decoder: str | None = None
    shape: tuple[tuple[int, int], ...] = ()
    """Heights and widths of the pictures, in pixels; empty: the generator's own."""
    decoder_tile: int | None = None
    """Decode in overlapping tiles of this many pixels to a side."""
    batch: int | None = None
    """How many pictures the bundle can draw at once, beside one."""
    quantization: Quantization | None = None
    palette: int | None = None
    """Bits of an index into a weight's palette, one of `PALETTE_BITS`; Core ML stores them so."""
    palette_choices: Mapping[str, int] = field(default_factory=dict)
    """Bits of single weights, by ``component/parameter``."""
    palette_mean_bits: float | None = None
    """Bits of an index in the mean over all values, shared out by sensitivity into ``palette_choices``."""
    sparsity: float | None = None
    """Share of each large weight's values that become zero; Core ML stores the places of the others."""
    form: str | None = None
    """What the networks of the loop are compiled for: see `fewstep.export.programs`."""
    row_graphs: str = "mapped"
    """How runtimes hold the graphs of the specialized form, one of `ROW_GRAPHS`."""
    image_output: bool = False
    """Whether the decoder gives an image of 8 bits, for runtimes that have such outputs."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of every call of the pipeline."""
    inputs: tuple[str, ...] = ()
    """Images that the pipeline can do without and that the bundle takes."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Refuses what is not compiled together.

        Quantized operations cannot be compared with PyTorch in tiles, shapes or batches yet; a graph for each step of
        each shape or batch would be too many. An image is one whole picture, and 8 bits are no match for fp32's limits.
        """
        further = {
            "decoder_tile": self.decoder_tile is not None,
            "several shapes": len(self.shape) > 1,
            "batch": self.batch is not None,
        }
        for what in ("several shapes", "batch"):
            if self.form == "specialized" and further[what]:
                raise RecipeError(
                    f"{self.name}: {what} and the form specialized are both given, expected one of them",
                    hint="build with --form table, whose graph is the same in every step",
                )
        for what, given in further.items():
            if self.quantization is not None and given:
                raise RecipeError(
                    f"{self.name}: {what} and quantization are both given, expected one of them",
                    hint="build without quantization, or without the other",
                )

        for what in ("decoder_tile", "batch"):
            if self.image_output and further[what]:
                raise RecipeError(
                    f"{self.name}: {what} and image_output are both given, expected one of them",
                    hint="build without image_output",
                )
        if self.image_output and self.weights == "fp32":
            raise RecipeError(
                f"{self.name}: image_output with fp32 weights, whose pictures must agree closer than 8 bits can",
                hint="take a recipe that computes in fp16, such as fp16 or palette6",
            )
        if self.palette_mean_bits is not None and self.sparsity is not None:
            raise RecipeError(
                f"{self.name}: palette_mean_bits and sparsity are both given, expected one of them",
                hint="give a sparse generator one palette",
            )

    @property
    def whole(self) -> bool:
        """Whether the recipe looks at all values of a weight, which must then be in memory."""
        return self.quantization is not None or self.palette is not None or self.sparsity is not None

    @property
    def adapters(self) -> SourceSpec:
        """What the recipe lays over a source that names nothing else."""
        return SourceSpec("", self.loras, self.decoder, options=self.options, inputs=self.inputs)

    def to_json(self) -> dict[str, object]:
        """Returns the recipe as JSON-ready values."""
        values = dataclasses.asdict(self)
        values["steps"] = None if self.steps is None else list(self.steps)
        values["loras"] = list(self.loras)
        values["inputs"] = list(self.inputs)
        values["shape"] = [list(size) for size in self.shape]
        return values


def _quantized(name: str, compression_psnr_db: float, **choices: Any) -> Recipe:
    return Recipe(
        name,
        weights="fp16",  # what stays in float: norms, biases, the time path
        quantization=Quantization(**choices),
        limits=Limits(component_sqnr_db=80.0, picture_psnr_db=60.0, compression_psnr_db=compression_psnr_db),
    )


# fp16 weights are exact in fp32 arithmetic, so lowering keeps fp32's limits; rounding them once costs 2^-11 of each
# weight, which few-step samplers turn into roughly 50 dB of picture PSNR.
#
# Quantized weights are dequantized in fp32: w = scale * q is computed in one order by PyTorch and may be folded into
# the product by a kernel, so lowering keeps 80 and 60 dB. With quantized activations those two do not apply: see
# `fewstep.runtimes.parity.quantized`. The compression limits are the least at which a picture is still the same
# picture: 30 dB is a change that one must look for, 20 dB one that is seen beside the original.
PRESETS = {
    "fp32": Recipe("fp32"),
    "fp16": Recipe("fp16", weights="fp16", limits=Limits(compression_psnr_db=40.0)),
    "w8": _quantized("w8", 30.0),
    "w8a8": _quantized("w8a8", 30.0, activations=8),
    "w8a8-dynamic": _quantized("w8a8-dynamic", 30.0, activations=8, dynamic=True),
    "w4": _quantized("w4", 20.0, weights=4, granularity="group"),
    "w4a8": _quantized("w4a8", 20.0, weights=4, activations=8),
    "mixed": _quantized("mixed", 20.0, bits=5.0, granularity="group"),
    # Palettes are halves and stored without loss, so lowering keeps what fp16 keeps.
    **{
        f"palette{bits}": Recipe(
            f"palette{bits}", weights="fp16", palette=bits, limits=Limits(compression_psnr_db=compression_psnr_db)
        )
        for bits, compression_psnr_db in ((8, 30.0), (6, 25.0), (4, 15.0), (2, 5.0))
    },
    "palette-mixed": Recipe(
        "palette-mixed", weights="fp16", palette=4, palette_mean_bits=4.5, limits=Limits(compression_psnr_db=15.0)
    ),
}


def load_recipe(name_or_path: str) -> Recipe:
    """Returns a preset by name or the recipe of a TOML file.

    Raises:
        RecipeError: unknown preset or key, wrong type or value.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path)
    if path.suffix != ".toml":
        raise RecipeError(
            f"unknown recipe {name_or_path!r}, expected one of {', '.join(PRESETS)} or a .toml file",
            hint=suggestion(name_or_path, PRESETS) or "see `fewstep build --help`",
        )
    hint = "see the recipe page of the guide"
    try:
        content = read_file(path, _MOST_BYTES, error=RecipeError, hint=hint)
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}", hint="check the path") from error
    values = parse_toml(content, str(path), error=RecipeError, hint=hint)
    return parse_recipe(values, where=str(path), name=path.stem, folder=path.parent)


def parse_recipe(values: Mapping[str, object], *, where: str, name: str, folder: Path = Path()) -> Recipe:
    """Returns the recipe that a parsed TOML file describes; its paths are relative to ``folder``."""
    known = [*(f.name for f in dataclasses.fields(Recipe)), "base"]
    refuse_unknown(values, known, where)
    weights = values.get("weights", "fp32")
    if weights not in WEIGHTS:
        raise RecipeError(
            f"{where}: weights is {weights!r}, expected one of {', '.join(WEIGHTS)}", hint="edit the recipe"
        )
    base_name = values.get("base", "w8" if "quantization" in values else weights)
    if not isinstance(base_name, str) or base_name not in PRESETS:
        raise RecipeError(
            f"{where}: base is {base_name!r}, expected one of {', '.join(PRESETS)}",
            hint=suggestion(str(base_name), PRESETS) or "edit the recipe",
        )
    base = PRESETS[str(base_name)]
    quantization = base.quantization
    if "quantization" in values:
        quantization = parse_quantization(values["quantization"], f"{where}: [quantization]", quantization)
    limits = values.get("limits", {})
    if not isinstance(limits, Mapping):
        raise RecipeError(
            f"{where}: limits is {limits!r}, expected a table", hint="write [limits] on a line of its own"
        )
    refuse_unknown(limits, [f.name for f in dataclasses.fields(Limits)], f"{where}: [limits]")
    numbers = {key: _number(value, f"{where}: limits.{key}") for key, value in limits.items()}
    return Recipe(
        name=_text(values.get("name", name), f"{where}: name"),
        weights=str(values.get("weights", base.weights)),
        steps=_steps(values.get("steps"), where),
        guidance=None if values.get("guidance") is None else _number(values["guidance"], f"{where}: guidance"),
        loras=_loras(values.get("loras", []), where, folder),
        decoder=None if values.get("decoder") is None else _path(values["decoder"], f"{where}: decoder", folder),
        shape=()
        if values.get("shape") is None
        else parse_shapes(_text(values["shape"], f"{where}: shape"), f"{where}: shape"),
        decoder_tile=_tile(values.get("decoder_tile"), where),
        batch=None if values.get("batch") is None else check_batch(values["batch"], f"{where}: batch"),
        quantization=quantization,
        palette=_palette(values.get("palette", base.palette), f"{where}: palette"),
        palette_choices=_palette_choices(values.get("palette_choices", {}), f"{where}: palette_choices"),
        palette_mean_bits=_within(
            values.get("palette_mean_bits", base.palette_mean_bits), f"{where}: palette_mean_bits", 1, 8
        ),
        sparsity=_within(values.get("sparsity", base.sparsity), f"{where}: sparsity", 0.01, 0.99),
        form=None if values.get("form") is None else check_form(values["form"], f"{where}: form"),
        image_output=_flag(values.get("image_output", base.image_output), f"{where}: image_output"),
        row_graphs=_one_of(ROW_GRAPHS, values.get("row_graphs", "mapped"), f"{where}: row_graphs"),
        options=_options(values.get("options", {}), f"{where}: [options]"),
        inputs=_names(values.get("inputs", []), f"{where}: inputs"),
        limits=dataclasses.replace(base.limits, **numbers),
    )


def parse_shapes(text: str, where: str) -> tuple[tuple[int, int], ...]:
    """Returns the heights and widths of a text such as ``512x512,512x768``, in its order and each once."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", part.strip())
        if match is None:
            raise RecipeError(
                f"{where} is {text!r}, expected HEIGHTxWIDTH, or several with commas between them",
                hint="for example 512x768, in pixels, of five digits at most",
            )
        found.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(found))


def check_batch(batch: object, where: str) -> int:
    """Returns the number of pictures of a batch; refuses what is none."""
    if isinstance(batch, bool) or not isinstance(batch, int) or not 2 <= batch <= MAX_BATCH:
        raise RecipeError(
            f"{where} is {batch!r}, expected a whole number from 2 to {MAX_BATCH}",
            hint="one picture at a time needs no batch",
        )
    return batch


def check_form(form: object, where: str) -> str:
    """Returns the form; refuses others."""
    if form not in FORMS:
        raise RecipeError(
            f"{where} is {form!r}, expected one of {', '.join(FORMS)}",
            hint=suggestion(str(form), FORMS) or "leave it out: few steps are compiled as a table",
        )
    return str(form)


def check_steps(steps: Collection[object], where: str) -> tuple[int, ...]:
    """Returns the step counts in order, each once; refuses counts that are not few."""
    counts = []
    for count in steps:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_STEPS:
            raise RecipeError(
                f"{where}: {count!r} is not a step count, expected a whole number from 1 to {MAX_STEPS}",
                hint="few-step generators take 1 to 8",
            )
        counts.append(count)
    return tuple(sorted(set(counts)))


def _one_of(choices: Collection[str], value: object, where: str) -> str:
    if value not in choices:
        raise RecipeError(f"{where} is {value!r}, expected one of {', '.join(choices)}", hint="edit the recipe")
    return str(value)


def _palette(value: object, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value not in PALETTE_BITS):
        bits = ", ".join(str(b) for b in PALETTE_BITS)
        raise RecipeError(f"{where} is {value!r}, expected one of {bits}", hint="edit the recipe")
    return value if isinstance(value, int) else None


def _palette_choices(value: object, where: str) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} is {value!r}, expected a table", hint='"component/parameter" = bits')
    return {str(name): _palette(bits, f"{where}: {name}") or 0 for name, bits in value.items()}


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"{where} is {value!r}, expected true or false", hint="edit the recipe")
    return value


def _within(value: object, where: str, least: float, most: float) -> float | None:
    if value is None:
        return None
    number = _number(value, where)
    if not least <= number <= most:
        raise RecipeError(
            f"{where} is {number:g}, expected a number from {least:g} to {most:g}", hint="edit the recipe"
        )
    return number


def _steps(value: object, where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where}: steps is {value!r}, expected a list such as [1, 2, 4]", hint="edit the recipe")
    return check_steps(value, f"{where}: steps")


def _tile(value: object, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TILE):
        raise RecipeError(
            f"{where}: decoder_tile is {value!r}, expected a number of pixels", hint="for example decoder_tile = 256"
        )
    return value


def _loras(value: object, where: str, folder: Path) -> tuple[Lora, ...]:
    if not isinstance(value, list):
        raise RecipeError(
            f"{where}: loras is {value!r}, expected a list such as ['lcm.safetensors=0.8']", hint="edit the recipe"
        )
    try:
        return tuple(Lora.of(_path(item, f"{where}: loras", folder)) for item in value)
    except SourceError as error:
        raise RecipeError(f"{where}: {error.message}", hint=error.hint) from error


def _options(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} is {value!r}, expected a table", hint="write [options] on a line of its own")
    options = {str(name): given for name, given in value.items()}
    other = call_options.only_python(call_options.to_json(options, ()))
    if other:
        raise RecipeError(
            f"{where}: {other[0]} is {options[other[0]]!r}, expected a number, true, false, a string or a list of them",
            hint="edit the recipe",
        )
    return options


def _names(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise RecipeError(f"{where} is {value!r}, expected a list such as ['image']", hint="edit the recipe")
    return tuple(value)


def _path(value: object, where: str, folder: Path) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise RecipeError(f"{where} has {value!r}, expected a path in quotes", hint="edit the recipe")
    return str(folder / value)


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_NUMBER:
        raise RecipeError(f"{where} is {value!r}, expected a number", hint="edit the recipe")
    return float(value)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value or len(value) > MAX_TEXT:
        raise RecipeError(f"{where} is {str(value)[:80]!r}, expected a text in quotes", hint="edit the recipe")
    return value

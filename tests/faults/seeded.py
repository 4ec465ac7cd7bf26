"""The list of faults: what each is seeded into, and the place that verification should name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from fewstep.runtimes.parity.stored_integers import digest
from tests.faults.edits import Array, Folder, Values, change, half_of_plan, initializer, own, products, swapped, times
from tests.faults.edits import weight as of

FP32, W8A8 = "fp32", "w8a8"


@dataclass(frozen=True)
class Fault:
    """A fault: what it is, what it is seeded into, what of the place must be named, and how it is made."""

    name: str
    recipe: str
    place: str
    seed: Callable[[Folder], object]


def _noise(scale: float, *, factor: bool = False) -> Callable[[Array], Array]:
    def edit(array: Array) -> Array:
        drawn = np.random.default_rng(0).standard_normal(array.shape).astype(np.float32)
        return array * (1 + scale * drawn) if factor else array + scale * drawn

    return edit


def _all_weights(edit: Callable[[Array], Array]) -> Callable[[ir.Model], object]:
    def apply(model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            if (
                value.const_value is not None
                and value.const_value.size > 64
                and value.const_value.numpy().dtype.kind == "f"
            ):
                change(value, edit)

    return apply


def _in(component: str, edit: Callable[[ir.Model], object]) -> Callable[[Folder], object]:
    return lambda folder: folder.onnx(component, edit)


def _manifest(edit: Callable[[Values], object]) -> Callable[[Folder], object]:
    return lambda folder: folder.manifest(edit)


def _schedules(edit: Callable[[Values], object]) -> Callable[[Folder], object]:
    return _manifest(lambda values: [edit(table) for table in values["schedules"].values()])


def _set(where: str, value: Any) -> Callable[[Folder], object]:
    """Returns an edit that sets one field of the manifest: its new value, or what makes it of the old one."""

    def edit(values: Values) -> None:
        *path, last = where.split("/")
        for key in path:
            values = values[key]
        values[last] = value(values[last]) if callable(value) else value

    return _manifest(edit)


def _attribute(kind: str, name: str, value: float) -> Callable[[ir.Model], object]:
    def edit(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.op_type == kind)
        node.attributes[name] = ir.AttrFloat32(name, value)

    return edit


def _exchange(first: tuple[str, ...], second: tuple[str, ...]) -> Callable[[ir.Model], object]:
    def edit(model: ir.Model) -> None:
        a, b = initializer(model, *first), initializer(model, *second)
        a.const_value, b.const_value = b.const_value, a.const_value

    return edit


def _flat(folder: Folder) -> None:
    """Makes the decoder give one colour, whatever it is given."""
    folder.onnx("decoder", lambda model: [change(v, np.zeros_like) for v in _last(model)])


def _last(model: ir.Model) -> list[ir.Value]:
    node = [node for node in model.graph if node.op_type == "Conv"][-1]
    return [value for value in node.inputs[1:] if value is not None]


def _agreeing(folder: Folder, seed: Callable[[Folder], object]) -> None:
    """Seeds a fault and records the golden pack again from the artifacts that have it."""
    from fewstep.bundle.bundle import Bundle
    from fewstep.bundle.samples import load_samples, save_samples
    from fewstep.runtimes.sampling.sampler import open_sampler

    seed(folder)
    folder.rehash()
    bundle = Bundle.open(folder.path)
    sampler, manifest = open_sampler(bundle), bundle.manifest
    old = load_samples(folder.path / "golden")
    new = [sampler(s.prompt, s.seed, manifest.schedule(s.steps), guidance=s.guidance, inputs=s.inputs) for s in old]
    sampler.close()
    save_samples(new, folder.path / "golden", with_feeds=2)


def _row_for_row(model: ir.Model) -> None:
    """Gives the last row of the table of steps what the first has."""

    def edit(array: Array) -> Array:
        array[-1] = array[0]
        return array

    change(_steps(model), edit)


def _steps(model: ir.Model) -> ir.Value:
    """Returns the constant with a row for each step: of a few rows, which no weight has."""
    found = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and len(value.const_value.shape) > 1 and 4 <= value.const_value.shape[0] <= 8
    ]
    return max(found, key=lambda value: value.const_value.size)  # type: ignore[union-attr]  # looked at above


def _merges(values: Any) -> None:
    merges = values["model"]["merges"]
    for i in range(0, min(40, len(merges) - 1), 2):
        merges[i], merges[i + 1] = merges[i + 1], merges[i]


def _nan_word(word: str) -> Callable[[Folder], object]:
    def seed(folder: Folder) -> None:
        vocabulary = json.loads((folder.path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
        ids = [i for token, i in vocabulary.items() if token.startswith(word)] or [len(vocabulary) // 2]

        def edit(array: Array) -> Array:
            array[ids[0]] = np.nan
            return array

        folder.onnx("text_encoder", of("token_embedding.weight", edit=edit))

    return seed


def _thin(folder: Folder) -> None:
    """Leaves two golden samples without their calls, and a wrong weight of the conditions."""
    paths = sorted((folder.path / "golden").glob("*.safetensors"))
    for path in paths[2:]:
        path.unlink()

    def edit(arrays: dict[str, Array], head: Values) -> None:
        head["calls"] = []
        for name in [name for name in arrays if name.startswith("feeds/")]:
            del arrays[name]

    for i in range(len(paths[:2])):
        folder.golden(i, edit)
    folder.onnx("denoiser_conditions", _all_weights(lambda a: a * np.float32(1.05)))


def _one_value(arrays: dict[str, Array], head: Values) -> None:
    arrays["output"].reshape(-1)[7] += 1 / 255


def _other(folder: Folder) -> None:
    """Puts another sample's arrays behind the head of the first golden sample."""
    from fewstep.bundle.samples import load_sample, save_sample

    first, second = sorted((folder.path / "golden").glob("*.safetensors"))[:2]
    a, b = load_sample(first), load_sample(second)
    save_sample(type(a)(a.prompt, a.seed, a.steps, a.guidance, a.feeds, b.latents, b.output, a.kind, a.inputs), first)


def _reversed(table: Values) -> None:
    for name in ("timesteps", "s", "p", "q", "a", "b", "c"):
        table[name] = table[name][::-1]


def _column(edit: Callable[[Array], Array], at: int, which: int = 3) -> Callable[[ir.Model], object]:
    """Returns an edit of what one product of integers reads."""
    return lambda model: own(model, products(model)[which], at, edit)


def _first(factor: float) -> Callable[[Array], Array]:
    def edit(array: Array) -> Array:
        array.reshape(-1)[0] *= factor
        return array

    return edit


def _bits(share: float) -> Callable[[Array], Array]:
    def edit(array: Array) -> Array:
        flat = array.reshape(-1)
        places = np.random.default_rng(0).permutation(flat.size)[: max(1, int(share * flat.size))]
        flat[places] ^= 1
        return array

    return edit


def _quantizers(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "QuantizeLinear"]


def _everywhere(at: int, edit: Callable[[Array], Array]) -> Callable[[ir.Model], object]:
    """Returns an edit of the scale (1) or zero point (2) of a quantized tensor where it is written and read."""
    return lambda model: change(_quantizers(model)[3].inputs[at], edit)  # type: ignore[arg-type]  # it has both


def _float_denoiser(folder: Folder) -> None:
    """Writes products of integers as float ones: all weights dequantized is what a float model has."""
    from tests.faults.bundles import folder_of

    source = Folder(folder_of(FP32)).artifact("denoiser")
    target = folder.artifact("denoiser")
    for old in target.parent.glob("model*"):
        old.unlink()
    for file in source.parent.glob("model*"):
        (target.parent / file.name).write_bytes(file.read_bytes())


def _two_products(model: ir.Model) -> None:
    """Exchanges the integers of two products, or where no two have weights of one shape, their scales."""
    for at in (1, 3):
        found: dict[tuple[int, ...], ir.Value] = {}
        for node in products(model):
            value = node.inputs[at]
            assert value is not None and value.const_value is not None
            other = found.setdefault(tuple(value.const_value.shape.numpy()), value)
            if other is not value:
                other.const_value, value.const_value = value.const_value, other.const_value
                return
    raise LookupError("no two products have weights or scales of one shape")


def _floor_and_column(folder: Folder) -> None:
    def edit(values: Values) -> None:
        floor = values["parity"]["floor"]
        for agreement in (floor["picture"], *floor["components"].values()):
            agreement["median_db"] = -50.0

    folder.manifest(edit)
    folder.onnx("denoiser", _column(_first(2.0), 3))


def _wrong_limits(folder: Folder) -> None:
    def edit(values: Values) -> None:
        values["recipe"]["limits"] = dict.fromkeys(values["recipe"]["limits"], -1000.0)

    folder.manifest(edit)
    folder.onnx("denoiser", of("conv_in.weight", edit=lambda a: a * 2))


def _table_alone(folder: Folder) -> None:
    def edit(values: Values) -> None:
        values["denoiser"]["weights"][0]["integers"] = digest(np.zeros(1, dtype=np.int8))

    folder.json("quantization/integers.json", edit)


def _operation(folder: Folder) -> None:
    """Moves the integers of a golden operation by 3."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = folder.path / "golden" / "operations" / "integers.safetensors"
    with safe_open(path, framework="numpy") as stream:
        metadata = stream.metadata()
        arrays = {name: stream.get_tensor(name).copy() for name in stream.keys()}  # no mapping
    arrays["0/least"] = arrays["0/least"] ^ 3
    arrays["0/most"] = arrays["0/least"]
    save_file(arrays, path, metadata=metadata)


def _through_halves(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "Conv")
    result = node.outputs[0]
    users = list(result.uses())
    half = ir.node("Cast", [result], attributes={"to": int(ir.DataType.FLOAT16)}, name="seeded.half")
    back = ir.node("Cast", [half.outputs[0]], attributes={"to": int(ir.DataType.FLOAT)}, name="seeded.back")
    half.outputs[0].name, back.outputs[0].name = "seeded.half", "seeded.back"
    model.graph.insert_after(node, [half, back])
    for user, at in users:
        user.replace_input_with(at, back.outputs[0])


def _prompts(values: Values) -> None:
    values["prompts"] = values["prompts"][::-1]


_CONV = ("mid_block.resnets.0.conv1",)

FAULTS: tuple[Fault, ...] = (
    # The networks, in float.
    Fault("two channels of a convolution swapped", FP32, _CONV[0], _in("denoiser", of(*_CONV, "weight", edit=swapped))),
    Fault("bias of a convolution is 0", FP32, "conv_in", _in("denoiser", of("conv_in.bias", edit=np.zeros_like))),
    Fault(
        "weights of two layers exchanged",
        FP32,
        "mid_block.resnets.0.conv",
        _in("denoiser", _exchange((*_CONV, "weight"), ("mid_block.resnets.0.conv2", "weight"))),
    ),
    Fault(
        "LayerNorm epsilon 1e-3",
        FP32,
        "layer_norm1",
        _in("text_encoder", _attribute("LayerNormalization", "epsilon", 1e-3)),
    ),
    Fault(
        "GroupNorm epsilon 1e-3", FP32, "norm1", _in("denoiser", _attribute("InstanceNormalization", "epsilon", 1e-3))
    ),
    Fault("decoder + 1e-4 N", FP32, "decoder", _in("decoder", _all_weights(_noise(1e-4)))),
    Fault("decoder x (1 + 1e-4 N)", FP32, "decoder", _in("decoder", _all_weights(_noise(1e-4, factor=True)))),
    Fault("one convolution's result through fp16", FP32, "conv_in", _in("denoiser", _through_halves)),
    Fault("an infinite weight", FP32, "conv_in", _in("denoiser", of("conv_in.weight", edit=_first(1e39)))),
    Fault("constant picture", FP32, "decoder", _flat),
    Fault("constant picture, golden pack agrees", FP32, "decoder", lambda f: _agreeing(f, _flat)),
    Fault("other text encoder", FP32, "embeddings", _in("text_encoder", _all_weights(lambda a: np.roll(a, 1, axis=0)))),
    Fault("NaN for a word of a prompt", FP32, "token_embedding", _nan_word("cat")),
    Fault("NaN for a word that no prompt has", FP32, "token_embedding", _nan_word("dog")),
    Fault(
        "wrong denoiser, golden pack agrees",
        FP32,
        "conv_in",
        lambda f: _agreeing(f, _in("denoiser", of("conv_in.weight", edit=lambda a: a * np.float32(1.1)))),
    ),
    Fault("golden pack without calls, wrong conditions", FP32, "denoiser_conditions", _thin),
    Fault(
        "row of the table of steps: last as first",
        FP32,
        "denoiser_conditions",
        _in("denoiser_conditions", _row_for_row),
    ),
    Fault(
        "convolution weight x 1.001",
        FP32,
        "conv_out",
        _in("denoiser", of("conv_out.weight", edit=lambda a: a * np.float32(1.001))),
    ),
    Fault(
        "decoder's last bias + 0.01",
        FP32,
        "decoder",
        _in("decoder", lambda m: change(_last(m)[1], lambda a: a + np.float32(0.01))),
    ),
    # The host.
    Fault(
        "rows 0 and last swapped",
        FP32,
        "schedule step",
        _set("contract/rows", lambda rows: [rows[-1], *rows[1:-1], rows[0]]),
    ),
    Fault("steps reversed", FP32, "schedule", _schedules(_reversed)),
    Fault("b[0] + 1 %", FP32, "schedule step 0", _schedules(lambda t: t["b"].__setitem__(0, t["b"][0] * 1.01))),
    Fault("c[0] + 10 %", FP32, "schedule step 0", _schedules(lambda t: t["c"].__setitem__(0, t["c"][0] * 1.1))),
    Fault("noise of a step lost", FP32, "schedule step 0", _schedules(lambda t: t["c"].__setitem__(0, 0.0))),
    Fault(
        "init_scale 1.01",
        FP32,
        "schedule init_scale",
        _schedules(lambda t: t.__setitem__("init_scale", t["init_scale"] * 1.01)),
    ),
    Fault("factor of the guidance embedding 1010", FP32, "guidance", _set("contract/guidance/factor", 1010.0)),
    Fault(
        "one frequency + 1 %", FP32, "guidance", _set("contract/guidance/frequencies", lambda f: [f[0] * 1.01, *f[1:]])
    ),
    Fault("guidance scale 1 less", FP32, "guidance.scale", _set("contract/guidance/scale", lambda w: w - 1)),
    Fault("initial noise is another draw", FP32, "noise", _set("contract/initial", "noise:1")),
    Fault("another noise algorithm is named", FP32, "contract.noise", _set("contract/noise", "mt19937")),
    Fault("40 merges swapped", FP32, "tokenizer", lambda f: f.json("tokenizer/tokenizer.json", _merges)),
    Fault("pad id 0", FP32, "tokenizer", _set("tokenizers/tokenizer/pad_id", 0)),
    Fault("padding on the left", FP32, "tokenizer", _set("tokenizers/tokenizer/padding_side", "left")),
    Fault("token length 4 less", FP32, "token", _set("tokenizers/tokenizer/length", lambda n: n - 4)),
    Fault("text put in lower case", FP32, "tokenizer", _set("tokenizers/tokenizer/clean", True)),
    Fault("a word before every text", FP32, "tokenizer", _set("tokenizers/tokenizer/prefix", "a ")),
    Fault("latent scale x 1.05", FP32, "latent scale", _set("contract/latent_scale", lambda s: s * 1.05)),
    Fault("latent shift 0.01", FP32, "latent scale", _set("contract/latent_shift", 0.01)),
    Fault("output shift 0.52", FP32, "output scale", _set("contract/output/shift", 0.52)),
    Fault("output clipped at 0.9", FP32, "output scale", _set("contract/output/clip", [0.0, 0.9])),
    Fault(
        "time 999 is 1 in rows and schedules",
        FP32,
        "timesteps",
        _manifest(lambda v: v.update(times(v, lambda t: 1.0 if t > 900 else t))),
    ),
    Fault(
        "type of the time is float64",
        FP32,
        "schedules",
        _schedules(lambda t: t.__setitem__("timestep_dtype", "float64")),
    ),
    Fault("prediction type", FP32, "contract.prediction_type", _set("contract/prediction_type", "epsilon_")),
    Fault("limits of -1000 dB, wrong weight", FP32, "limit", _wrong_limits),
    Fault("limits of fp32 at 60 dB", FP32, "limit", _set("recipe/limits/component_sqnr_db", 60.0)),
    Fault("prompts in another order", FP32, "prompts", _manifest(_prompts)),
    Fault("golden 000: one value + 1/255", FP32, "picture", lambda f: f.golden(0, _one_value)),
    Fault("golden 000: another sample's arrays", FP32, "output scale", _other),
    Fault(
        "golden 000: another guidance",
        FP32,
        "guidance.scale",
        lambda f: f.golden(0, lambda a, h: h.update(guidance=h["guidance"] + 1)),
    ),
    # Integers.
    Fault("scale of a column x 2", W8A8, "", _in("denoiser", _column(_first(2.0), 3))),
    Fault("zero point + 1 where it is read", W8A8, "", _in("denoiser", _column(lambda a: a + 1, 4))),
    Fault("zero point + 1 everywhere", W8A8, "", _in("denoiser", _everywhere(2, lambda a: a + 1))),
    Fault("half the scale of an activation", W8A8, "", _in("denoiser", _everywhere(1, lambda a: a * np.float32(0.5)))),
    Fault("bias of a product lost", W8A8, "", _in("denoiser", _column(np.zeros_like, 6))),
    Fault("lowest bit of 1 % of a weight", W8A8, "", _in("denoiser", _column(_bits(0.01), 1))),
    Fault("lowest bit of one weight", W8A8, "", _in("denoiser", _column(_bits(0.0), 1))),
    Fault("two columns of integers swapped", W8A8, "", _in("denoiser", _column(lambda a: swapped(a.T.copy()).T, 1))),
    Fault(
        "one scale for all columns", W8A8, "", _in("denoiser", _column(lambda a: np.full_like(a, a.reshape(-1)[0]), 3))
    ),
    Fault("zero point of a weight is 1", W8A8, "", _in("denoiser", _column(lambda a: a + 1, 5))),
    Fault("integers of two products exchanged", W8A8, "", _in("denoiser", _two_products)),
    Fault("plan and model agree on half a scale", W8A8, "", lambda f: half_of_plan(f, "denoiser")),
    Fault("floor of -50 dB, wrong column", W8A8, "floor", _floor_and_column),
    Fault("network in float put in", W8A8, "denoiser", _float_denoiser),
    Fault("table of integers alone", W8A8, "", _table_alone),
    Fault("integers of a golden operation", W8A8, "operation denoiser", _operation),
    Fault(
        "b[0] + 1 %, integers", W8A8, "schedule step 0", _schedules(lambda t: t["b"].__setitem__(0, t["b"][0] * 1.01))
    ),
)

"""Manifests that contradict themselves, which every reader of bundles has to refuse: data for Python and TypeScript.

A change sets the value at a path (``set``), removes what is there (``remove``), or replaces a text of the JSON
(``text``), which is how what no writer of JSON writes gets in.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from fewstep.bundle.contract import ComponentSpec, Contract, Guidance, InputSpec, TensorSpec
from fewstep.bundle.manifest import Artifact, FileEntry, Manifest, TokenizerSpec
from fewstep.bundle.schedule import Schedule
from fewstep.bundle.seal import seal_of, signature_of
from fewstep.bundle.source import SourceInfo

_FILE = FileEntry("0" * 64, 1)


def good_manifest() -> Manifest:
    """Returns a manifest with something of everything, which is refused by nobody."""
    latent, tokens = TensorSpec("x", "float32", (1, 4, 8, 8)), TensorSpec("ids", "int64", (1, 16))
    text = ComponentSpec(
        (tokens,), (TensorSpec("states", "float32", (1, 16, 32)),), {"ids": "tokens:tokenizer"}, "before"
    )
    denoiser = ComponentSpec(
        (latent, TensorSpec("t", "int64", (1,)), TensorSpec("states", "float32", (1, 16, 32))),
        (TensorSpec("y", "float32", (1, 4, 8, 8)),),
        {"x": "latent", "t": "timestep", "states": "text_encoder.states"},
        "loop",
    )
    image = TensorSpec("image", "float32", (1, 3, 16, 16))
    decoder = ComponentSpec((latent,), (image,), {"x": "sample"}, "after")
    components = {"text_encoder": text, "denoiser": denoiser, "decoder": decoder}
    two = (0.5, 0.5)
    paths = {name: f"onnxruntime/{name}/model.onnx" for name in components}
    return Manifest(
        name="hostile",
        source=SourceInfo("nowhere", "python", "0"),
        pipeline="None",
        contract=Contract((4, 8, 8), 1.0, 0.0, "epsilon", Guidance("none", 1.0), inputs=(InputSpec("prompt", "text"),)),
        components=components,
        tokenizers={"tokenizer": TokenizerSpec("tokenizer", 16, 0)},
        schedules={2: Schedule((999.0, 499.0), "int64", 1.0, two, two, two, two, two, two, ((), ()), None, "test")},
        default_steps=2,
        artifacts=tuple(Artifact("onnxruntime", name, path, "fp32", "fp32", 1) for name, path in paths.items()),
        recipe={"limits": {"component_sqnr_db": 100.0}},
        prompts=("cat",),
        licences={},
        versions={},
        files={path: _FILE for path in (*paths.values(), "tokenizer/tokenizer.json")},
    )


def hostile_manifests() -> dict[str, Any]:
    """Returns the good manifest and the changes that spoil it, by what each is."""
    return {
        "about": "tests.web.hostile: every change makes the manifest one that all readers refuse.",
        "manifest": _plain(good_manifest().to_json()),
        "changes": {**_types(), **_references(), **_texts()},
    }


def _plain(value: Any) -> Any:
    """Returns a value with integers for floats that are such, as JavaScript writes them."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _set(path: str, value: Any) -> dict[str, Any]:
    parts = [part.replace("~", "/") for part in path.split("/")]
    return {"set": [int(part) if part in ("0", "1") else part for part in parts], "value": value}


def _types() -> dict[str, dict[str, Any]]:
    """Returns changes of single values: of type, of range, and names that nobody knows."""
    shape = "components/denoiser/inputs/0/shape"
    return {
        "a dtype that nobody knows": _set("components/denoiser/inputs/0/dtype", "int3"),
        "a dtype of another library": _set("components/decoder/outputs/0/dtype", "bfloat16"),
        "a side of 10^9": _set(shape, [1, 4, 1_000_000_000, 8]),
        "sides whose product is too large": _set("contract/latent_shape", [65536, 65536]),
        "a side below nothing": _set(shape, [1, 4, -8, 8]),
        "a side that is no integer": _set(shape, [1, 4, 8.5, 8]),
        "a side that is a text": _set(shape, [1, 4, "8", 8]),
        "a side that is true": _set(shape, [True, 4, 8, 8]),
        "no sides": _set("contract/latent_shape", []),
        "a scale of 0": _set("contract/latent_scale", 0),
        "a scale that is a text": _set("contract/latent_scale", "1"),
        "a name that is a number": _set("name", 7),
        "steps in words": _set("default_steps", "two"),
        "a batch of 0": _set("contract/batch", 0),
        "a batch of 10^9": _set("contract/batch", 1_000_000_000),
        "a token length of 10^9": _set("tokenizers/tokenizer/length", 1_000_000_000),
        "a token length below nothing": _set("tokenizers/tokenizer/length", -1),
        "a padding below nothing": _set("tokenizers/tokenizer/pad_id", -1),
        "an unknown phase": _set("components/decoder/phase", "later"),
        "an unknown form": _set("contract/form", "loop"),
        "an unknown kind of guidance": _set("contract/guidance/kind", "three_pass"),
        "an unknown entry": _set("contract/moon_phase", 0.5),
        "an unknown part": _set("tiles", {}),
        "no components": _set("components", {}),
        "no schedules": _set("schedules", {}),
        "no artifacts": _set("artifacts", []),
        "a missing part": {"remove": ["contract"]},
        "a missing entry": {"remove": ["components", "decoder", "bindings"]},
        "a path that is none": _set("artifacts/0/path", ""),
        "a size below nothing": _set("artifacts/0/bytes", -1),
        "a hash that is none": _set("files/tokenizer~tokenizer.json", {"sha256": "0", "bytes": 1}),
        "a clip the wrong way round": _set("contract/output/clip", [1, 0]),
        "a clip of nothing": _set("schedules/2/clip", 0),
        "limits in words": _set("recipe/limits/component_sqnr_db", "many"),
    }


def _references() -> dict[str, dict[str, Any]]:
    """Returns changes by which one part names what another does not have, or not yet, or in another size."""
    return {
        "a binding of nothing": _set("components/denoiser/bindings/x", "moon_phase"),
        "a binding of an output that is not there": _set("components/denoiser/bindings/states", "text_encoder.pooled"),
        "a binding of what comes later": _set("components/text_encoder/bindings/ids", "denoiser.y"),
        "a binding of itself": _set("components/denoiser/bindings/x", "denoiser.y"),
        "a binding of the last latent in the loop": _set("components/denoiser/bindings/x", "sample"),
        "a binding of the latent before the loop": _set("components/text_encoder/bindings/ids", "latent"),
        "a binding of another size": _set("components/decoder/bindings/x", "text_encoder.states"),
        "a binding of a tokenizer that is not there": _set("components/text_encoder/bindings/ids", "tokens:other"),
        "a binding of noise with no number": _set("components/denoiser/bindings/states", "noise:many"),
        "a binding of a time that is not there": _set("components/denoiser/bindings/t", "time:r"),
        "a binding of a row where there are none": _set("components/denoiser/bindings/t", "step"),
        "a binding of an input that is not there": _set("components/denoiser/bindings/states", "input:image"),
        "a binding of guidance where there is none": _set("components/denoiser/bindings/t", "guidance_embedding"),
        "an input without a binding": {"remove": ["components", "denoiser", "bindings", "t"]},
        "a binding without an input": _set("components/denoiser/bindings/more", "latent"),
        "an input that is there twice": _set("components/denoiser/inputs/1/name", "x"),
        "another token length than the network's": _set("tokenizers/tokenizer/length", 77),
        "a tokenizer of an input that is not there": _set("tokenizers/tokenizer/input", "lyrics"),
        "a tokenizer whose file is not listed": {"remove": ["files", "tokenizer/tokenizer.json"]},
        "another latent than the network's": _set("contract/latent_shape", [4, 8, 9]),
        "an output that is no latent": _set("components/denoiser/outputs/0/shape", [1, 4, 8, 9]),
        "a picture of three sides": _set("components/decoder/outputs/0/shape", [1, 3, 16]),
        "a decoder that comes before": _set("components/decoder/phase", "before"),
        "no network in the loop": _set("components/denoiser/phase", "after"),
        "steps without a schedule": _set("default_steps", 4),
        "a column that is too short": _set("schedules/2/a", [0.5]),
        "a column that is too long": _set("schedules/2/timesteps", [1, 2, 3]),
        "a history before the first step": _set("schedules/2/h", [[0.5], []]),
        "a network that is none of the loop": _set("schedules/2/networks", ["denoiser", "decoder"]),
        "a network for one step of two": _set("schedules/2/networks", ["denoiser"]),
        "rows in the step form": _set("contract/rows", [{"timestep": 999}]),
        "no rows in the table form": _set("contract/form", "table"),
        "a first latent of nothing": _set("contract/initial", "moon.phase"),
        "an anchor of nothing": _set("contract/anchor", "moon.phase"),
        "a term for an anchor that is not there": _set("schedules/2/init_anchor", 0.5),
        "an artifact of no component": _set("artifacts/0/component", "upscaler"),
        "an artifact that is there twice": _set("artifacts/0/component", "decoder"),
        "an artifact whose file is not listed": _set("artifacts/0/path", "onnxruntime/other.onnx"),
    }


def _texts() -> dict[str, dict[str, Any]]:
    """Returns changes of the JSON's text."""
    return {
        "no number": {"text": ['"latent_scale":1', '"latent_scale":NaN']},
        "a number without an end": {"text": ['"latent_scale":1', '"latent_scale":-Infinity']},
        "a number that is too large": {"text": ['"latent_scale":1', '"latent_scale":1e999']},
        "a number of 5,000 digits": {"text": ['"latent_scale":1', '"latent_scale":' + "9" * 5_000]},
        "a long number where anything may be": {"text": ['"parity":null', '"parity":{"x":' + "9" * 5_000 + "}"]},
        "an entry that is there twice": {"text": ['"name":"hostile"', '"name":"hostile","name":"other"']},
        "an entry that is there twice, deep inside": {"text": ['"sha256":"0",', '"sha256":"0","sha256":"0",']},
        "a nesting of 2,000": {"text": ['"parity":null', '"parity":{"x":' + "[" * 2_000 + "]" * 2_000 + "}"]},
        "half a surrogate pair": {"text": ['"cat"', '"\\ud800"']},
        "half a surrogate pair as a name": {"text": ['"licences":{}', '"licences":{"\\udc00":"x"}']},
        "a cut": {"text": ['"caveats":[]', '"caveats":[']},
        "a path that leaves": _listed("../x"),
        "an absolute path": _listed("/x"),
        "a path of Windows": _listed("C:x"),
        "a path with a NUL": _listed("a\\u0000b"),
        "a path through its own folder": _listed("a/./b"),
        "a path with nothing between slashes": _listed("a//b"),
        "a count of steps with a line break": {"text": ['"schedules":{"2"', '"schedules":{"2\\n"']},
        "another version": {"text": ['"schema_version":1', '"schema_version":0']},
    }


def _listed(path: str) -> dict[str, Any]:
    return {"text": ['"files":{', f'"files":{{"{path}":{{"sha256":"{"0" * 64}","bytes":1}},']}


# What tokenizers of CLIP, GPT-2, Llama 3, GPT-4o and DeepSeek split by, and what would run for ever.
PATTERNS = {
    "good": [
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\s*[\r\n]+",
        r"\d{1,3}(?=(?:\d{3})*\b)",
        r"[!#%&(),.:;<=>@\[\]^_{|}~*+]",
        r"[\x{4e00}-\x{9fa5}]+",
        " {2,}",
        r"\s+",
    ],
    "bad": [
        *(r"(a+)+$", r"(a*)*", r"(a|a)*b", r"(a|aa)+", r"((a|b)+)+", r"(a?a?)*", r"(a{2,}){2,}", r"(?:a+){50}"),
        *(r"(a?){50}a{50}", r"((a{50}){50}){50}", r"\s*\s*\s*\s*x", r"(.*)\1", "a{1,100000}", "(", ")", "a" * 5_000),
    ],
}


def signature_vectors() -> dict[str, Any]:
    """Returns a seal, its signature by a key that everybody knows, and one by another."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, other = (Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in (1, 2))
    manifest = '{"name": "signed"}\n'
    seal = seal_of(manifest.encode())
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return {
        "about": "fewstep.bundle.seal: bundle.sha256 of a manifest, and its Ed25519 signature (RFC 8032).",
        "manifest": manifest,
        "seal": seal.decode(),
        "public_key": key.public_key().public_bytes_raw().hex(),
        "pem": pem.decode(),
        "other_key": other.public_key().public_bytes_raw().hex(),
        "signature": signature_of(key, seal),
    }


def spoiled(text: str, value: Any, change: dict[str, Any]) -> str:
    """Returns the JSON of a manifest after a change; ``text`` is its JSON, without blanks, and ``value`` it itself."""
    if "text" in change:
        old, new = change["text"]
        assert text.count(old) >= 1, old
        return text.replace(old, new, 1)
    *folders, last = change.get("set") or change["remove"]
    whole = copy.deepcopy(value)
    inside = whole
    for part in folders:
        inside = inside[part]
    if "set" in change:
        inside[last] = change["value"]
    else:
        del inside[last]
    return json.dumps(whole, separators=(",", ":"))

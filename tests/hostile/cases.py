"""What is made hostile, and what then reads it."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.bundle.bundle import Bundle, write_seal
from fewstep.hashing import file_sha256
from fewstep.pipeline.references import golden_samples, usable_source
from fewstep.recipe.recipe import load_recipe
from fewstep.runtimes.sampling.sampler import open_tokenizers
from tests.hostile.mutate import CANARY, VALUES, changed, flipped, not_a_file, text_of

if TYPE_CHECKING:
    from fewstep.optimize.quantize.plan import QuantPlan

RECIPES = (
    'weights = "fp16"\nsteps = [1, 2]\nguidance = 3.0\nloras = ["a.safetensors=0.5"]\n[limits]\npicture_psnr_db = 40\n',
    'base = "w8a8"\nform = "table"\n[quantization]\nweights = 8\nactivations = 8\nsamples = 4\nfloat_products = 0.1\n'
    '[quantization.ops.linear]\nweights = 4\n[quantization.names."denoiser/*"]\nactivations = 32\n',
    'palette = 6\nshape = "64x64,64x96"\nbatch = 4\ndecoder_tile = 8\nsparsity = 0.5\n[palette_choices]\n"a/b" = 8\n',
)
TEXTS = ("red apple", "", " " * 400, "a" * 400, "naïve 🍎 text", "A, B! c?\n\t", "1" * 300)


@dataclass(frozen=True)
class Case:
    """Something hostile on disk, and what reads it: each returns, or raises a FewstepError with a hint."""

    read: Callable[[], object]


def _copy(folder: Path, to: Path) -> Path:
    """Returns a copy of a folder that shares the content of its files, so it must be replaced and not written to."""
    return Path(shutil.copytree(folder, to, copy_function=os.link))


def _replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


class Cases:
    """Makes cases from good bundles and sources."""

    def __init__(self, bundles: Mapping[str, Path], sources: Mapping[str, Path], work: Path) -> None:
        self._bundles, self._sources, self._work = dict(bundles), dict(sources), work
        self._manifests = {name: json.loads((path / "manifest.json").read_text()) for name, path in bundles.items()}
        for manifest in self._manifests.values():
            manifest["source"]["uri"] = "/nowhere"

    def of(self, kind: str, seed: int) -> Case:
        """Returns a case by kind and seed."""
        chance = random.Random(f"{kind} {seed}")
        return getattr(self, f"_{kind}")(chance, self._work / f"{kind}-{seed}")

    def good(self, name: str) -> Case:
        """Returns a case with nothing wrong about it."""
        return Case(lambda: _use(self._bundles[name]))

    def _bundle(self, chance: random.Random, folder: Path) -> Case:
        """A bundle whose manifest was changed, and mostly its hash with it, as a stranger would."""
        name = chance.choice(sorted(self._bundles))
        _copy(self._bundles[name], folder)
        manifest = changed(self._manifests[name], chance)
        if chance.random() < 0.1:
            manifest = _named(self._manifests[name], chance)
        _replace(folder / "manifest.json", text_of(manifest, chance))
        if chance.random() < 0.95:
            _seal(folder)
        return Case(lambda: _use(folder))

    def _file(self, chance: random.Random, folder: Path) -> Case:
        """A bundle with a file that was changed, or is none."""
        name = chance.choice(sorted(self._bundles))
        _copy(self._bundles[name], folder)
        manifest = self._manifests[name]
        path = chance.choice(["manifest.json", "bundle.sha256", "bundle.sig", "extra", *manifest["files"]])
        if chance.random() < 0.4:
            (folder / path).unlink(missing_ok=True)
            not_a_file(folder / path, chance)
        else:
            old = (folder / path).read_bytes() if (folder / path).exists() else b"x"
            _replace(
                folder / path, _safetensors(old, chance) if path.endswith(".safetensors") else flipped(old, chance)
            )
            _list(folder, manifest, [path])
        return Case(lambda: _use(folder))

    def _tokenizer(self, chance: random.Random, folder: Path) -> Case:
        """A bundle whose tokenizer was changed, its hash with it."""
        name = chance.choice([n for n, m in self._manifests.items() if m["tokenizers"]])
        _copy(self._bundles[name], folder)
        manifest = self._manifests[name]
        path = f"{next(iter(manifest['tokenizers'].values()))['folder']}/tokenizer.json"
        values = json.loads((folder / path).read_text())
        part = chance.choice(["normalizer", "pre_tokenizer", "post_processor", "model", "added_tokens", None])
        if part == "model":  # a vocabulary has more places than all else
            values["model"] |= {chance.choice(list(values["model"])): chance.choice(VALUES)}
        elif part is None:
            values = changed({k: v for k, v in values.items() if k != "model"}, chance) | {"model": values["model"]}
        else:
            values[part] = changed(_PARTS.get(part, values[part]), chance)
        _replace(folder / path, text_of(values, chance))
        _list(folder, manifest, [path])
        return Case(lambda: _use(folder))

    def _recipe(self, chance: random.Random, folder: Path) -> Case:
        """A recipe's file."""
        folder.mkdir()
        path = folder / "recipe.toml"
        lines = chance.choice(RECIPES).splitlines()
        at = chance.randrange(len(lines))
        key = lines[at].partition("=")[0]
        lines[at] = chance.choice((f"{key} = {_toml(chance)}", f"{_toml(chance)} = 1", lines[at] * 2, f"{key} =", ""))
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        if chance.random() < 0.1:
            path.write_bytes(flipped(path.read_bytes(), chance))
        if chance.random() < 0.05:
            not_a_file(path, chance)
        return Case(lambda: load_recipe(str(path)))

    def _plan(self, chance: random.Random, folder: Path) -> Case:
        """A plan's two files."""
        from fewstep.optimize.quantize import QuantPlan

        good = self._work / "good" / "plan"
        if not good.exists():
            _good_plan().save(good)
        _copy(good, folder)
        if chance.random() < 0.8:
            plan = changed(json.loads((folder / "plan.json").read_text()), chance)
            _replace(folder / "plan.json", text_of(plan, chance))
        else:
            arrays = folder / "plan.safetensors"
            _replace(arrays, _safetensors(arrays.read_bytes(), chance))
        if chance.random() < 0.05:
            not_a_file(folder / chance.choice(["plan.json", "plan.safetensors"]), chance)
        return Case(lambda: QuantPlan.load(folder))

    def _reference(self, chance: random.Random, folder: Path) -> Case:
        """A bundle that names another source, which verifying it would load."""
        from fewstep.pipeline.references import load_original
        from fewstep.progress import Silent

        name = chance.choice(sorted(self._bundles))
        _copy(self._bundles[name], folder)
        manifest = _named(self._manifests[name], chance)
        _replace(folder / "manifest.json", json.dumps(manifest).encode())
        _seal(folder)

        def read() -> None:
            bundle = Bundle.open(folder)
            source, _ = usable_source(bundle, None)
            if source is not None:
                load_original(bundle, source, Silent())

        return Case(read)

    def _source(self, chance: random.Random, folder: Path) -> Case:
        """A diffusers folder."""
        from fewstep.export import load

        _copy(self._sources[chance.choice(sorted(self._sources))], folder)
        texts = sorted(folder.rglob("*.json"))
        path = chance.choice([*texts, folder / "model_index.json", folder / "model_index.json"])
        what = chance.random()
        if what < 0.65:
            _replace(path, text_of(changed(json.loads(path.read_text()), chance), chance))
        elif what < 0.8:
            path = chance.choice([p for p in folder.rglob("*") if p.is_file()])
            not_a_file(path, chance)
        elif what < 0.9:
            path = chance.choice(sorted(folder.rglob("*.safetensors")))
            _replace(path, _safetensors(path.read_bytes(), chance))
        else:
            _code(folder, chance)
        return Case(lambda: load(str(folder)))


_PARTS: dict[str, Any] = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    },
}


def _good_plan() -> QuantPlan:
    """Returns a plan with something of everything."""
    from fewstep.optimize.quantize.plan import ComponentPlan, Grid, QuantPlan

    one, zero = np.full(1, 0.5, np.float32), np.zeros(1, np.int32)
    channels = np.full(4, 0.25, np.float32), np.zeros(4, np.int32)
    groups = np.full((4, 2), 0.25, np.float32), np.zeros((4, 2), np.int32)
    plan = ComponentPlan(
        network="0" * 64,
        weights={
            "a.weight": Grid("int8", -127, 127, *channels, axis=0),
            "b.weight": Grid("int8", -7, 7, *groups, axis=0, group_size=16),
        },
        activations={
            "x": Grid("uint8", 0, 255, one, zero + 128),
            "y": Grid("uint8", 0, 255, np.full(3, 0.5, np.float32), np.zeros(3, np.int32)),
        },
        rounded={"a.weight": np.ones((4, 3), np.int8)},
        computes=("a",),
        reasons={"z": "it is a test"},
    )
    return QuantPlan("0" * 64, "x86", {"denoiser": plan})


def _use(folder: Path) -> None:
    """Does with a bundle what its commands do first."""
    bundle = Bundle.open(folder)
    bundle.unlisted()
    bundle.manifest.to_json()
    tokenizers = open_tokenizers(bundle.path, bundle.manifest.tokenizers)
    for tokenizer in tokenizers.values():
        for text in TEXTS:
            tokenizer(text)
    golden_samples(bundle, "")
    inputs = None
    if not bundle.manifest.contract.takes_text:
        from fewstep.numerics.inputs import example_inputs

        inputs = example_inputs(bundle.manifest.contract.inputs, 0)
    bundle.generate("red apple" if bundle.manifest.contract.takes_text else "", seed=3, inputs=inputs)


def _named(manifest: Any, chance: random.Random) -> Any:
    """Returns a manifest that names code, or another source, as what it was built from."""
    uris = (
        f"{CANARY}:make",
        "os:getcwd",
        "fewstep.stickers:generator",
        "stickers",
        "someone/model",
        "/dev/zero",
        ".",
        "",
    )
    kinds = ("function", "python", "diffusers", "single-file", "hub", "built-in", "code", "")
    source = {"uri": chance.choice(uris), "kind": chance.choice(kinds)}
    if chance.random() < 0.3:
        source["revision"] = chance.choice(("main", "0" * 40, f"{CANARY}:make"))
    if chance.random() < 0.3:
        source["decoder"] = {"path": chance.choice(uris), "sha256": "0"}
    if chance.random() < 0.3:
        source["loras"] = [{"path": chance.choice(uris), "scale": 1.0, "sha256": "0"}]
    return {**manifest, "source": {**manifest["source"], **source}}


def _code(folder: Path, chance: random.Random) -> None:
    """Puts code into a diffusers folder, and names it."""
    index = json.loads((folder / "model_index.json").read_text())
    code = f"import {CANARY}\n\nclass Custom:\n    pass\n"
    part = chance.choice([name for name in index if not name.startswith("_") and (folder / name).is_dir()])
    for path in (
        folder / "pipeline.py",
        folder / "None.py",
        folder / part / f"{CANARY}.py",
        folder / part / "diffusers.py",
    ):
        if chance.random() < 0.7:
            path.write_text(code)
    named = chance.choice(([CANARY, "Custom"], ["pipeline", "Custom"], ["os", "system"], ["transformers", "AutoModel"]))
    key = chance.choice(["_class_name", part, part])
    index[key] = chance.choice((named, named[1], [*named, "x"]))
    _replace(folder / "model_index.json", json.dumps(index).encode())


def _seal(folder: Path) -> None:
    (folder / "bundle.sha256").unlink()
    write_seal(folder)


def _list(folder: Path, manifest: Any, paths: list[str]) -> None:
    """Makes a manifest, and its hash, say what is in some files."""
    files = {**manifest["files"]}
    for path in set(paths) & files.keys():
        files[path] = {"sha256": file_sha256(folder / path), "bytes": (folder / path).stat().st_size}
    if "manifest.json" not in paths:
        _replace(folder / "manifest.json", json.dumps({**manifest, "files": files}).encode())
    if "bundle.sha256" not in paths:
        _seal(folder)


def _toml(chance: random.Random) -> str:
    value = chance.choice(VALUES)
    hostile = (
        "nan",
        "inf",
        "1e999",
        "9" * 5_000,
        "[" * 50_000,
        "{a = {b = 1}}",
        "1979-05-27",
        "'''x",
        '"\\u0000"',
        "0x1F",
    )
    return chance.choice(hostile) if chance.random() < 0.4 or value is None else json.dumps(value)


def _safetensors(content: bytes, chance: random.Random) -> bytes:
    """Returns a safetensors file with another header, or with bytes flipped."""
    if chance.random() < 0.3 or len(content) < 8:
        return flipped(content, chance)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    meta = header.get("__metadata__")
    if meta is not None and "fewstep" in meta and chance.random() < 0.5:
        head = changed(json.loads(meta["fewstep"]), chance)
        header["__metadata__"]["fewstep"] = text_of(head, chance).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = text_of(changed(header, chance), chance)
    said = len(text) if chance.random() < 0.9 else chance.choice((0, 2**63, 2**64 - 1, 10**9, len(text) + 1))
    return struct.pack("<Q", said) + text + content[8 + length :]

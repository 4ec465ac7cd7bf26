"""What Python computes, for tests of other languages: ``python -m tests.web.vectors`` writes tests/vectors again."""

from __future__ import annotations

import functools
import html
import json
import math
import random
import struct
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.entities import html5
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep.bundle.contract import Guidance
from fewstep.bundle.manifest import TokenizerSpec
from fewstep.bundle.schedule import Schedule, sample_loop
from fewstep.numerics import noise
from fewstep.numerics.guidance import combine, guidance_embedding, guidance_value
from fewstep.recipe.recipe import Limits
from fewstep.runtimes.parity.harness import Floor, trajectory_limits
from fewstep.runtimes.parity.quantized import agreement_of, floor_checks_of
from fewstep.text.operations import OPERATIONS, apply_operations
from fewstep.text.probe_texts import odd_texts
from fewstep.text.tokens import Tokenizer
from tests.web.hostile import PATTERNS, hostile_manifests, signature_vectors

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "tests" / "vectors"
STICKERS = "apps/stickers/weights/tokenizer"
BYTES = "tests/vectors/byte-tokenizer"
INVERTED = "tests/vectors/inverted-tokenizer"
ENTITIES = REPOSITORY / "apps/web/src/lib/entities.json"

PLAIN = TokenizerSpec(STICKERS, length=24, pad_id=2047)
SPECS = {
    "stickers": PLAIN,
    "long": replace(PLAIN, length=77),
    "around": replace(PLAIN, length=40, prefix="Sticker: ", suffix=" END", operations=("lower", "strip")),
    "left": replace(PLAIN, length=16, padding_side="left", pad_id=0),
    "bytes": TokenizerSpec(BYTES, length=77, pad_id=513),
    "html": replace(PLAIN, operations=("unescape_html", "unescape_html", "collapse_unicode_whitespace", "strip")),
    "several vectors": TokenizerSpec(
        INVERTED, 32, 513, expansions={"<cat>": "<cat> <cat>_1 <cat>_2", "<Dog>": "<Dog> <Dog>_1"}
    ),
}

TEXTS = (
    "",
    " ",
    "red apple",
    "RED APPLE",
    "  red \t apple\n",
    "a" * 200,
    "red apple " * 40,
    "don't they'll I'm we've he'd",
    "'s 't ''s 's's",
    "cat-face_v2.0!",
    "3.14159 1234567890",
    "½ ² ⅷ ٣ ๓",
    "café",
    "cafe\u0301",
    "Å \u212b A\u030a",
    "straße ẞ",
    "İstanbul I ı",
    "ΣΑΣ ΟΔΟΣ",
    "ﬁre ﬂy",
    "Ｆｕｌｌ ｗｉｄｔｈ",
    "日本語の林檎",
    "红苹果",
    "빨간 사과",
    "ᄇ\u1161ᆯ",
    "تفاحة حمراء",
    "תפוח אדום",
    "\u202eright to left\u202c",
    "सेब लाल",
    "แอปเปิ้ล",
    "😀",
    "👩‍👩‍👧‍👦 family",
    "🏳️‍🌈🇩🇪",
    "👍🏽 thumbs",
    "red❤️heart",
    "a\u200db",
    "zero\u200bwidth",
    "\ufeffbom",
    "no\u00a0break",
    "next\u0085line",
    "sep\u2028ara\u2029tor",
    "\u180emongol",
    "a\x00b",
    "\x00",
    "\x1c\x1d\x1e\x1f",
    "tab\tvt\x0bff\x0c",
    "\x7f\x80\x9f",
    "\ue000\U000f0000",
    "\ufffd\ufffe\uffff",
    "\U0010ffff",
    "<|endoftext|>",
    "<|startoftext|>red<|endoftext|>apple",
    "<|ENDOFTEXT|>",
    "<|endof text|>",
    "<|endoftext|",
    "< | >",
    "e\u0301\u0301\u0301\u0301",
    "\u0301",
    "z̷̨̛̤a̸l̶g̵o̴",
    "𝔣𝔯𝔞𝔨𝔱𝔲𝔯 𝟙𝟚",
    "𐐀𐐨",
    "ǅ ǆ",
    "ꙮ",
    "…—“quotes”’s",
    "C'EST L'ÉTÉ",
    "x'S 'LL",
    "emoji😀text😀😀",
    "\\ / \" ' `",
    "{}[]()<>",
    "a.b.c...d",
    "http://example.org/?q=1&r=2#x",
    "aaa aaaa aaaaa",
    "Ⱥⱦ Ω ω",
    "K \u212a",
    "ŉ ǰ ΐ",
    "ﷺ",
    "0\u20e3",
    "ß\u0307",
    "ſ",
    "Dž",
    "i\u0307",
    "\u1e9e\u0130",
    "ゔ か\u3099",
    "क\u093c",
    "\u0958",
    "a <cat> on a table",
    "<cat><cat>, <CAT> <dog> <Dog>",
    "<cat>_1 <cat>_2 <cat>_3",
    "<cat> and <cat>_1",
    "<ca t> <cat<Dog>_1x",
)
# Letters with another case that came to Unicode after Python 3.11's edition of it: they depend on the machine.
_LATER = {
    0x1C89,
    0xA7CB,
    0xA7CC,
    0xA7DA,
    0xA7DC,
    *range(0x10D50, 0x10D66),
    *range(0x16EA0, 0x16EC0),
    0xA7CE,
    0xA7D2,
    0xA7D4,
}


def texts() -> list[str]:
    """Returns the corpus: odd texts by hand, and random ones over odd alphabets."""
    source = random.Random(7)
    alphabets = [
        "abc ABC'123.!-",
        "  \t\n\u00a0\u0085\u2028\ufeff\u200bab'",
        "éèüñçøßÅłşğıİΣσς",
        "😀👍🏽\u200d\ufe0f❤🇩🇪👩",
        "نصحم אבג\u202e\u202cab",
        "漢字かなカナ한글\u1161ᄀ\u3099",
        "".join(chr(c) for c in range(128)),
        "".join(chr(c) for c in range(0x300, 0x370)) + "aeiou",
    ]
    drawn = ["".join(source.choices(alphabet, k=source.randint(1, 30))) for alphabet in alphabets for _ in range(24)]
    anywhere = (source.randrange(0x110000) for _ in range(4000))
    some = [chr(c) for c in anywhere if not 0xD800 <= c < 0xE000]
    return [*TEXTS, *drawn, *("".join(some[i : i + 8]) for i in range(0, 800, 8))]


def tokenizer_vectors() -> dict[str, Any]:
    """Returns the ids of every text by every tokenizer."""
    cases = []
    for name, spec in SPECS.items():
        tokenizer = Tokenizer(REPOSITORY / spec.folder, spec)
        encoded = [tokenizer(text) for text in texts()]
        ids = [values[0].tolist() for values, _ in encoded]
        cases.append({"name": name, "spec": asdict(spec), "ids": ids, "real": [int(mask.sum()) for _, mask in encoded]})
    about = "Token ids by fewstep.text.tokens; `real` counts the ids that are not padding."
    return {"about": about, "texts": texts(), "cases": cases}


def text_vectors() -> dict[str, Any]:
    """Returns what every operation makes of odd texts, letters with a case and HTML entities; null: no change."""
    anything = (chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000 and c not in _LATER)
    changed = [c for c in anything if c.lower() != c or c.isspace() or c < "\u0300"]
    names = [f"&{name}" for name in html5]
    numbers = [f"&#{n};" for n in (*range(0x180), 0xFDD0, 0xFFFE, 0xD800, 0x10FFFF, 0x110000)]
    runs = ["".join(some[i : i + 64]) for some in (changed, names, numbers) for i in range(0, len(some), 64)]
    long = ["&" + "a" * 40, "&not" + "😀" * 40 + ";", "&#" + "9" * 400, "&#x" + "F" * 400]
    every = [*odd_texts(), *TEXTS, *runs, *long]
    several = ["unescape_html", "unescape_html", "collapse_whitespace", "strip", "lower"]
    cases = []
    for operations in [*([name] for name in OPERATIONS), several]:
        made = [apply_operations(operations, text) for text in every]
        differing = [m if m != t else None for m, t in zip(made, every, strict=True)]
        cases.append({"operations": operations, "texts": differing})
    return {"about": "fewstep.text.operations", "texts": every, "cases": cases}


def entities() -> dict[str, Any]:
    """Returns what `html.unescape` knows: names, numbers that stand for another character, and those for nothing."""
    whole = range(0x110000)
    plain = {n: html.unescape(f"&#{n};") for n in whole if not 0xD800 <= n < 0xE000}
    other = {str(n): text for n, text in plain.items() if text not in (chr(n), "")}
    return {"names": dict(sorted(html5.items())), "numbers": other, "nothing": [n for n, t in plain.items() if t == ""]}


def _hex(values: npt.NDArray[np.float32]) -> str:
    """Returns float32 values as hex, little-endian."""
    return struct.pack(f"<{values.size}f", *values.reshape(-1).tolist()).hex()


def schedules() -> dict[str, Schedule]:
    """Returns tables with every kind of term."""
    third = 1 / 3
    lcm = Schedule(
        (999.0, 499.0),
        "int64",
        1.0000000000000002,
        (1.0, 1.0),
        (0.068, 0.527),
        (-0.9977, -0.8499),
        (0.0, 0.0),
        (0.5269, 1.0),
        (0.8499, 0.0),
        ((), ()),
        None,
        "LCM",
    )
    multi = Schedule(
        (999.0, 666.6, 333.3, 1.5),
        "float32",
        14.6,
        (0.1, 0.3, third, 1.0),
        (1.0, 0.0, third, 2.0),
        (-14.6, 1.0, -third, 0.1),
        (0.7, 0.0, third, 1e-3),
        (1.1, -0.2, third, 1.0),
        (0.0, 0.25, 1e-6, 0.5),
        ((), (0.5,), (0.1, -0.3), (0.2, 0.1, third)),
        1.25,
        "everything",
        {"r": (0.75, 0.5, 0.25, 0.0)},
        (0.0, 0.3, third, -0.5),
        0.125,
    )
    return {"lcm": lcm, "everything": multi}


def schedule_vectors() -> dict[str, Any]:
    """Returns the latents of a network that is plain arithmetic, in float32."""
    shape, cases = (1, 2, 3, 5), []
    for name, schedule in schedules().items():
        seed = 2**64 - 3
        anchor = noise.normal(seed, 1 << 31, shape)
        x_init = schedule.init_scale * noise.normal(seed, 0, shape) + schedule.init_anchor * anchor
        latents: list[str] = []

        def denoise(k: int, x: npt.NDArray[Any], schedule: Schedule = schedule) -> npt.NDArray[np.float32]:
            t = np.float32(schedule.timesteps[k])
            return np.asarray(x * np.float32(0.3) - x[..., ::-1] * (t / np.float32(1000)), dtype=np.float32)

        def on_step(_: int, x: npt.NDArray[Any], __: npt.NDArray[Any], latents: list[str] = latents) -> None:
            latents.append(_hex(x))

        draw = functools.partial(_step_noise, seed, shape)
        sample_loop(schedule, x_init, denoise, draw, on_step, anchor=anchor)
        cases.append({"name": name, "seed": str(seed), "schedule": schedule.to_json(), "latents": latents})
    return {"about": "fewstep.bundle.schedule.sample_loop on [1, 2, 3, 5]: float32, little-endian hex.", "cases": cases}


def _step_noise(seed: int, shape: tuple[int, ...], k: int) -> npt.NDArray[np.float32]:
    return noise.normal(seed, k + 1, shape)


def guidance_vectors() -> dict[str, Any]:
    """Returns embeddings of guidance scales."""
    frequencies = tuple(float(np.float32(10000 ** (-i / 15))) for i in range(16))
    guidance = Guidance("embedded", 3.0, frequencies)
    cases = [
        {"scale": w, "values": _hex(guidance_embedding(guidance, w))} for w in (0.0, 1.0, 1.5, 3.0, 7.5, 8.4, 14.9)
    ]
    scalars = [
        Guidance("scalar", 1.0, factor=factor, shift=shift) for factor, shift in ((1.0, 0.0), (0.1, 0.0), (-3.0, 0.7))
    ]
    told = [
        {"guidance": asdict(scalar), "scale": w, "values": _hex(guidance_value(scalar, w))}
        for scalar in scalars
        for w in (0.0, 0.3, 3.5, 7.1)
    ]
    return {
        "about": "fewstep.numerics.guidance and fewstep.bundle.contract.Guidance.",
        "guidance": asdict(guidance),
        "cases": cases,
        "scalars": told,
        "passes": _passes(),
        "combined": _combined(),
    }


def _passes() -> list[dict[str, Any]]:
    """Returns which scales have two passes, around thresholds that are exact in double precision."""
    above = Guidance("two_pass", 0.0, threshold=1.0)
    found = [
        above,
        replace(above, threshold=math.nextafter(1, 0)),
        replace(above, threshold=None),
        Guidance("none", 0.0),
    ]
    scales = (-1.0, 0.0, 0.5, math.nextafter(1, 0), 1.0, math.nextafter(1, 2), 7.5)
    return [{"guidance": asdict(g), "scale": w, "two": g.two_passes(w)} for g in found for w in scales]


def _combined() -> list[dict[str, Any]]:
    """Returns combined passes."""
    u, c = (noise.normal(3, offset, (1, 8)) for offset in (0, 1))
    return [{"scale": w, "u": _hex(u), "c": _hex(c), "values": _hex(combine(u, c, w))} for w in (1.5, 3.3, 7.5)]


def floor_vectors() -> dict[str, Any]:
    """Returns verdicts against noise floors: of few calls and many, near and far, equal and scattered."""
    source, most_db = np.random.default_rng(11), 60.0
    limits = Limits(component_sqnr_db=100.0, picture_psnr_db=most_db)
    cases = []
    for middle, spread, known, found, off in (
        (40.0, 2.0, 32, 8, 0.0),
        (40.0, 2.0, 32, 8, -2.5),
        (40.0, 2.0, 8, 1, -3.0),
        (47.0, 1.5, 8, 16, -1.5),
        (115.0, 30.0, 8, 2, -50.0),
        (140.0, 0.0, 8, 2, -79.0),
        (30.0, 0.0, 8, 1, -0.999),
        (30.0, 0.0, 8, 1, -1.001),
        (30.0, 1.0, 5, 0, 0.0),
    ):
        floor = agreement_of(source.normal(middle, spread, known).tolist())
        values = source.normal(floor.median_db + off, spread, found).tolist()
        checks = floor_checks_of(Floor({"denoiser": floor}, floor), limits, {"denoiser": values}, values, "picture")
        verdicts = [{**asdict(check), "passed": check.passed} for check in checks]
        stated = [{**v, "value": None if math.isnan(v["value"]) else v["value"]} for v in verdicts]
        cases.append({"floor": asdict(floor), "most_db": most_db, "values": values, "checks": stated})
    latents = [noise.normal(5, k, (1, 16)) * np.float32(size) for k, size in enumerate((1.8, 0.6, 0.1))]
    starts = [(start, trajectory_limits(80.0, latents, start)) for start in (1.0, 14.6, 4096.0)]
    return {
        "about": "fewstep.runtimes.parity.quantized.floor_checks_of, a value of null is NaN; parity.trajectory_limits.",
        "cases": cases,
        "trajectories": [
            {"start": start, "latents": [_hex(x) for x in latents], "limits": limits} for start, limits in starts
        ],
    }


def byte_tokenizer() -> dict[str, Any]:
    """Returns a ``tokenizer.json`` in CLIP's form with bytes alone: no merges."""
    found: dict[str, Any] = json.loads((REPOSITORY / STICKERS / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = dict(list(found["model"]["vocab"].items())[:512]) | {"<|startoftext|>": 512, "<|endoftext|>": 513}
    found["model"] |= {"vocab": vocab, "merges": []}
    for token in found["added_tokens"]:
        token["id"] = vocab[token["content"]]
    found["post_processor"] |= {"cls": ["<|startoftext|>", 512], "sep": ["<|endoftext|>", 513]}
    found["padding"] = None
    return found


def inverted_tokenizer() -> dict[str, Any]:
    """Returns `byte_tokenizer` with tokens as diffusers adds them for embeddings of several vectors."""
    found = byte_tokenizer()
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    added = ["<cat>", "<cat>_1", "<cat>_2", "<Dog>", "<Dog>_1"]
    found["added_tokens"] += [{"id": 514 + i, "content": content, **plain} for i, content in enumerate(added)]
    return found


def files() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the names and contents of the files, each after those that it is made from."""
    yield "byte-tokenizer/tokenizer.json", byte_tokenizer()
    yield "inverted-tokenizer/tokenizer.json", inverted_tokenizer()
    yield "tokenizer.json", tokenizer_vectors()
    yield "text.json", text_vectors()
    yield "schedule.json", schedule_vectors()
    yield "guidance.json", guidance_vectors()
    yield "floor.json", floor_vectors()
    yield "hostile-manifests.json", hostile_manifests()
    yield (
        "patterns.json",
        {"about": "fewstep.text.patterns: expressions that are run, and that are not.", **PATTERNS},
    )
    yield "signature.json", signature_vectors()


def write() -> None:
    """Writes the vectors."""
    for name, content in files():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="utf-8")
    ENTITIES.write_text(json.dumps(entities(), ensure_ascii=True, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()

"""Changes JSON values, JSON texts and files as someone would who wants a reader to fail."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

CANARY = "hostile_canary"
"""A module that lies on the path: importing it is what no bundle may bring about."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, "", "x", 0, 1, -1, 2, 7, 64, 255, 0.5, -0.0, 1.5, 1e308, -1e308, 5e-324),
    *(2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**9, 10**12, 10**18, -(10**18)),
    *("\0", "a\0b", "../x", "/etc/passwd", "C:\\x", "a/../b", "\ud800", "a\n", "x" * 5_000, "\u202e", "..", ".", "~"),
    *(
        f"{CANARY}:make",
        CANARY,
        "os:getcwd",
        "webbrowser:open",
        "stickers",
        "someone/model",
        "int3",
        "bfloat16",
        "object",
    ),
    *("tokens:", "tokens:nothing", "noise:99999999999", "draw:0", "time:", "latent", "sample", "moon.phase", "(a+)+$"),
    *([[]], [{}], [None], [1e308] * 3, [10**9] * 4, [0], [-1], {"": 0}, {"a": {"b": {"c": []}}}, [[[[[]]]]]),
    *("float64", "two_pass", "embedded", "before", "loop", "after", "row-0", "9x9", "2x", "table", "specialized"),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Returns every place in a value: what holds it, and its name or number there."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += [(value, key), *places(value[key])]
    return found


def changed(value: Any, chance: random.Random) -> Any:
    """Returns a copy of a JSON value with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if not found:
            return chance.choice(VALUES)
        # Lists of numbers would be almost all there is: first a depth, then a place.
        inside, key = chance.choice(found if chance.random() < 0.5 else [p for p in found if isinstance(p[0], dict)])
        chance.choice(_CHANGES)(inside, key, value, chance)
    return value


def _replace(inside: Any, key: Any, _: Any, chance: random.Random) -> None:
    inside[key] = copy.deepcopy(chance.choice(VALUES))


def _remove(inside: Any, key: Any, _: Any, chance: random.Random) -> None:
    del inside[key]


def _swap(inside: Any, key: Any, whole: Any, chance: random.Random) -> None:
    other, there = chance.choice(places(whole))
    inside[key] = copy.deepcopy(other[there])


def _rename(inside: Any, key: Any, whole: Any, chance: random.Random) -> None:
    if isinstance(inside, dict):
        inside[str(chance.choice(VALUES))] = inside.pop(key)
    else:
        inside.append(copy.deepcopy(inside[key]))


def _nudge(inside: Any, key: Any, whole: Any, chance: random.Random) -> None:
    old = inside[key]
    if isinstance(old, bool) or not isinstance(old, (int, float)):
        return _replace(inside, key, whole, chance)
    inside[key] = chance.choice((old + 1, old - 1, -old, old * 1000, old / 3, float(old), str(old), [old]))


def _multiply(inside: Any, key: Any, _: Any, chance: random.Random) -> None:
    if isinstance(inside[key], list) and len(json.dumps(inside[key])) < 2_000:
        inside[key] = inside[key] * chance.choice((0, 2, 200))
    elif isinstance(inside[key], dict):
        inside[key] = {**inside[key], str(chance.choice(VALUES)): chance.choice(VALUES)}


_CHANGES: tuple[Callable[..., None], ...] = (
    _replace,
    _replace,
    _replace,
    _remove,
    _swap,
    _swap,
    _rename,
    _nudge,
    _multiply,
)


def text_of(value: Any, chance: random.Random) -> bytes:
    """Returns a JSON text of a value, one in five of them no such text as a writer of ours makes."""
    text = json.dumps(value, indent=1)
    if chance.random() < 0.8:
        return text.encode()
    at = chance.randrange(len(text) + 1)
    number = next((i for i in range(at, len(text)) if text[i].isdigit()), None)
    hostile = chance.choice(
        ("NaN", "-Infinity", "1e999", "9" * 5_000, "[" * 100_000, '{"a":' * 50_000, "1" + "0" * 400)
    )
    made = (
        text[:at],
        text[:at] + chance.choice('{],:\x00\ufeff"') + text[at:],
        text if number is None else f"{text[:number]}{hostile}{text[number + 1 :]}",
        hostile,
        text.replace("{\n", '{"name": 1, "name": 2,\n', 1),
        text.replace(' "', ' "\\ud800', 1),
        "\ufeff" + text,
        "[" * 100_000 + "]" * 100_000,
    )
    content = chance.choice(made).encode("utf-8", "surrogatepass")
    return content if chance.random() < 0.8 else flipped(content, chance)


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Returns bytes with some of them changed, cut off or put twice."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 4, 40))):
        if found:
            found[chance.randrange(len(found))] = chance.randrange(256)
    if chance.random() < 0.3:
        del found[chance.randrange(len(found) + 1) :]
    return bytes(found)


def not_a_file(path: Path, chance: random.Random) -> None:
    """Puts something at a path that is no plain file."""
    path.unlink(missing_ok=True)
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to("/proc/self/environ"),
        lambda: path.symlink_to(path.parent),
        lambda: path.mkdir(),
        lambda: path.write_bytes(b""),
        lambda: _socket(path),
    )
    chance.choice(kinds)()


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        try:
            made.bind(str(path))
        except OSError:  # longer than such an address may be
            path.mkdir()

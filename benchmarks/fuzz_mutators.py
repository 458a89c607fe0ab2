"""Hostile inputs made from sound ones: bytes flipped, cut and joined; JSON whose values are exchanged; bombs."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

Mutator = Callable[[random.Random, Sequence[bytes]], bytes]

STRANGE_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    2**31,
    2**32 - 1,
    2**53,
    2**63,
    2**64,
    10**30,
    10**400,
    -(10**30),
    0.5,
    -0.0,
    1e-308,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    "",
    " ",
    "a",
    "a" * 1000,
    "é漢\U0001f600",
    "\ud800",
    "\x1b[31m",
    "\u202e",
    "\0",
    "../x",
    "/etc/passwd",
    "C:\\x",
    "1e5",
    "true",
    "{{ x }}",
    "(a+)+$",
    "__proto__",
    [],
    {},
    [[]],
    [{}],
    [None],
    [1, "a"],
    {"a": {"b": {}}},
    {"": 1},
    ["q_proj"] * 50,
    [0] * 200,
    [[[[[[]]]]]],
    {"type": "x"},
    {"content": 1},
)
"""What a reader may meet in the place of any value."""

_TOKENS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"'",
    b"\\",
    b"\n",
    b"\r\n",
    b"\t",
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"null",
    b"NaN",
    b"Infinity",
    b"-",
    b"1e999",
    b"9" * 5000,
    b"0x",
    b"&a",
    b"*a",
    b"!!python/name:os",
    b"!!int",
    b"<<",
    b"---",
    b"%",
    b"#",
    b"=",
    b"[[",
    b"]]",
    b"{{",
    b"}}",
    b"{%",
    b"%}",
    b"|",
    b"~",
    b"..",
    b"/",
    b"\x1b[",
    "\u2028".encode(),
    "\u202e".encode(),
    b"\xed\xa0\x80",
    b"a" * 300,
    b'{"a":',
    b"[1,",
    b"- ",
    b"? ",
    b">",
    b"\\ud800",
)


def bytes_mutated(draw: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One to six changes of the bytes of a sound input; now and then a bomb or noise."""
    kind = draw.random()
    if kind < 0.02:
        return bomb(draw)
    if kind < 0.03:
        return draw.randbytes(draw.randrange(200))
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        data = draw.choice(_CHANGES)(draw, data, seeds)
    return bytes(data[:MOST_BYTES])


MOST_BYTES = 400_000


def json_mutated(draw: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Values of a sound JSON document exchanged, keys renamed, doubled and taken away; or its bytes changed."""
    if draw.random() < 0.35:
        return bytes_mutated(draw, seeds)
    seed = draw.choice(seeds)
    try:
        return json.dumps(tree_mutated(draw, json.loads(seed))).encode("utf-8")
    except (ValueError, OverflowError, RecursionError):  # deeper, or a larger number, than Python writes
        return bytes_mutated(draw, seeds)


def lines_mutated(draw: random.Random, seeds: Sequence[bytes]) -> bytes:
    """JSON lines, one of them mutated as JSON; or the bytes of all changed."""
    if draw.random() < 0.35:
        return bytes_mutated(draw, seeds)
    lines = draw.choice(seeds).splitlines()
    place = draw.randrange(len(lines))
    lines[place] = json_mutated(draw, [lines[place]])
    return b"\n".join(lines)


def safetensors_mutated(draw: random.Random, seeds: Sequence[bytes]) -> bytes:
    """The header mutated as JSON with its length set right; or any bytes changed."""
    if draw.random() < 0.4:
        return bytes_mutated(draw, seeds)
    seed = draw.choice(seeds)
    length = struct.unpack("<Q", seed[:8])[0]
    header = json_mutated(draw, [seed[8 : 8 + length]])
    return struct.pack("<Q", len(header)) + header + seed[8 + length :]


def tree_mutated(draw: random.Random, tree: Any) -> Any:
    """A copy of a JSON value with one to four changes."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        tree = _changed(draw, tree)
    return tree


def bomb(draw: random.Random) -> bytes:
    """Few bytes, or many of one kind, that careless readers turn into gigabytes, hours or a full stack."""
    count = draw.choice((100, 1_000, 10_000, 100_000))
    unit = draw.choice(
        (
            b"[",
            b"{",
            b'{"a":',
            b"a.",
            b"- ",
            b"? ",
            b"(",
            b"[[",
            b"{{",
            b"{%if 1%}",
            b"a:",
            b",",
            b'"',
            b"\n",
            b"&a ",
            b"9",
            b"a = 1\n",
            b"[a]\n",
            b"k: 1\n",
            b"a,",
            b'{"a":1}\n',
            b"\\",
            b"\xff",
            b"a b ",
            b"#",
            b" ",
            b"\0",
        )
    )
    return draw.choice((b"", b"a = ", b"a: ", b'{"a": ', b"[")) + unit * min(count, MOST_BYTES // len(unit))


def _changed(draw: random.Random, tree: Any) -> Any:
    places = list(islice(_places(tree), 2_000))  # parts may stand in a tree many times
    if not places:
        return draw.choice(STRANGE_VALUES)
    holder, key = draw.choice(places)
    action = draw.randrange(6)
    if action == 0 and isinstance(holder, dict):
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[draw.choice(("", "a", "\x1b[2J", "é", key + "x", key * 40, "__class__"))] = holder[key]
    elif action == 2 and isinstance(holder, list):
        holder.extend([holder[key]] * draw.choice((1, 3, 30)))
    elif action == 3:
        for _ in range(draw.choice((1, 5, 90, 600))):
            holder[key] = draw.choice(([holder[key]], {"a": holder[key]}))
    elif action == 4 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] = draw.choice(
            (holder[key] + 1, -holder[key], holder[key] * 1000, float(holder[key]), str(holder[key]))
        )
    else:
        holder[key] = draw.choice(STRANGE_VALUES)
    return tree


def _places(tree: Any) -> Any:
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        keys = holder.keys() if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in list(keys)[:500]:
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


def _flip(draw: random.Random, data: bytearray, seeds: Sequence[bytes]) -> bytearray:
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def _cut(draw: random.Random, data: bytearray, seeds: Sequence[bytes]) -> bytearray:
    return data[: draw.randrange(len(data) + 1)]


def _without(draw: random.Random, data: bytearray, seeds: Sequence[bytes]) -> bytearray:
    start = draw.randrange(len(data) + 1)
    del data[start : start + draw.choice((1, 1, 2, 8, 64))]
    return data


def _with_token(draw: random.Random, data: bytearray, seeds: Sequence[bytes]) -> bytearray:
    start = draw.randrange(len(data) + 1)
    data[start:start] = draw.choice(_TOKENS)
    return data


def _over_token(draw: random.Random, data: bytearray, seeds: Sequence[bytes]) -> bytearray:
    start, token = draw.randrange(len(data) + 1), draw.choice(_TOKENS)
    data[start : start + len(token)] = token
    return data


def _repeated(draw: random.Random, data: bytearray, seeds: Sequence[bytes]) -> bytearray:
    start = draw.randrange(len(data) + 1)
    piece = data[start : start + draw.choice((1, 4, 30, 200))]
    data[start:start] = piece * draw.choice((1, 2, 20, 500))
    return data


def _joined(draw: random.Random, data: bytearray, seeds: Sequence[bytes]) -> bytearray:
    other = draw.choice(seeds)
    return data[: draw.randrange(len(data) + 1)] + other[draw.randrange(len(other) + 1) :]


def _number(draw: random.Random, data: bytearray, seeds: Sequence[bytes]) -> bytearray:
    start = draw.randrange(len(data) + 1)
    width = draw.choice((1, 2, 4, 8))
    data[start : start + width] = draw.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * width
    return data


_CHANGES = (_flip, _flip, _cut, _without, _with_token, _with_token, _over_token, _repeated, _joined, _number)

"""Inputs of `fuzzing.py`, and ways to break a valid one."""

import copy
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from minillm_trl.cli import main

DEEP = 100_000  # levels of nesting, beyond any recursion limit
LONG = 300_000  # characters, beyond the csv module's own limit and what a message should repeat

_TEXTS = (
    *(
        "",
        " ",
        "\n",
        "\x00",
        "\ufeff",
        "\u2028",
        "a\tb",
        "a,b",
        '"',
        "'",
        "#",
        ":",
        "-",
        "=",
        "null",
        "~",
        "nan",
        "inf",
    ),
    *("-1", "0", "1", "1e-5", "1_000", "0x10", "true", "yes", "on", "../..", "/dev/null", "/", ".", "~", "{}", "[]"),
    *(
        "\ud800",
        "x\udfff",
        "日本語",
        "🤖",
        "\u202etxet",
        "e\u0301",
        "%s %d {0}",
        "$HOME",
        "no",
        "auto",
        "text",
        "user",
    ),
)
_NUMBERS = (0, 1, -1, 2, 3.5, -0.0, 1e-5, 1e308, 2**31, 2**63, 2**64, -(2**70), 10**30, float("nan"), float("inf"))


@dataclass(frozen=True)
class Input:
    """A call to run; words of which a refusal must name one; and a check of the result."""

    run: Callable[[], Any]
    names: tuple[object, ...]
    check: Callable[[Any], None] = field(default=lambda result: None)


def command(*words: object, names: tuple[object, ...], check: Callable[[Any], None] = lambda result: None) -> Input:
    return Input(lambda: main([str(word) for word in words]), names, check)


def wild(random: Random, depth: int = 2) -> Any:
    """Return any value that JSON and YAML can hold."""
    kind = random.randrange(10)
    if kind < 3:
        return random.choice(_TEXTS)
    if kind < 5:
        return random.choice(_NUMBERS)
    if kind == 5 or depth == 0:
        return random.choice((None, True, False, [], {}, [[]], [None]))
    if kind == 6:
        return "long " * (LONG // 5) if random.random() < 0.03 else "x" * random.randrange(50)
    if kind == 7:
        return {random.choice(_TEXTS): wild(random, depth - 1) for _ in range(random.randrange(3))}
    return [wild(random, depth - 1) for _ in range(random.randrange(3))]


def spoil_tree(random: Random, tree: Any) -> Any:
    """Return a copy in which one to three entries have a different value or name, or are missing."""
    tree = {"": copy.deepcopy(tree)}
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        node, key = random.choice(list(_places(tree)))
        action = random.randrange(6) if node is not tree else 0
        if action < 3:
            node[key] = wild(random)
        elif action == 3:
            del node[key]
        elif isinstance(node, dict):
            name = random.choice((*_TEXTS, f"{key}_", str(key).upper(), *map(str, node)))
            node[name] = node.pop(key) if action == 4 else wild(random)
        else:
            node.insert(key, wild(random))
    return tree[""]


def _places(tree: Any) -> Any:
    """Yield container and key of every nested entry."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def spoil_bytes(random: Random, data: bytes) -> bytes:
    """Return the bytes truncated, damaged, recoded, or with an insertion."""
    place, end = random.randrange(len(data) + 1), random.randrange(len(data) + 1)
    put_in = random.choice(
        (
            *(
                b"\x00",
                b"\xff",
                b"\xfe\xff",
                b"\xc3",
                b"\xed\xa0\x80",
                b"\xef\xbb\xbf",
                b"\r",
                b"\n",
                b"\r\n",
                b"\t",
                b" ",
            ),
            *(b'"', b"'", b",", b":", b"{", b"}", b"[", b"]", b"\\", b"\\ud800", b"- ", b"# ", b"&a ", b"*a", b"!!x "),
            *(b"NaN", b"Infinity", b"1" * 5000, b"[" * DEEP, b'{"a":' * DEEP, b"\xe2\x80\xa8", b"x" * LONG),
        )
    )
    match random.randrange(10):
        case 0:
            return data[:place]
        case 1:
            return data[place:]
        case 2:
            return data[: min(place, end)] + data[max(place, end) :]
        case 3:
            return data[:place] + data[min(place, end) : max(place, end)] + data[place:]
        case 4:
            damaged = bytearray(data or b" ")
            for _ in range(random.choice((1, 4, 64))):
                damaged[random.randrange(len(damaged))] = random.randrange(256)
            return bytes(damaged)
        case 5:
            text = data.decode("utf-8", errors="replace")
            return text.encode(random.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252")), errors="replace")
        case 6:
            return random.choice((b"", b"\n", b" \n\n", b"\x00" * 64, gzip.compress(data), random.randbytes(200)))
        case _:
            return data[:place] + put_in + data[place:]


def dump_json(random: Random, value: Any) -> bytes:
    """Return JSON in one of the styles that programs write."""
    if random.random() < 0.5:
        return json.dumps(value).encode()
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="surrogatepass")


def spoil_file(random: Random, paths: list[Path]) -> Path:
    """Break one of the files: its bytes or, in JSON, its values; or remove it."""
    path = random.choice(sorted(paths))
    data = path.read_bytes()
    kind = random.randrange(10)
    if kind == 0:
        path.unlink()
    elif kind < 5 and path.suffix == ".json":
        path.write_bytes(dump_json(random, spoil_tree(random, json.loads(data))))
    elif kind < 5 and path.suffix == ".jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        spoilt = spoil_tree(random, lines)
        lines = spoilt if isinstance(spoilt, list) else [spoilt]
        path.write_bytes(b"".join(dump_json(random, each) + b"\n" for each in lines))
    else:
        path.write_bytes(spoil_bytes(random, data))
    return path

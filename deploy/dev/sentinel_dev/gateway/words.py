"""What the simulated gateway says: words of one token each, so that whoever counts gets what was charged."""

from __future__ import annotations

import re
from itertools import cycle, islice
from typing import Any, Final

from sentinel_dev.gateway.behaviour import TOKENS_MOST

_WORDS_TEXT: Final = """
the quick light over still water and every small wind some new sound from far away while people talk about work time
music food house river winter city road train paper letter story number color green blue red white black open close
near long short high low good great
"""
_CJK_TEXT: Final = "的 一 是 在 不 有 和 人 中 大 上 国 我 要 时 来 生 到 地 出 分 对 成 会 可 の は を が 한 이 가"

WORDS: Final = tuple(_WORDS_TEXT.split())
"""One token each, with a space before them and without, in o200k, cl100k and p50k."""

CJK: Final = tuple(_CJK_TEXT.split())
"""One token each in o200k, with a space before them and without."""

_DEFAULT_TOKENS: Final = 16
_WANTED: Final = re.compile(r"(\d{1,7})\s*(?:tokens|words)")
_SCHEMA_DEPTH_MOST: Final = 20


def wanted_tokens(text: str) -> int:
    """How much the end of a prompt asks for, "say 50 tokens"; 16 where it does not."""
    found = _WANTED.findall(text[-500:])
    return min(int(found[-1]), TOKENS_MOST) if found else _DEFAULT_TOKENS


def pieces(count: int, *, cjk: bool = False) -> list[str]:
    """So many tokens of text, one a piece."""
    words = CJK if cjk else WORDS
    told = [" " + word for word in islice(cycle(words), count)]
    if told:
        told[0] = told[0][1:]
    return told


def slices(text: str, count: int) -> list[str]:
    """A text in `count` pieces of about the same length."""
    return [text[len(text) * i // count : len(text) * (i + 1) // count] for i in range(count)]


def example(schema: Any, root: Any = None, depth: int = 0) -> Any:
    """The smallest JSON value that fits a JSON schema of the kinds that OpenAI takes."""
    root = schema if root is None else root
    if not isinstance(schema, dict) or depth > _SCHEMA_DEPTH_MOST:
        return None
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    if isinstance(schema.get("$ref"), str):
        return example(_referred(schema["$ref"], root), root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list) and schema[key]:
            return example(schema[key][0], root, depth + 1)
    return _example_of_type(schema, root, depth)


def _example_of_type(schema: dict[str, Any], root: Any, depth: int) -> Any:
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        properties = schema.get("properties")
        told = properties.items() if isinstance(properties, dict) else ()
        return {name: example(inner, root, depth + 1) for name, inner in told}
    if kind == "array":
        least = schema.get("minItems")
        count = min(least, 100) if isinstance(least, int) else 1
        return [example(schema.get("items", {}), root, depth + 1)] * count
    plain: dict[Any, Any] = {"integer": 7, "number": 7.5, "boolean": True, "null": None}
    return plain.get(kind, "quick light") if isinstance(kind, str) else None


def _referred(path: str, root: Any) -> Any:
    found = root
    for part in path.removeprefix("#").strip("/").split("/"):
        if part:
            found = found.get(part) if isinstance(found, dict) else None
    return found

"""What a model's name asks of the simulated gateway; the table stands in the package's docstring."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

Usage = Literal["normal", "none", "null", "zero", "with-choices", "running"]
Break = Literal["cut", "error", "hang", "endless-line"]

PREFIX: Final = "sim/"
_PART: Final = re.compile(r"([a-z-]+?)(?:-(\d{1,7})(?:ms)?)?")
_PAUSE_MOST_MS: Final = 600_000
TOKENS_MOST: Final = 200_000
_LONG_TOKENS: Final = 10_000

_USAGES: Final[dict[str, Usage]] = {
    "no-usage": "none",
    "usage-null": "null",
    "usage-zero": "zero",
    "usage-with-choices": "with-choices",
    "usage-running": "running",
}
_BREAKS: Final[dict[str, Break]] = {
    "cut": "cut",
    "error-mid-stream": "error",
    "hang-mid-stream": "hang",
    "endless-line": "endless-line",
}
_FLAGS: Final = {
    *("hang", "gzip", "over-cap", "tools", "reason", "refusal", "json", "cjk"),
    *("crlf", "comments", "no-space", "events", "no-done", "one-byte", "many-events-per-write"),
}


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How to answer. `break_after` counts events; None is half of them."""

    first_pause_s: float = 0.0
    pause_s: float = 0.0
    tokens: int | None = None
    status: int = 200
    usage: Usage = "normal"
    breaks: Break | None = None
    break_after: int | None = None
    flags: frozenset[str] = frozenset()

    @property
    def line_end(self) -> bytes:
        return b"\r\n" if "crlf" in self.flags else b"\n"

    def framed(self, data: bytes, event: str | None = None) -> bytes:
        """The bytes of one SSE event."""
        end = self.line_end
        framed = (b"data:" if "no-space" in self.flags else b"data: ") + data + end + end
        if event is not None or "events" in self.flags:
            framed = b"event: " + (event or "chunk").encode() + end + framed
        return b": keep-alive" + end + end + framed if "comments" in self.flags else framed


PLAIN: Final = Behaviour()


@lru_cache(maxsize=4_096)
def behaviour_of(model: str) -> Behaviour:
    """By the parts between the plus signs behind `sim/`; of other models by the words `tools` and `reason` alone."""
    if not model.startswith(PREFIX):
        flags = frozenset(word for word in ("tools", "reason") if word in model)
        return Behaviour(flags=flags) if flags else PLAIN
    fields: dict[str, object] = {}
    named: set[str] = set()
    for part in model.removeprefix(PREFIX).split("+"):
        match = _PART.fullmatch(part)
        if match is None:
            continue
        name, number = match[1], None if match[2] is None else int(match[2])
        fields.update(_fields(name, number))
        if name in _FLAGS:
            named.add(name)
        if name == "one-byte":
            named.add("cjk")
    return Behaviour(**fields, flags=frozenset(named))  # type: ignore[arg-type]  # made by _fields


def _fields(name: str, number: int | None) -> dict[str, object]:
    pause_s = min(50 if number is None else number, _PAUSE_MOST_MS) / 1_000
    if name == "slow":
        return {"first_pause_s": pause_s, "pause_s": pause_s}
    if name == "late":
        return {"first_pause_s": pause_s}
    if name in {"tokens", "long"}:
        return {"tokens": min(_LONG_TOKENS if number is None else number, TOKENS_MOST)}
    if name == "status" and number is not None and 400 <= number <= 599:
        return {"status": number}
    if name in _BREAKS:
        return {"breaks": _BREAKS[name], "break_after": number}
    return {"usage": _USAGES[name]} if name in _USAGES else {}

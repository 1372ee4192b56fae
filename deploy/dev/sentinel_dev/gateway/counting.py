"""What the simulated gateway charges for input: counted by o200k with OpenAI's chat formula, or cheaply by length.

Counted here apart from the proxy's own counting, so that one can be held against the other; only the published
encoding's file is the same.
"""

from __future__ import annotations

import binascii
import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import tiktoken

# Beyond this a text is charged by length: nobody compares such a count, and the tokenizer has its limits.
_TEXT_MOST_CHARS: Final = 400_000
_MESSAGE_TOKENS: Final = 3
_NAME_TOKENS: Final = 1
_REPLY_TOKENS: Final = 3
_IMAGE_TOKENS: Final = {"low": 85}
_IMAGE_HIGH_TOKENS: Final = 765
_DEPTH_MOST: Final = 50

_PATTERN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Counter(Protocol):
    """Tokens of a text, and of the input of each kind of request, as raw JSON."""

    exact: bool

    def text(self, text: str) -> int: ...
    def chat(self, messages: msgspec.Raw, *extras: msgspec.Raw) -> int: ...
    def plain(self, told: msgspec.Raw, *extras: msgspec.Raw) -> int: ...


class ByLength:
    """Four bytes are a token: for benchmarks."""

    exact = False

    def text(self, text: str) -> int:
        return -(-len(text) // 4)

    def chat(self, messages: msgspec.Raw, *extras: msgspec.Raw) -> int:
        return -(-(len(memoryview(messages)) + sum(len(memoryview(extra)) for extra in extras)) // 4)

    def plain(self, told: msgspec.Raw, *extras: msgspec.Raw) -> int:
        return self.chat(told, *extras)


class Exact:
    """o200k_base; loaded at the first count, a quarter of a second."""

    exact = True

    def __init__(self) -> None:
        self._encoding: tiktoken.Encoding | None = None

    def load(self) -> tiktoken.Encoding:
        if self._encoding is None:
            self._encoding = _o200k()
        return self._encoding

    def text(self, text: str) -> int:
        if len(text) > _TEXT_MOST_CHARS:
            return -(-len(text) // 4)
        return len(self.load().encode_ordinary(text))

    def chat(self, messages: msgspec.Raw, *extras: msgspec.Raw) -> int:
        told = msgspec.json.decode(messages)
        count = sum(self._message(message) for message in told) + _REPLY_TOKENS if isinstance(told, list) else 0
        return count + sum(self.text(bytes(extra).decode("utf-8", "replace")) for extra in extras if memoryview(extra))

    def plain(self, told: msgspec.Raw, *extras: msgspec.Raw) -> int:
        return sum(self._plain(msgspec.json.decode(raw), 0) for raw in (told, *extras) if memoryview(raw))

    def _plain(self, told: Any, depth: int) -> int:
        if isinstance(told, str):
            return self.text(told)
        if isinstance(told, list) and depth < _DEPTH_MOST:
            return sum(self._plain(item, depth + 1) for item in told)
        if isinstance(told, dict) and "content" in told:
            return self._message(told)
        return int(isinstance(told, int))

    def _message(self, message: Any) -> int:
        if not isinstance(message, dict):
            return 0
        count = _MESSAGE_TOKENS + self.text(str(message.get("role", "")))
        if isinstance(message.get("name"), str):
            count += self.text(message["name"]) + _NAME_TOKENS
        if "tool_calls" in message:
            count += self.text(msgspec.json.encode(message["tool_calls"]).decode())
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        return count + sum(self._part(part) for part in parts)

    def _part(self, part: Any) -> int:
        if isinstance(part, str):
            return self.text(part)
        if not isinstance(part, dict):
            return 0
        if "image_url" in part:
            image = part["image_url"]
            detail = image.get("detail") if isinstance(image, dict) else part.get("detail")
            return _IMAGE_TOKENS.get(str(detail), _IMAGE_HIGH_TOKENS)
        return self.text(part["text"]) if isinstance(part.get("text"), str) else 0


def _o200k() -> tiktoken.Encoding:
    # The file is read where the proxy ships it; nothing of the proxy is imported.
    spec = find_spec("sentinel_proxy")
    home = next(iter(spec.submodule_search_locations or []), "") if spec else ""
    data = gzip.decompress((Path(home) / "tokens" / "data" / "o200k_base.tiktoken.gz").read_bytes()).split()
    ranks = dict(zip(map(binascii.a2b_base64, data[::2]), map(int, data[1::2]), strict=True))
    encoding = tiktoken.Encoding("o200k_base", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ranks.clear()  # only needed to decode
    return encoding

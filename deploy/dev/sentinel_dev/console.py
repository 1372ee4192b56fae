"""What the person sees: a line per part, what to paste, a line per request, and what goes wrong."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

_NAME_WIDTH: Final = 12
_LINE_MOST: Final = 400
_SHOWN_LEVELS: Final = {"warning", "error", "critical"}
_NO_NEWS: Final = {"timestamp", "level", "service", "logger", "message", "exception", "stack"}
_SILENT: Final = {"redis", "zion", "gateway"}
"""They are heard only when they end: their logs are about themselves."""

_MODEL: Final = "openai/gpt-4o"
_PROMPT: Final = "Say 20 tokens"


class Console:
    """Standard output; one that nobody reads any more is no reason to stop."""

    def say(self, text: str = "") -> None:
        """A line of sentinel-dev itself."""
        with contextlib.suppress(OSError, ValueError):
            print(text, flush=True)

    def complain(self, text: str) -> None:
        """A line that says why it does not start, or ends."""
        with contextlib.suppress(OSError, ValueError):
            print(f"sentinel-dev: {text}", file=sys.stderr, flush=True)

    def hear(self, part: str, line: str) -> None:
        """A line of a part; shown when it is worth it."""
        shown = None if part in _SILENT else readable(line)
        if shown:
            self.say(column(part, shown))


def column(part: str, text: str) -> str:
    """The part's name, then what is said of it or by it."""
    return f"  {part:<{_NAME_WIDTH}}  {text}"


def readable(line: str) -> str | None:
    """A line of a service's log for people: requests, warnings, errors, what is no log at all; None for the rest."""
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return line[:_LINE_MOST] or None
    if record.get("message") == "request" and "status" in record:
        return _request(record)
    level = str(record.get("level", ""))
    return f"{level.upper()} {_message(record)}"[:_LINE_MOST] if level in _SHOWN_LEVELS else None


def last_words(line: str) -> str:
    """A line of a part that has ended, whatever its level."""
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return line[:_LINE_MOST]
    return (_request(record) if "status" in record else _message(record))[:_LINE_MOST]


def _request(record: Mapping[str, Any]) -> str:
    told = [str(record.get("status")), str(record.get("method", "")), str(record.get("path", ""))]
    told += [str(record[name]) for name in ("model", "external_id") if record.get(name)]
    if record.get("input_tokens") or record.get("output_tokens"):
        told.append(f"{record.get('input_tokens', 0)} in {record.get('output_tokens', 0)} out")
    if isinstance(record.get("duration_ms"), int | float):
        told.append(f"{record['duration_ms']:.0f} ms")
    return "  ".join(told)


def _message(record: Mapping[str, Any]) -> str:
    told = str(record.get("message", ""))
    more = [f"{name}={value}" for name, value in record.items() if name not in _NO_NEWS]
    exception = str(record.get("exception", "")).strip().rpartition("\n")[2]
    return " ".join(part for part in (told, *more, exception) if part)


def to_paste(base_url: str, tokens: Mapping[str, tuple[str, str]], *, python: str) -> Sequence[str]:
    """How to try it. `tokens` are, by user, the token and what the user may do; empty where Zion is real."""
    token = next((token for token, _ in tokens.values()), "YOUR-ZION-TOKEN")
    lines = []
    for user, (user_token, may) in tokens.items():
        lines += [f"Token of {user}, {may}:", user_token, ""]
    body = f'{{"model": "{_MODEL}", "messages": [{{"role": "user", "content": "{_PROMPT}"}}]}}'
    headers = f"-H 'Authorization: Bearer {token}' -H 'Content-Type: application/json'"
    client = f"OpenAI(base_url='{base_url}', api_key='{token}')"
    asked = f"model='{_MODEL}', messages=[{{'role': 'user', 'content': '{_PROMPT}'}}]"
    return [
        *lines,
        "Try it with curl, or with the OpenAI SDK:",
        f"curl {base_url}/chat/completions {headers} -d '{body}'",
        f'{python} -c "from openai import OpenAI; print({client}.chat.completions.create({asked}))"',
    ]

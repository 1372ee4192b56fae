"""Structured logs: one JSON object a line on stdout, whoever logs.

Fields: `timestamp` (RFC 3339, UTC), `level`, `service`, `logger`, `message`, then whatever was passed in `extra`
(`request_id` and `external_id` by convention), and `exception` with the traceback. Prompts, answers and secrets are
never passed to a logger; that what looks like a secret is blotted out all the same is the last line of defence.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, TextIO

import msgspec

BLOT: Final = "[redacted]"
STORM_KEYS_MAX: Final = 256

_OF_EVERY_RECORD: Final = frozenset(
    {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
)
_SECRET_FIELD: Final = re.compile(r"authorization|api[-_]?key|secret|passw|cookie|^jwt$|^token$", re.IGNORECASE)
_SECRETS: Final = re.compile(
    r"(?P<scheme>://)[^\s/@]+(?=@)"
    r"|(?P<name>(?:authorization|api[-_]?key|secret|password|jwt|cookie)[\"']?\s{0,3}[:=]\s{0,3}(?:b?[\"'])?)"
    r"(?:(?:bearer|basic)\s+)?[^\"'\s,;]+"
    r"|(?P<word>\b(?:bearer|basic)\s+)[\w.~+/=-]{12,}"
    r"|\beyJ[\w-]{6,}\.[\w-]+(?:\.[\w-]*)?"
    r"|\b(?:sk|rk|pk|vck)[-_][\w-]{12,}",
    re.IGNORECASE,
)
_WORD_CHARS: Final = 11
_DEPTH_MAX: Final = 5
# Their own say about each request, connection or tick would drown Sentinel's one line a request.
_QUIET: Final = ("httpx", "httpcore", "uvicorn.access", "arq", "asyncio")
_WITH_OWN_HANDLERS: Final = ("uvicorn", "uvicorn.error", "uvicorn.access", "arq", "arq.worker", "httpx", "httpcore")


def configure_logging(service: str, level: str, *, secrets: Iterable[str] = (), stream: TextIO | None = None) -> None:
    """Sends every logger of this process through one JSON handler; the last call wins.

    `secrets` are the process's own, blotted out wherever they should turn up. Run uvicorn with `log_config=None`.
    """
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(JsonFormatter(service, secrets=secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _WITH_OWN_HANDLERS:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    # A reader of stdout that has gone away must not fill stderr with tracebacks.
    logging.raiseExceptions = False


class JsonFormatter(logging.Formatter):
    """One record, one line of JSON, with secrets blotted out of every text in it."""

    def __init__(self, service: str, *, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._service = service
        self._encode = msgspec.json.Encoder().encode
        # Short ones would blot out ordinary words.
        self._own_secrets = sorted({secret for secret in secrets if len(secret) >= 4}, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "timestamp": _timestamp(record.created),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": self._blotted(_message(record)),
        }
        for name, value in vars(record).items():
            if name not in _OF_EVERY_RECORD and name not in line:
                line[name] = self._clean(name, value)
        if record.exc_info:
            line["exception"] = self._blotted(self.formatException(record.exc_info))
        if record.stack_info:
            line["stack"] = self._blotted(record.stack_info)
        return self._encode(line).decode()

    def _clean(self, name: str, value: Any, depth: int = 0) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is float or (kind is int and abs(value) < 2**63):
            return value
        if _is_secret_field(name):
            return BLOT
        if kind is str:
            return self._blotted(value)
        if isinstance(value, dict) and depth < _DEPTH_MAX:
            return {self._blotted(str(key)): self._clean(str(key), inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list | tuple | set | frozenset) and depth < _DEPTH_MAX:
            return [self._clean("", inner, depth + 1) for inner in value]
        return self._blotted(str(value))

    def _blotted(self, text: str) -> str:
        for secret in self._own_secrets:
            if secret in text:
                text = text.replace(secret, BLOT)
        # Most values are one short word, and no word this short is a secret by its looks.
        if len(text) >= _WORD_CHARS or " " in text or ":" in text or "=" in text:
            text = _SECRETS.sub(_blot, text)
        # A lone surrogate is no UTF-8 and would cost the line.
        return text if text.isascii() else text.encode(errors="replace").decode()


class StormGuard:
    """Logs at most one line a second per key, and says with the next how many it kept back.

    Keys are few and fixed, such as `redis_unavailable`; beyond 256 of them the rest shares one.
    """

    def __init__(self, logger: logging.Logger, monotonic_s: Callable[[], float]) -> None:
        self._logger = logger
        self._monotonic_s = monotonic_s
        self._last_s: dict[str, float] = {}
        self._suppressed: dict[str, int] = {}

    def log_once_per_s(self, level: int, key: str, message: str, **extra: Any) -> None:
        """Logs `message`, with `extra` and the count `suppressed`, unless this key has within the last second."""
        if key not in self._last_s and len(self._last_s) >= STORM_KEYS_MAX:
            key = "other"
        now_s = self._monotonic_s()
        if now_s - self._last_s.get(key, float("-inf")) < 1.0:
            self._suppressed[key] = self._suppressed.get(key, 0) + 1
            return
        self._last_s[key] = now_s
        suppressed = self._suppressed.pop(key, 0)
        self._logger.log(level, message, extra={**extra, "suppressed": suppressed} if suppressed else extra)


@lru_cache(maxsize=512)
def _is_secret_field(name: str) -> bool:
    return _SECRET_FIELD.search(name) is not None


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):
        return str(record.msg)


def _timestamp(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _blot(found: re.Match[str]) -> str:
    return (found["scheme"] or found["name"] or found["word"] or "") + BLOT

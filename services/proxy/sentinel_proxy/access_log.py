"""One line a request, written off the request's path: lines gather for a tenth of a second and leave in one write."""

from __future__ import annotations

import asyncio
import time
from typing import IO, Any, Final

import msgspec

from sentinel_shared.units import format_rfc3339

_FLUSH_S: Final = 0.1
_LINES_MAX: Final = 10_000


class AccessLog:
    """Never waits for its reader for longer than a write takes; beyond 10,000 lines that wait, lines are dropped."""

    def __init__(self, out: IO[bytes], *, service: str) -> None:
        self._out = out
        self._service = service
        self._lines: list[tuple[float, dict[str, Any]]] = []
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, fields: dict[str, Any]) -> None:
        """Log `fields` with the present time."""
        if len(self._lines) < _LINES_MAX:
            self._lines.append((time.time(), fields))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write what has gathered."""
        self._timer = None
        lines, self._lines = self._lines, []
        encoder = msgspec.json.Encoder()
        text = b"".join(
            encoder.encode({"timestamp": format_rfc3339(at_s), "level": "info", "service": self._service} | fields)
            + b"\n"
            for at_s, fields in lines
        )
        try:
            self._out.write(text)
            self._out.flush()
        except (OSError, ValueError):
            return  # nobody reads the log any more; requests go on

"""What the simulated gateway charged, per user and in all, and the latest requests as they came."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from sentinel_dev.asgi import Exchange

REQUESTS_MOST: Final = 10_000
_BODIES_MOST_BYTES: Final = 64 * 1024 * 1024
_USERS_MOST: Final = 100_000
NOBODY: Final = "-"


@dataclass(slots=True)
class Sum:
    """What was charged to somebody."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def add(self, request: Request) -> None:
        self.requests += 1
        self.input_tokens += request.input_tokens
        self.output_tokens += request.generated


@dataclass(slots=True)
class Request:
    """One request: how it came, and what became of it."""

    number: int
    id: str
    at: float
    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    model: str | None = None
    user: str = NOBODY
    status: int = 0
    """0 = never answered."""
    input_tokens: int = 0
    generated: int = 0
    """Output tokens, counted as they are written."""
    charged: bool = False
    finished: bool = False
    """All of the answer went out, or at least into the connection."""

    def shown(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "id": self.id,
            "at": self.at,
            "method": self.method,
            "path": self.path,
            "query": self.query.decode("latin-1"),
            "headers": [[key.decode("latin-1"), value.decode("latin-1")] for key, value in self.headers],
            "body": self.body.decode("utf-8", "replace"),
            "body_hex": None if self.body.isascii() else self.body.hex(),
            "model": self.model,
            "user": self.user,
            "status": self.status,
            "input": self.input_tokens,
            "output": self.generated,
            "charged": self.charged,
            "finished": self.finished,
        }


@dataclass(slots=True)
class Books:
    """Every 2xx answer but those about models is charged: 1 request, its input, and what output was written."""

    total: Sum = field(default_factory=Sum)
    unfinished: Sum = field(default_factory=Sum)
    """Of `total`: streams that were cut or whose client left, charged with what had been written."""
    users: dict[str, Sum] = field(default_factory=dict)
    seen: int = 0
    in_flight: int = 0
    abandoned: int = 0
    """Left or hung up before the first byte of an answer; nothing charged."""
    requests: deque[Request] = field(default_factory=deque)
    keep: int = REQUESTS_MOST
    _body_bytes: int = 0

    def open(self, exchange: Exchange, body: bytes, at: float) -> Request:
        """Notes a request that came; the oldest are forgotten beyond 10,000 or 64 MiB of bodies."""
        self.seen += 1
        self.in_flight += 1
        request_id = exchange.header(b"x-request-id")
        request = Request(
            self.seen, request_id, at, exchange.method, exchange.path, exchange.query, exchange.headers, body
        )
        self.requests.append(request)
        self._body_bytes += len(body)
        while len(self.requests) > self.keep or self._body_bytes > _BODIES_MOST_BYTES:
            self._body_bytes -= len(self.requests.popleft().body)
        return request

    def close(self, request: Request, status: int) -> None:
        """Charges what is to be charged."""
        self.in_flight -= 1
        request.status = status
        if not status:
            self.abandoned += 1
        elif request.charged and 200 <= status < 300:
            user = request.user if request.user in self.users or len(self.users) < _USERS_MOST else NOBODY
            for account in (self.total, self.users.setdefault(user, Sum())):
                account.add(request)
            if not request.finished:
                self.unfinished.add(request)
            return
        request.charged = False

    def shown(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "unfinished": self.unfinished,
            "users": self.users,
            "seen": self.seen,
            "in_flight": self.in_flight,
            "abandoned": self.abandoned,
        }

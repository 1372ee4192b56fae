"""Health and metrics over HTTP, the same on all three services; worker and sync serve them with nothing else.

`Health` asks the checks, at most once per `cache_s` whatever the number of probes; `StatusPages` turns a path into an
answer; `status_app` and `StatusServer` put that on a port.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self

import msgspec
import uvicorn

from sentinel_shared.clock import Clock
from sentinel_shared.errors import SentinelError
from sentinel_shared.metrics import CONTENT_TYPE
from sentinel_shared.units import format_rfc3339

CHECK_TIMEOUT_S: Final = 0.8
CACHE_S: Final = 2.0
_WATCH_EVERY_S: Final = 1.0

Check = Callable[[], Awaitable[float | None]]
"""Asks one part that the service needs: returns its latency in ms, or None to have it measured; raises when away."""

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

_log = logging.getLogger(__name__)


class CannotListen(SentinelError):
    """The service's address cannot be had; the message is the one line for the operator."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How a check went: `error` is None, or the kind of what was raised (its text may tell too much)."""

    latency_ms: float
    error: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer that is never stored by caches."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


def health_document(
    results: Mapping[str, CheckResult],
    *,
    needed: Collection[str],
    draining: bool,
    version: str,
    uptime_s: float,
    now_s: float,
    stats: Mapping[str, Any],
) -> dict[str, Any]:
    """The body of `/health`: unhealthy when a needed check fails, degraded when another does or while draining."""
    failed = {name for name, result in results.items() if result.error is not None}
    status = "unhealthy" if failed & set(needed) else "degraded" if failed or draining else "healthy"
    return {
        "status": status,
        "version": version,
        "uptime_seconds": round(uptime_s, 3),
        "timestamp": format_rfc3339(now_s),
        "checks": {name: _check_document(result) for name, result in results.items()},
        "stats": dict(stats),
    }


class Health:
    """The checks of one process. Set `draining` when the service stops taking work; it is not ready from then on.

    `needed` names the checks without which this process cannot do its work; the rest only degrades it.
    """

    def __init__(
        self,
        checks: Mapping[str, Check],
        *,
        needed: Collection[str],
        version: str,
        clock: Clock,
        stats: Callable[[], Mapping[str, Any]] = dict,
        cache_s: float = CACHE_S,
    ) -> None:
        self.draining = False
        self._checks = checks
        self._needed = frozenset(needed)
        self._version = version
        self._clock = clock
        self._stats = stats
        self._cache_s = cache_s
        self._started_s = clock.monotonic_s()
        self._results: dict[str, CheckResult] = {}
        self._asked_at_s = float("-inf")
        self._one_at_a_time = asyncio.Lock()
        self._left_behind: set[asyncio.Future[float | None]] = set()

    async def report(self) -> dict[str, Any]:
        """The body of `/health`."""
        results = await self._fresh_results()
        return health_document(
            results,
            needed=self._needed,
            draining=self.draining,
            version=self._version,
            uptime_s=self._clock.monotonic_s() - self._started_s,
            now_s=self._clock.unix_s(),
            stats=self._stats(),
        )

    async def readiness(self) -> dict[str, Any]:
        """The body of `/health/ready`: `status` is `ready`, `draining`, or `not ready` with the checks that fail."""
        if self.draining:
            return {"status": "draining"}
        results = await self._fresh_results()
        failing = {
            name: _check_document(result)
            for name, result in results.items()
            if result.error is not None and name in self._needed
        }
        return {"status": "not ready", "checks": failing} if failing else {"status": "ready"}

    async def watch(self, tell: Callable[[bool], None]) -> None:
        """Until cancelled: tell every second whether this process is ready, for a gauge that is scraped."""
        while True:
            tell((await self.readiness())["status"] == "ready")
            await self._clock.sleep(_WATCH_EVERY_S)

    async def _fresh_results(self) -> dict[str, CheckResult]:
        async with self._one_at_a_time:
            if self._clock.monotonic_s() - self._asked_at_s >= self._cache_s:
                results = await asyncio.gather(*(self._run(check) for check in self._checks.values()))
                self._results = dict(zip(self._checks, results, strict=True))
                self._asked_at_s = self._clock.monotonic_s()
            return self._results

    async def _run(self, check: Check) -> CheckResult:
        started_s, told_ms, error = self._clock.monotonic_s(), None, None
        try:
            told_ms = await self._in_time(check)
        except Exception as raised:  # noqa: BLE001 -- whatever a check raises is its verdict, never a 500 to a probe
            error = type(raised).__name__
            if not isinstance(raised, SentinelError | TimeoutError):
                _log.exception("a health check failed in an unforeseen way")
        measured_ms = (self._clock.monotonic_s() - started_s) * 1000
        return CheckResult(round(measured_ms if told_ms is None else told_ms, 3), error)

    async def _in_time(self, check: Check) -> float | None:
        # Not by asyncio.timeout, which waits on for a check that swallows its cancellation, and all probes with it.
        asking = asyncio.ensure_future(check())
        try:
            done, _ = await asyncio.wait({asking}, timeout=CHECK_TIMEOUT_S)
        finally:
            if not asking.done():
                asking.cancel()
                self._left_behind.add(asking)
                asking.add_done_callback(self._forget)
        if not done:
            raise TimeoutError
        return asking.result()

    def _forget(self, asking: asyncio.Future[float | None]) -> None:
        self._left_behind.discard(asking)
        if not asking.cancelled():
            asking.exception()  # it comes too late for anybody


class StatusPages:
    """`/health`, `/health/live`, `/health/ready` and `/metrics`, for any way of serving them."""

    def __init__(self, health: Health, metrics: Callable[[], bytes]) -> None:
        self._health = health
        self._metrics = metrics
        self._pages = {
            "/health": self._report,
            "/health/live": self._live,
            "/health/ready": self._ready,
            "/metrics": self._exposition,
        }

    async def answer(self, method: str, path: str) -> Answer:
        """The answer to a request; 404 for other paths, 405 for other methods. A HEAD's has the body of the GET."""
        page = self._pages.get(path)
        if page is None:
            return _error(404, "There is nothing here.")
        if method not in {"GET", "HEAD"}:
            return _error(405, "Only GET and HEAD are answered here.", {"allow": "GET, HEAD"})
        return await page()

    async def _live(self) -> Answer:
        return Answer(200, b'{"status":"alive"}')

    async def _ready(self) -> Answer:
        readiness = await self._health.readiness()
        return Answer(200 if readiness["status"] == "ready" else 503, msgspec.json.encode(readiness))

    async def _report(self) -> Answer:
        report = await self._health.report()
        return Answer(503 if report["status"] == "unhealthy" else 200, msgspec.json.encode(report))

    async def _exposition(self) -> Answer:
        return Answer(200, self._metrics(), CONTENT_TYPE)


def status_app(pages: StatusPages) -> App:
    """The pages as an ASGI application."""

    async def app(scope: _Scope, _receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return
        answer = await pages.answer(scope["method"], scope["path"])
        headers = {
            "content-type": answer.content_type,
            "content-length": str(len(answer.body)),
            "cache-control": "no-store",
            **answer.headers,
        }
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
        await send({"type": "http.response.body", "body": answer.body})  # uvicorn keeps back that of a HEAD

    return app


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, for uvicorn's `sockets=`; port 0 takes a free one.

    Raises CannotListen with one line that names the variable to change.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)  # also shows at once that another one listens there
    except OSError as error:
        listening.close()
        raise CannotListen(_why_not(error, host, port)) from error
    listening.set_inheritable(True)
    return listening


class StatusServer:
    """Serves an ASGI application beside the service's own work; signals stay the service's.

    Entered, it answers; left, it lets running answers finish for up to a second.
    """

    def __init__(self, app: App, listening: socket.socket) -> None:
        self._listening = listening
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port that was taken."""
        return int(self._listening.getsockname()[1])

    async def __aenter__(self) -> Self:
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listening]), name="status server")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._listening.close()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _check_document(result: CheckResult) -> dict[str, Any]:
    document: dict[str, Any] = {"status": "healthy", "latency_ms": result.latency_ms}
    if result.error is not None:
        document |= {"status": "unhealthy", "error": result.error}
    return document


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return Answer(status, msgspec.json.encode({"error": error}), headers=headers or {})


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"SENTINEL_PORT {port} is taken"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return f"SENTINEL_PORT {port} may not be used by this user"
    if isinstance(error, socket.gaierror) or error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
        return f"SENTINEL_HOST {host} is not an address of this machine"
    return f"SENTINEL_HOST {host} and SENTINEL_PORT {port} cannot be listened on: {error.strerror}"

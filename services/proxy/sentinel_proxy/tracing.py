"""OpenTelemetry traces: a span per request under /v1, and below it one for the call to the upstream.

Imported only when an endpoint is set: without one the gate and the upstream's client are the plain ones, and a client's
own `traceparent` goes upstream as it came. What is told of a request is what its line in the log tells, never content.
Spans wait in a bounded queue for a thread that hands them to the collector; those that it does not take are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import uuid4

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AnyValue

from sentinel_proxy.upstream import Answer, Call, RawHeaders, Stream, Upstream, UpstreamError, UpstreamTimeout
from sentinel_shared.logging import StormGuard

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable

    from sentinel_proxy.exchange import Receive, Scope, Send
    from sentinel_proxy.settings import Settings
    from sentinel_proxy.upstream.pool import Pool
    from sentinel_shared.clock import Clock

    App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "chat",
}
_ROUTES: Final = frozenset({*_OPERATIONS, "/v1/models", "/v1/usage"})
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OF_THE_CONTEXT: Final = frozenset({b"traceparent", b"tracestate"})
_VALUE_MAX_CHARS: Final = 256
_FLUSH_AT_CLOSE_S: Final = 3.0

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Trace:
    """What the call to the upstream hangs on; carried by the context, as it is of no concern to what lies between."""

    tracer: Tracer
    span: Span


_CURRENT: Final[ContextVar[_Trace | None]] = ContextVar("sentinel_trace", default=None)
_W3C: Final = TraceContextTextMapPropagator()


class TracedUpstream(Upstream):
    """Each call on behalf of a traced request is a span below it, whose context goes upstream in the client's place."""

    async def send(self, method: str, path: str, headers: RawHeaders, body: bytes, *, request_id: str) -> Answer:
        """As it is, in a span."""
        trace = _CURRENT.get()
        if trace is None:
            return await super().send(method, path, headers, body, request_id=request_id)
        span, headers = self._begin(trace, method, path, headers)
        try:
            answer = await super().send(method, path, headers, body, request_id=request_id)
            _answered(span, answer.status)
            return answer
        except BaseException as error:
            _failed(span, error)
            raise
        finally:
            span.end()

    def stream(
        self,
        method: str,
        path: str,
        headers: RawHeaders,
        body: bytes | AsyncIterable[bytes],
        *,
        request_id: str,
    ) -> Stream:
        """As it is, in a span that ends with the stream."""
        trace = _CURRENT.get()
        if trace is None:
            return super().stream(method, path, headers, body, request_id=request_id)
        span, headers = self._begin(trace, method, path, headers)
        call = self._call(method, path, headers, body, request_id=request_id)
        return _TracedStream(self._pool, call, span, trace.span)

    def _begin(self, trace: _Trace, method: str, path: str, headers: RawHeaders) -> tuple[Span, RawHeaders]:
        method = _method(method)
        route = _route("/v1" + path.partition("?")[0])
        known: dict[str, AnyValue] = {
            "http.request.method": method,
            "server.address": self.host,
            "server.port": self.port,
        }
        below = set_span_in_context(trace.span)
        span = trace.tracer.start_span(f"{method} {route.removeprefix('/v1')}", below, SpanKind.CLIENT, known)
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(span))
        kept = [header for header in headers if header[0] not in _OF_THE_CONTEXT]
        return span, kept + [(name.encode(), value.encode()) for name, value in carrier.items()]


class _TracedStream(Stream):
    __slots__ = ("_above", "_span")

    def __init__(self, pool: Pool, call: Call, span: Span, above: Span) -> None:
        super().__init__(pool, call)
        self._span = span
        self._above = above

    async def __aenter__(self) -> Self:
        try:
            await super().__aenter__()
        except BaseException as error:
            _failed(self._span, error)
            self._span.end()
            raise
        _answered(self._span, self.status)
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            await super().__aexit__(*exc)
        finally:
            self._span.end()

    async def read(self) -> bytes | None:
        try:
            return await super().read()
        except UpstreamError as error:
            # The client has a 200 by now, so that only this tells.
            _failed(self._span, error)
            _failed(self._above, error)
            raise

    async def read_all(self) -> bytes:
        try:
            return await super().read_all()
        except UpstreamError as error:
            _failed(self._span, error)
            raise


class Tracing:
    """One per process. Nothing in it raises, and nothing waits for the collector but `close`."""

    upstream = TracedUpstream

    def __init__(self, provider: TracerProvider) -> None:
        self.reports = [self._describe]
        self._provider = provider
        self._tracer = provider.get_tracer("sentinel-proxy")

    @classmethod
    def open(cls, settings: Settings, url: str, *, version: str, clock: Clock) -> Self:
        """Starts the thread that sends to `url`, OTLP over HTTP; the collector need not be there."""
        _log_once_per_s(clock)
        told = {"service.name": settings.otel_service_name, "service.version": version}
        provider = TracerProvider(
            sampler=_sampler(settings.otel_traces_sampler.value, settings.otel_traces_sampler_arg),
            resource=Resource.create({**told, "service.instance.id": str(uuid4()), "process.pid": os.getpid()}),
            span_limits=SpanLimits(max_span_attribute_length=_VALUE_MAX_CHARS),
            shutdown_on_exit=False,  # it would wait for the collector for up to half a minute
        )
        exporter = OTLPSpanExporter(
            url,
            certificate_file=str(settings.otlp_certificate) if settings.otlp_certificate else None,
            headers=dict(settings.otlp_headers or ()),
        )
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    async def close(self) -> None:
        """Hands over what waits; gives up after 3 s."""
        loop, handed_over = asyncio.get_running_loop(), asyncio.Event()

        def hand_over() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # too late, the loop is closed
                loop.call_soon_threadsafe(handed_over.set)

        threading.Thread(target=hand_over, daemon=True).start()
        with suppress(TimeoutError):
            await asyncio.wait_for(handed_over.wait(), _FLUSH_AT_CLOSE_S)

    def around(self, app: App) -> App:
        """The app, each request in a span; its parent is the client's where the client has one."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            method = _method(scope["method"])
            known: dict[str, AnyValue] = {"http.request.method": method, "url.scheme": scope.get("scheme", "http")}
            parent = _W3C.extract(_context_headers(scope["headers"]))
            span = self._tracer.start_span(method, parent, SpanKind.SERVER, known)
            token = _CURRENT.set(_Trace(self._tracer, span))
            try:
                await app(scope, receive, send)
            finally:
                _CURRENT.reset(token)
                span.end()

        return traced

    def _describe(self, fields: dict[str, Any]) -> None:
        """Told of a request, within it, when it is over: `fields` of its line in the log, which gets a `trace_id`."""
        trace = _CURRENT.get()
        if trace is None:
            return
        span = trace.span
        fields["trace_id"] = format(span.get_span_context().trace_id, "032x")
        if span.is_recording():
            route = _route(fields["path"])
            span.update_name(f"{_method(fields['method'])} {route}")
            span.set_attributes(_attributes(fields, route))
            if fields["status"] >= 500:
                span.set_status(Status(StatusCode.ERROR))


def _attributes(fields: dict[str, Any], route: str) -> dict[str, str | int]:
    """What a span says of a request, in the words of the semantic conventions."""
    status = fields["status"]
    told: dict[str, str | int] = {
        "http.route": route,
        "http.response.status_code": status,
        "url.path": fields["path"],
        "sentinel.request_id": fields["request_id"],
        "sentinel.decision": fields["decision"],
        "enduser.id": fields["external_id"],
    }
    if status >= 400:
        told["error.type"] = fields["error"] or str(status)
    operation = _OPERATIONS.get(route)
    if operation is not None:
        # The API that is spoken; whose model it is, its name tells.
        told |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "openai"}
        told["gen_ai.request.model"] = fields["model"]
    if fields["input_tokens"] or fields["output_tokens"]:
        told["gen_ai.usage.input_tokens"] = fields["input_tokens"]
        told["gen_ai.usage.output_tokens"] = fields["output_tokens"]
    return {name: value for name, value in told.items() if value != ""}


def _answered(span: Span, status: int) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 400:
        span.set_attribute("error.type", str(status))
        span.set_status(Status(StatusCode.ERROR))


def _failed(span: Span, error: BaseException) -> None:
    kind = type(error).__name__
    if isinstance(error, UpstreamError):
        kind = "timeout" if isinstance(error, UpstreamTimeout) else "unreachable"
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def _route(path: str) -> str:
    """One of few: a path that is made of a client's words names no span."""
    if path in _ROUTES:
        return path
    return "/v1/models/{model}" if path.startswith("/v1/models/") else "/v1/{path}"


def _method(method: str) -> str:
    return method if method in _METHODS else "_OTHER"


def _context_headers(headers: RawHeaders) -> dict[str, list[str]]:
    carrier: dict[str, list[str]] = {}
    for name, value in headers:
        if name in _OF_THE_CONTEXT:
            carrier.setdefault(name.decode(), []).append(value.decode("latin-1"))
    return carrier


def _sampler(name: str, ratio: float) -> Sampler:
    roots = {"always_on": ALWAYS_ON, "always_off": ALWAYS_OFF, "traceidratio": TraceIdRatioBased(ratio)}
    root = roots[name.removeprefix("parentbased_")]
    return ParentBased(root) if name.startswith("parentbased_") else root


class _OncePerSecond(logging.Handler):
    """The library's complaints, of which there are several for each batch, through a storm guard."""

    def __init__(self, guard: StormGuard) -> None:
        super().__init__(logging.WARNING)
        self._guard = guard

    def emit(self, record: logging.LogRecord) -> None:
        self._guard.log_once_per_s(logging.WARNING, "traces", f"traces: {record.getMessage()}")


def _log_once_per_s(clock: Clock) -> None:
    library = logging.getLogger("opentelemetry")
    library.handlers[:] = [_OncePerSecond(StormGuard(_log, clock.monotonic_s))]
    library.propagate = False
    # Of the rest, some quote what clients send, and "Queue full" would cost every request whose span is dropped.
    library.setLevel(logging.CRITICAL)
    logging.getLogger("opentelemetry.sdk").setLevel(logging.ERROR)
    logging.getLogger("opentelemetry.exporter").setLevel(logging.WARNING)

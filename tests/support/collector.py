"""An OpenTelemetry collector for tests: OTLP over HTTP, decoded by the protocol's own classes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class Seen:
    """A span as it came in; ids in hex."""

    kind: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    failed: bool
    took_ms: float
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector:
    """As a context manager. One that is `deaf` takes a request and never answers."""

    def __init__(self, *, deaf: bool = False) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self._ended = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if deaf:
                    collector._ended.wait()
                    return
                assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
                collector.bodies.append(body)
                collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def spans(self, kind: str, **attributes: Any) -> list[Seen]:
        """All that came of this kind (`server`, `client`) with these attributes, `_` standing for `.`."""
        wanted = {name.replace("_", "."): value for name, value in attributes.items()}
        return [
            span
            for body in list(self.bodies)
            for span in _decoded(body)
            if span.kind == kind and wanted.items() <= span.attributes.items()
        ]


def _decoded(body: bytes) -> list[Seen]:
    return [
        Seen(
            kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
            name=span.name,
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            state=span.trace_state,
            failed=span.status.code == 2,
            took_ms=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e6,
            attributes=_values(span.attributes),
            resource=_values(resource.resource.attributes),
        )
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}

"""Every other path under /v1: streamed both ways, counted as a request, and as tokens where the answer has any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from sentinel_proxy.denials import ANY_REQUEST
from sentinel_proxy.errors import method_not_allowed, unknown_url
from sentinel_proxy.exchange import ClientGone
from sentinel_proxy.relaying import Abandonment, of_a_stream
from sentinel_proxy.sse import USAGE_TAIL_BYTES, SseRelay, Usage, find_usage, find_usage_in_tail
from sentinel_proxy.toolbox import ACCOUNT_STATUSES, account_refused, as_answer, authenticate
from sentinel_proxy.upstream import UpstreamError
from sentinel_shared.accounts import Cost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sentinel_proxy.exchange import Exchange, Served
    from sentinel_proxy.meter import Running
    from sentinel_proxy.tokens import Kind
    from sentinel_proxy.toolbox import Toolbox
    from sentinel_proxy.upstream import Stream

_USAGE_BODY_MAX_BYTES: Final = 16 * 1024 * 1024
_BODYLESS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
# Not TRACE, whose answer would show the gateway's key.
_METHODS: Final = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")


async def serve(tools: Toolbox, exchange: Exchange, served: Served) -> None:
    """Answer one request. Raises ApiError, Denied and ClientGone."""
    _, external_id = await authenticate(tools, exchange)
    served.external_id = external_id
    path = upstream_path(exchange.path)
    if path is None:
        raise unknown_url(exchange.method, exchange.path)
    if exchange.method not in _METHODS:
        raise method_not_allowed(exchange.method, exchange.path, allowed=_METHODS)
    max_bytes = tools.settings.max_body_bytes
    exchange.check_length(max_bytes=max_bytes)
    tools.limiter.check_denials(external_id, ANY_REQUEST)
    rid = tools.new_rid()
    admission = await tools.limiter.admit(rid=rid, external_id=external_id, cost=Cost(0, 0, 0))
    served.decision = "allow"
    running = tools.meter.begin(
        rid=rid, external_id=external_id, request_id=exchange.request_id, model="", endpoint="passthrough"
    )
    if exchange.query:
        path += "?" + exchange.query.decode("latin-1")
    bodyless = exchange.method in _BODYLESS
    try:
        with Abandonment(exchange, tools.settings.disconnect_drain_s) as abandonment:
            if bodyless:
                abandonment.watch()
            async with tools.upstream.stream(
                exchange.method,
                path,
                exchange.headers,
                b"" if bodyless else _read_and_watched(exchange, abandonment, max_bytes=max_bytes),
                request_id=exchange.request_id,
            ) as stream:
                await _deliver(tools, exchange, stream, running, admission.headers, abandonment=abandonment)
    except UpstreamError as error:
        if tools.meter.holds(running):
            tools.meter.refund(running, reached=error.reached)
        await exchange.refuse(as_answer(error), admission.headers)
    except BaseException as error:
        if tools.meter.holds(running):
            if isinstance(error, ClientGone) and abandonment.given_up:
                # The upstream had it all, and was waited for in vain.
                tools.meter.charge(running, input_tokens=0, output_tokens=0)
            else:
                tools.meter.refund(running, reached=True)
        raise


async def _read_and_watched(exchange: Exchange, abandonment: Abandonment, *, max_bytes: int) -> AsyncIterator[bytes]:
    """The request's body; the client can be watched when all of it is here."""
    async for piece in exchange.body_pieces(max_bytes=max_bytes):
        yield piece
    abandonment.watch()


async def _deliver(
    tools: Toolbox,
    exchange: Exchange,
    stream: Stream,
    running: Running,
    headers: list[tuple[bytes, bytes]],
    *,
    abandonment: Abandonment,
) -> None:
    if stream.status in ACCOUNT_STATUSES:
        tools.meter.refund(running, reached=True)
        await exchange.refuse(account_refused(tools, stream.status), headers)
        return
    if stream.status >= 400:
        tools.meter.refund(running, reached=True)
    reader = _UsageReader(stream)
    headers = stream.headers + headers
    try:
        await exchange.start(stream.status, headers if reader.relay is None else of_a_stream(headers))
        while (chunk := await stream.read()) is not None:
            reader.feed(chunk)
            if not abandonment.begun:
                await exchange.send(chunk)
            elif not reader.may_tell_usage or abandonment.exceeds(reader.read_bytes):
                return
        await exchange.end()
    finally:
        abandonment.end()
        if tools.meter.holds(running):
            tools.meter.soon(running, _charge(tools, exchange.path, running, reader))


async def _charge(tools: Toolbox, path: str, running: Running, reader: _UsageReader) -> None:
    usage = reader.usage()
    output_tokens = 0
    if usage is None and reader.relay is not None and reader.relay.started:
        kind: Kind = "responses" if "/responses" in path else "chat"
        relay = reader.relay
        output_tokens = await tools.counter.count_output(
            kind, relay.events(), "", events_bytes=relay.read_bytes - relay.unread_bytes
        )
    usage = usage or Usage(0, output_tokens)
    tools.meter.charge(running, input_tokens=usage.input_tokens, output_tokens=usage.output_tokens)


class _UsageReader:
    """Looks over an answer's shoulder: a stream of events, or JSON, of which long ones are only known by their end."""

    def __init__(self, stream: Stream) -> None:
        kind = dict(stream.headers).get(b"content-type", b"")
        self.relay = SseRelay(hides_usage=False) if b"event-stream" in kind else None
        self._json: list[bytes] | None = [] if b"json" in kind else None
        self.read_bytes = 0

    @property
    def may_tell_usage(self) -> bool:
        """Whether what is still to come can have usage in it."""
        return self.relay is not None or self._json is not None

    def feed(self, chunk: bytes) -> None:
        self.read_bytes += len(chunk)
        if self.relay is not None:
            self.relay.feed(chunk)
        elif self._json is not None:
            self._json.append(chunk)
            if self._is_long:
                self._json = [b"".join(self._json)[-USAGE_TAIL_BYTES:]]

    def usage(self) -> Usage | None:
        if self.relay is not None:
            return self.relay.usage
        kept = b"".join(self._json or ())
        return find_usage_in_tail(kept) if self._is_long else find_usage(kept)

    @property
    def _is_long(self) -> bool:
        return self.read_bytes > _USAGE_BODY_MAX_BYTES


def upstream_path(path: str) -> str | None:
    """The path under the upstream's base URL; None for one that would leave it, or that is no path of the API."""
    rest = path.removeprefix("/v1")
    segments = rest.split("/")
    if (
        rest == path
        or any(segment in {".", ".."} for segment in segments)
        or "\\" in rest
        or "?" in rest
        or "#" in rest
    ):
        return None
    return quote(rest, safe="/:@!$&'()*+,;=-._~")

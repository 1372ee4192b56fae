"""One HTTP exchange as ASGI gives it: the request read within bounds, the answer sent, the client's going noticed."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from sentinel_proxy.errors import ApiError, body_too_large, invalid_request, render, unknown_encoding

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_NOTICED_AFTER_S: Final = 0.05
"""A task per request costs 20 us: an answer that comes sooner goes without."""
_REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")


@dataclass(slots=True)
class Served:
    """What is known of a request when it is over, for its metrics and its line in the log."""

    endpoint: str
    external_id: str = ""
    model: str = ""
    decision: str = ""
    """The limits' word on it: `allow`, `deny`; empty when they were not asked."""
    input_tokens: int = 0
    output_tokens: int = 0
    own_s: float = 0.0


class ClientGone(Exception):
    """The client left before it had sent its whole request, or before an answer to it had come."""


class Exchange:
    """`request_id` is the client's own where it is fit for a header, else `fallback_id`."""

    __slots__ = (
        "_left",
        "_receive",
        "_send",
        "error",
        "extra_headers",
        "headers",
        "method",
        "path",
        "query",
        "request_id",
        "started",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, fallback_id: str) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.headers: Headers = scope["headers"]
        self._receive = receive
        self._send = send
        self._left: asyncio.TimerHandle | asyncio.Task[None] | None = None
        self.started = False
        self.status = 0
        self.error = ""
        self.extra_headers: Headers = []
        own = self.header(b"x-request-id")
        self.request_id = own.decode() if own is not None and _REQUEST_ID.fullmatch(own) else fallback_id

    def header(self, name: bytes) -> bytes | None:
        """The first header of that (lower-case) name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    async def body(self, *, max_bytes: int) -> bytes:
        """The whole request body, unpacked where it came packed. Raises ApiError (400, 413, 415) and ClientGone."""
        self.check_length(max_bytes=max_bytes)
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientGone
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            pieces = [body]
            pieces += [piece async for piece in self.body_pieces(max_bytes=max_bytes, read_bytes=len(body))]
            body = b"".join(pieces)
        if len(body) > max_bytes:
            raise body_too_large(max_bytes)
        packing = self.header(b"content-encoding")
        if packing is None or packing.lower() == b"identity":
            return body
        self.headers = [header for header in self.headers if header[0] != b"content-encoding"]
        # Never on the loop: a few bytes may stand for as many as are allowed.
        return await asyncio.to_thread(_unpacked, body, packing.decode("latin-1"), max_bytes=max_bytes)

    async def body_pieces(self, *, max_bytes: int, read_bytes: int = 0) -> AsyncIterator[bytes]:
        """The rest of the body as it comes, `read_bytes` of it having been read. Raises as `body` does."""
        spare_bytes = max_bytes - read_bytes
        more = True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            piece: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            spare_bytes -= len(piece)
            if spare_bytes < 0:
                raise body_too_large(max_bytes)
            if piece:
                yield piece

    def check_length(self, *, max_bytes: int) -> None:
        """Raises ApiError (413) when the announced length is too much."""
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > max_bytes:
            raise body_too_large(max_bytes)

    async def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """A whole answer; a HEAD gets no body."""
        kept = [header for header in headers if header[0] != b"content-length"]
        if status != HTTPStatus.NO_CONTENT:
            kept.append((b"content-length", b"%d" % len(body)))
        await self.start(status, kept)
        await self._send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    async def refuse(self, error: ApiError, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """The error in OpenAI's envelope; too late once an answer has started."""
        if not self.started:
            self.error = error.code or error.type
            await self.answer(*render(error, headers=headers))

    async def start(self, status: int, headers: Headers) -> None:
        """Status and headers of an answer whose body follows in pieces."""
        self.started = True
        self.status = status
        headers = [*headers, (b"x-request-id", self.request_id.encode()), *self.extra_headers]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send(self, piece: bytes) -> None:
        """The next piece; waits while the client is slow."""
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        """No more pieces."""
        await self._send({"type": "http.response.body", "body": b""})

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Calls back, within 50 ms, when the client leaves before `forget_client`; the request must have been read."""
        loop = asyncio.get_running_loop()
        self._left = loop.call_later(_NOTICED_AFTER_S, self._start_watching, callback)

    def forget_client(self) -> None:
        """Its leaving does not matter any more."""
        if self._left is not None:
            self._left.cancel()
            self._left = None

    def _start_watching(self, callback: Callable[[], None]) -> None:
        self._left = asyncio.create_task(self._watch(callback))

    async def _watch(self, callback: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        callback()


def _unpacked(body: bytes, packing: str, *, max_bytes: int) -> bytes:
    if packing.lower() not in {"gzip", "x-gzip", "deflate"}:
        raise unknown_encoding(packing)
    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, as its header says
    try:
        whole = unpacking.decompress(body, max_bytes + 1)
    except zlib.error:
        raise invalid_request("The body of your request cannot be unpacked.", code="invalid_content_encoding") from None
    if len(whole) > max_bytes:
        raise body_too_large(max_bytes)
    if not unpacking.eof or unpacking.unused_data:
        raise invalid_request(
            "The body of your request ends too early, or more follows its end.", code="invalid_content_encoding"
        )
    return whole

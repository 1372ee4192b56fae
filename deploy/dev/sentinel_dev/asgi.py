"""One HTTP request of a simulator and its answer, on bare ASGI: others are measured against it, so it stays lean."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

import msgspec

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

JSON: Final = b"application/json"
# Shorter pauses only look for a closed connection afterwards: a task for each would cost more than what is simulated.
_SHORT_PAUSE_S: Final = 0.1


class BodyTooLarge(Exception):
    """More bytes came than the simulator takes; all were read, none were kept."""


class Closing:
    """Whether a simulator is being stopped: pauses then last no longer, what hangs hangs up, so that all can end."""

    def __init__(self) -> None:
        self.now = False
        self._wakers: set[asyncio.Event] = set()

    def set(self) -> None:
        """To be called on the loop that serves."""
        self.now = True
        for waker in self._wakers:
            waker.set()

    async def wait(self) -> None:
        if not self.now:
            waker = asyncio.Event()
            self._wakers.add(waker)
            try:
                await waker.wait()
            finally:
                self._wakers.discard(waker)


class Exchange:
    """A request as it came, and the means to answer it, or to fail to."""

    __slots__ = ("_closing", "_receive", "_send", "headers", "method", "path", "query", "scope", "started", "status")

    def __init__(self, scope: Scope, receive: Receive, send: Send, closing: Closing) -> None:
        self._receive = receive
        self._send = send
        self._closing = closing
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.started = False
        self.status = 0

    def header(self, name: bytes) -> str:
        """The first header of that lower-case name, or ""."""
        for key, value in self.headers:
            if key == name:
                return value.decode("latin-1")
        return ""

    async def body(self, most_bytes: int) -> bytes:
        """The whole body; raises BodyTooLarge."""
        message = await self._receive()
        if not message.get("more_body", False):
            only: bytes = message.get("body", b"")
            if len(only) > most_bytes:
                raise BodyTooLarge
            return only
        parts = [message.get("body", b"")]
        size = len(parts[0])
        while message.get("more_body", False):
            message = await self._receive()
            part = message.get("body", b"")
            size += len(part)
            parts.append(part)
            if size > most_bytes:
                parts.clear()
        if size > most_bytes:
            raise BodyTooLarge
        return b"".join(parts)

    async def answer(self, status: int, body: bytes, content_type: bytes = JSON, headers: Headers = ()) -> None:
        """The whole answer at once."""
        self.started = True
        self.status = status
        length = (b"content-length", str(len(body)).encode())
        start = [(b"content-type", content_type), length, *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": start})
        await self._send({"type": "http.response.body", "body": body})

    async def answer_json(self, status: int, value: Any, headers: Headers = ()) -> None:
        await self.answer(status, msgspec.json.encode(value), headers=headers)

    async def start(self, status: int, content_type: bytes, headers: Headers = ()) -> None:
        """The head of an answer whose body comes in pieces by `write`, up to `end`."""
        self.started = True
        self.status = status
        start = [(b"content-type", content_type), *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": start})

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    @property
    def gone(self) -> bool:
        """Whether the client closed the connection, as far as the server has noticed."""
        # uvicorn's `send` belongs to the exchange that knows; ASGI itself has no cheap way to ask.
        return bool(getattr(getattr(self._send, "__self__", None), "disconnected", False))

    @property
    def closing(self) -> bool:
        return self._closing.now

    async def pause(self, seconds: float) -> bool:
        """Waits, but no longer than the client does, nor than the simulator runs; returns whether the client left."""
        if seconds <= _SHORT_PAUSE_S:
            await asyncio.sleep(0 if self._closing.now else max(seconds, 0))
            return self.gone
        return await self._until_gone(seconds)

    async def hang(self) -> None:
        """Nothing, until the client leaves; hangs up on it when the simulator is stopped."""
        if not await self._until_gone(None):
            await self.hang_up()

    async def _until_gone(self, timeout_s: float | None) -> bool:
        gone = asyncio.ensure_future(self._disconnected())
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({gone, closing}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            return gone.done()
        finally:
            gone.cancel()
            closing.cancel()

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def hang_up(self) -> None:
        """Closes the connection as a crash would: no answer, or the rest of it missing.

        In process, where there is no connection, raises what httpx makes of one that closed.
        """
        transport = getattr(getattr(self._send, "__self__", None), "transport", None)
        if transport is None:
            import httpx  # noqa: PLC0415  only in process, where httpx is the client; it would slow the start down

            raise httpx.RemoteProtocolError("Server disconnected without sending a complete response.")
        transport.close()
        await self._disconnected()


async def serve_lifespan(receive: Receive, send: Send) -> None:
    """ASGI's start and stop, with nothing to do at either."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return

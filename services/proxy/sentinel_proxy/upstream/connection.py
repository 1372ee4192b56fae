"""One HTTP/1.1 connection to the upstream: one request at a time, each answer read as it comes."""

from __future__ import annotations

import asyncio
import math
import re
import select
from typing import TYPE_CHECKING, Final, cast

import httptools

from sentinel_proxy.upstream.failures import UpstreamError, broke, silent

if TYPE_CHECKING:
    from collections.abc import Callable

_UNREAD_MAX_BYTES: Final = 256 * 1024
"""So much of a stream may wait for a slow client; then the upstream has to wait, too."""
_JOINED_MAX_BYTES: Final = 16 * 1024
"""Beyond it a copy costs more than a second buffer."""
_AT_ONCE_MAX_BYTES: Final = 128 * 1024
_PIECE_BYTES: Final = 64 * 1024
"""Megabytes written at once keep everybody else waiting: 3.4 ms for 2 MB, 0.4 in pieces."""
_HEAD_MAX_BYTES: Final = 256 * 1024
_KEEP_S: Final = 50.0
"""Most servers keep a free connection for a minute: whoever hangs up first sends no request to a closed door."""
_TIMEOUT: Final = re.compile(rb"timeout=(\d{1,9})")

_NOTHING: Final = memoryview(b"")

_HEAD: Final = 1
_BYTES: Final = 2
_END: Final = 3


class Connection(asyncio.Protocol):
    """Made, then free and busy by turns; lost at last, of which `on_lost` is told once.

    Whoever holds it asks with `begin`, and waits for what comes back, one waiter at a time: `head`, then `read` until
    it gives None, or `read_all`. What fails, fails with UpstreamError, now and in every later call.
    """

    __slots__ = (
        "_body_goes_on",
        "_close_at_s",
        "_ended",
        "_error",
        "_has_head",
        "_head_bytes",
        "_is_head",
        "_keeps_alive",
        "_loop",
        "_news",
        "_on_lost",
        "_parser",
        "_paused",
        "_pieces",
        "_room",
        "_transport",
        "_unread_bytes",
        "_unwritten",
        "_waiter",
        "_waits_for",
        "busy",
        "headers",
        "last_s",
        "status",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, on_lost: Callable[[Connection], None]) -> None:
        self._loop = loop
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._room: asyncio.Future[None] | None = None
        """Set while the socket takes no more of a request."""
        self._waiter: asyncio.Future[None] | None = None
        self._waits_for = 0
        self._news: select.poll | None = None
        """Asks the system for what the loop has not read yet."""
        self._error: UpstreamError | None = None
        self._paused = False
        self.busy = False
        self.last_s = loop.time()
        """When something last went on, by the loop's clock."""
        self._close_at_s = math.inf
        self._pieces: list[bytes] = []
        self._forget_answer(is_head=False)

    def _forget_answer(self, *, is_head: bool) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._is_head = is_head
        self._head_bytes = 0
        self._has_head = False
        self._pieces = []
        self._unread_bytes = 0
        self._ended = False
        self._keeps_alive = False
        self._body_goes_on = False
        self._unwritten = _NOTHING

    # --- the request ---

    @property
    def usable(self) -> bool:
        """Whether it can take a request now."""
        return self._error is None and self._transport is not None and not self._transport.is_closing()

    def still_usable(self) -> bool:
        """The same of one that has rested; ends it where it is too old, or has news.

        A server that hangs up right after its answer is often met before the loop gets to read that; whatever else
        may have come is of no good either.
        """
        if not self.usable:
            return False
        if self._news is None:
            self._news = select.poll()
            sock = cast("asyncio.Transport", self._transport).get_extra_info("socket")
            self._news.register(sock.fileno(), select.POLLIN)
        if self._loop.time() >= self._close_at_s or self._news.poll(0):
            self.abort()
            return False
        return True

    def begin(self, head: bytes, body: bytes, *, is_head: bool = False, more: bool = False) -> None:
        """Write a request, whole, or with `more` of its body to come; the answer may begin at any time from now."""
        self._forget_answer(is_head=is_head)
        self.busy = True
        self.last_s = self._loop.time()
        self._body_goes_on = more
        transport = cast("asyncio.Transport", self._transport)
        if len(body) <= _JOINED_MAX_BYTES:
            transport.write(head + body)
        elif len(body) <= _AT_ONCE_MAX_BYTES:
            transport.writelines((head, body))
        else:
            transport.write(head)
            self._unwritten = memoryview(body)
            self._write_on()

    def _write_on(self) -> None:
        """A piece of the body each turn of the loop, while the upstream takes them."""
        unwritten = self._unwritten
        if self._error is None and unwritten:
            self.last_s = self._loop.time()
            cast("asyncio.Transport", self._transport).write(unwritten[:_PIECE_BYTES])
            self._unwritten = unwritten[_PIECE_BYTES:]
            if self._unwritten and self._room is None:
                self._loop.call_soon(self._write_on)

    async def go_on(self, piece: bytes) -> None:
        """More of the request's body, as it is to stand on the wire; waits while the upstream is slow to take it."""
        if self._room is not None:
            await self._room
        if self._error is not None:
            raise self._error
        self.last_s = self._loop.time()
        cast("asyncio.Transport", self._transport).write(piece)

    def body_ends(self) -> None:
        """The request has been written whole."""
        self._body_goes_on = False

    # --- the answer ---

    async def head(self) -> None:
        """Until `status` and `headers` are there, names in lower case."""
        if not self._has_head:
            await self._wait(_HEAD)

    async def read(self) -> bytes | None:
        """All that has come since; None at the end."""
        if not self._pieces:
            if not self._ended:
                await self._wait(_BYTES)
            if not self._pieces:
                return None
        return self._take()

    async def read_all(self) -> bytes:
        """The rest, when it is complete."""
        if not self._ended:
            self._resume()
            await self._wait(_END)
        return self._take() if self._pieces else b""

    def _take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        self._unread_bytes = 0
        if self._paused:
            self._resume()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _resume(self) -> None:
        if self._paused and self._error is None:
            self._paused = False
            self.last_s = self._loop.time()
            cast("asyncio.Transport", self._transport).resume_reading()

    async def _wait(self, for_what: int) -> None:
        if self._error is not None:
            raise self._error
        self._waits_for = for_what
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # --- its end ---

    @property
    def reusable(self) -> bool:
        """Whether request and answer are complete, and both sides keep the connection."""
        return (
            self._ended
            and self._keeps_alive
            and not self._body_goes_on
            and not self._unwritten
            and not self._pieces
            and self.usable
            and not cast("asyncio.Transport", self._transport).get_write_buffer_size()
        )

    def rest(self) -> None:
        """Free, until the next `begin`."""
        self.busy = False
        self.last_s = self._loop.time()
        self._close_at_s = self.last_s + _kept_s(self.headers)

    def check_silence(self, now_s: float, *, idle_timeout_s: float) -> None:
        """Ends what has been silent for too long, whether an answer is awaited or nothing."""
        if not self.busy:
            if now_s >= self._close_at_s:
                self.abort()
        elif now_s - self.last_s >= idle_timeout_s and not self._paused:
            self._fail(silent())

    def abort(self) -> None:
        """Whatever is under way, nothing more goes out or comes in."""
        if self._error is None:
            self._error = broke("it was left")
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, error: UpstreamError) -> None:
        if self._error is None:
            self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._error)
        self.abort()

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._close_at_s = self._loop.time() + _KEEP_S

    def data_received(self, data: bytes) -> None:
        self.last_s = self._loop.time()
        if not self.busy:
            self.abort()  # nothing was asked for
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._ended:
                self._fail(broke(f"what came is no answer: {type(error).__name__}"))
                return
            self._keeps_alive = False  # more came than was asked for
        if not self._has_head:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_MAX_BYTES:
                self._fail(broke("its headers have no end"))
            return
        waiter = self._waiter
        if waiter is not None:
            wanted = self._waits_for
            if (
                self._ended or (wanted == _BYTES and self._pieces) or (wanted == _HEAD and self._has_head)
            ) and not waiter.done():
                waiter.set_result(None)
        if self._unread_bytes > _UNREAD_MAX_BYTES and not self._paused and not (waiter and self._waits_for == _END):
            self._paused = True
            cast("asyncio.Transport", self._transport).pause_reading()

    def eof_received(self) -> None:
        if self._has_head and self._lasts_until_eof():
            self._ended = True
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        # Whatever of the request is still to be written, nobody waits until that is.
        self._fail(broke("the upstream hung up"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(broke("the upstream hung up" if exc is None else type(exc).__name__))
        self._on_lost(self)

    def pause_writing(self) -> None:
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None
        self.last_s = self._loop.time()
        self._write_on()

    # --- httptools' side ---

    def on_message_begin(self) -> None:
        if self._ended:
            self._keeps_alive = False  # a second answer to one request
            raise ValueError

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # else a trailer
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self.headers = []  # a provisional answer: the one that counts is still to come
            return
        self.status = status
        self._has_head = True
        if self._is_head:
            self._ended = True  # httptools waits for the body that its headers speak of: not to be used again

    def on_body(self, piece: bytes) -> None:
        if not self._ended:
            self._pieces.append(piece)
            self._unread_bytes += len(piece)

    def on_message_complete(self) -> None:
        if self._has_head and not self._ended:
            self._ended = True
            self._keeps_alive = self._parser.should_keep_alive()

    def _lasts_until_eof(self) -> bool:
        return not any(name in {b"content-length", b"transfer-encoding"} for name, _ in self.headers)


def _kept_s(headers: list[tuple[bytes, bytes]]) -> float:
    """How long a free connection is kept: a little less than the server tells, in `Keep-Alive: timeout=5`."""
    for name, value in headers:
        if name == b"keep-alive" and (found := _TIMEOUT.search(value)):
            return min(_KEEP_S, max(0.0, int(found[1]) - 1.0))
    return _KEEP_S

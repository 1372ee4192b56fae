"""The OpenAI-compatible gateway: what it is sent of a client's request, and what of its answer goes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import urlsplit

from sentinel_proxy.upstream.dialer import Dialer
from sentinel_proxy.upstream.failures import broke
from sentinel_proxy.upstream.pool import Pool
from sentinel_proxy.upstream.unpacking import Unpacking, unpacked

if TYPE_CHECKING:
    from collections.abc import AsyncIterable
    from pathlib import Path

    from sentinel_proxy.upstream.connection import Connection

RawHeaders = list[tuple[bytes, bytes]]

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NEVER_SENT: Final = _HOP_BY_HOP | {
    b"authorization",
    b"cookie",
    b"host",
    b"content-length",
    b"accept-encoding",
    b"expect",
    b"x-request-id",
    b"api-key",
    b"x-api-key",
}
"""The caller's credentials and what concerns the caller's connection alone."""
_NEVER_RETURNED: Final = _HOP_BY_HOP | {b"set-cookie", b"x-request-id", b"date", b"server", b"x-accel-buffering"}
_OWN_PREFIXES: Final = (b"x-ratelimit-", b"access-control-")
"""The gateway's account limits are not the caller's; whom a browser may talk to is Sentinel's to say."""
_BODILESS: Final = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: `headers` without those of the connection, names in lower case."""

    status: int
    headers: RawHeaders
    body: bytes


@dataclass(frozen=True, slots=True)
class Call:
    """A request as it goes onto the wire; a body in pieces is `body_bytes` long, or goes in chunks."""

    head: bytes
    body: bytes | AsyncIterable[bytes]
    body_bytes: int | None = None
    is_head: bool = False


class Stream:
    """An answer whose body is still coming. As a context manager: leaving it frees its place at once."""

    __slots__ = ("_call", "_connection", "_pool", "_unpacking", "headers", "status")

    def __init__(self, pool: Pool, call: Call) -> None:
        self._pool = pool
        self._call = call

    async def __aenter__(self) -> Self:
        self._connection = connection = await self._pool.take()
        try:
            await _ask(connection, self._call)
            self.status = connection.status
            self.headers, self._unpacking = _returned(connection.headers)
        except BaseException:
            connection.abort()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        connection = self._connection
        del self._connection  # whoever reads too late must not read the next call's answer
        self._pool.give_back(connection)

    async def read(self) -> bytes | None:
        """The next bytes as they come; None at the end. Raises UpstreamTimeout, UpstreamUnreachable."""
        chunk = await self._connection.read()
        return chunk if self._unpacking is None else await self._unpacked(self._unpacking, chunk)

    async def _unpacked(self, unpacking: Unpacking, chunk: bytes | None) -> bytes | None:
        while chunk is not None:
            if out := unpacking.feed(chunk):
                return out
            chunk = await self._connection.read()
        unpacking.end()
        return None

    async def read_all(self) -> bytes:
        """The rest of the body. Raises as `read` does."""
        rest = await self._connection.read_all()
        return rest if self._unpacking is None else self._unpacking.whole(rest)


class Upstream:
    """One per process; connections are kept alive and bounded in number."""

    def __init__(self, pool: Pool, dialer: Dialer, *, base_path: str, api_key: str) -> None:
        self.host = dialer.host
        self.port = dialer.port
        self._pool = pool
        self._base = dialer.target_prefix + base_path
        self._always = f"host: {dialer.authority}\r\nauthorization: Bearer {api_key}\r\naccept-encoding: identity\r\n"
        if dialer.proxy_authorization:
            self._always += f"proxy-authorization: {dialer.proxy_authorization}\r\n"
        self._own_lines = 2 + self._always.count("\r\n")

    @classmethod
    def open(
        cls,
        *,
        base_url: str,
        api_key: str,
        connect_timeout_s: float,
        idle_timeout_s: float,
        max_connections: int,
        ca_file: Path | None,
    ) -> Self:
        """Connects nowhere yet. Raises SettingsError for certificates or a proxy that are of no use."""
        dialer = Dialer(base_url, connect_timeout_s=connect_timeout_s, ca_file=ca_file)
        pool = Pool(dialer, max_connections=max_connections, wait_s=connect_timeout_s, idle_timeout_s=idle_timeout_s)
        return cls(pool, dialer, base_path=urlsplit(base_url).path.rstrip("/"), api_key=api_key)

    def close(self) -> None:
        """Ends all connections."""
        self._pool.close()

    async def send(self, method: str, path: str, headers: RawHeaders, body: bytes, *, request_id: str) -> Answer:
        """Send a request and read its whole answer. Raises UpstreamTimeout, UpstreamUnreachable."""
        head = self._head(method, path, headers, request_id, _length(method, body))
        connection = await self._pool.take()
        try:
            connection.begin(head, body)
            content = await connection.read_all()
            returned, unpacking = _returned(connection.headers)
            if unpacking is not None:
                content = unpacking.whole(content)
            answer = Answer(connection.status, returned, content)
        except BaseException:
            connection.abort()
            raise
        self._pool.give_back(connection)
        return answer

    def stream(
        self,
        method: str,
        path: str,
        headers: RawHeaders,
        body: bytes | AsyncIterable[bytes],
        *,
        request_id: str,
    ) -> Stream:
        """The same, its answer read as it comes; a body in pieces is as long as `headers` say, or goes in chunks."""
        return Stream(self._pool, self._call(method, path, headers, body, request_id=request_id))

    def _call(
        self, method: str, path: str, headers: RawHeaders, body: bytes | AsyncIterable[bytes], *, request_id: str
    ) -> Call:
        if isinstance(body, bytes):
            framing, body_bytes = _length(method, body), None
        else:
            framing, body_bytes = _framing(headers)
        head = self._head(method, path, headers, request_id, framing)
        return Call(head, body, body_bytes, method == "HEAD")

    def _head(self, method: str, path: str, headers: RawHeaders, request_id: str, framing: str) -> bytes:
        own = f"{method} {self._base}{path} HTTP/1.1\r\n{self._always}x-request-id: {request_id}\r\n{framing}"
        parts = [own.encode("latin-1")]
        for name, value in headers:
            if name not in _NEVER_SENT:
                parts += (name, b": ", value, b"\r\n")
        head = b"".join(parts)
        lines = self._own_lines + bool(framing) + len(parts) // 4
        if head.count(b"\r") != lines or head.count(b"\n") != lines:
            # Whoever serves lets none in; should one ever, it is not sent on as a request of somebody's own making.
            raise ValueError("there is a line end in a header or in the path")
        if b"\r\nuser-agent:" not in head:
            head += b"user-agent: sentinel\r\n"
        return head + b"\r\n"


async def _ask(connection: Connection, call: Call) -> None:
    """Send it all, and wait for the answer's head."""
    if isinstance(call.body, bytes):
        connection.begin(call.head, call.body, is_head=call.is_head)
        await connection.head()
        return
    connection.begin(call.head, b"", more=True)
    uploading = asyncio.create_task(_upload(connection, call.body, call.body_bytes))
    answering = asyncio.create_task(connection.head())
    try:
        await asyncio.wait((uploading, answering), return_when=asyncio.FIRST_COMPLETED)
        if uploading.done() and not answering.done():
            uploading.result()  # what broke the body off is not the upstream's doing
        await answering
    finally:
        # An answer that comes before the request is whole is all there is to come.
        for task in (uploading, answering):
            task.cancel()
        await asyncio.gather(uploading, answering, return_exceptions=True)


async def _upload(connection: Connection, body: AsyncIterable[bytes], body_bytes: int | None) -> None:
    """Raises ValueError for a body of another length than told: what is too much would be a request of its own."""
    spare_bytes = body_bytes or 0
    async for piece in body:
        if body_bytes is not None:
            spare_bytes -= len(piece)
            if spare_bytes < 0:
                break
            await connection.go_on(piece)
        elif piece:  # an empty chunk would be the last
            await connection.go_on(b"%x\r\n%b\r\n" % (len(piece), piece))
    if spare_bytes:
        raise ValueError("a body is not as long as its header tells")
    if body_bytes is None:
        await connection.go_on(b"0\r\n\r\n")
    connection.body_ends()


def _length(method: str, body: bytes) -> str:
    return f"content-length: {len(body)}\r\n" if body or method not in _BODILESS else ""


def _framing(headers: RawHeaders) -> tuple[str, int | None]:
    """The header that tells how long a body is that comes in pieces, and that length; None: in chunks."""
    told = dict(headers)
    if b"transfer-encoding" in told:
        return "transfer-encoding: chunked\r\n", None
    body_bytes = int(told.get(b"content-length", b"0"))
    return f"content-length: {body_bytes}\r\n", body_bytes


def _returned(headers: RawHeaders) -> tuple[RawHeaders, Unpacking | None]:
    returned = []
    unpacking = None
    packing = b""
    for header in headers:
        name = header[0]
        if name not in _NEVER_RETURNED and not name.startswith(_OWN_PREFIXES):
            returned.append(header)
            if name == b"content-encoding":
                packing = packing + b", " + header[1] if packing else header[1].strip()
        elif name == b"transfer-encoding" and header[1].strip().lower() != b"chunked":
            raise broke("its answer comes in a transfer coding that nobody asked for")
    if packing and packing.lower() != b"identity":
        returned, unpacking = unpacked(returned, packing)
    return returned, unpacking

"""Upstreams of a few lines, each connection of which is served by a coroutine of the test's."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from sentinel_proxy.upstream import Answer, Stream, Upstream
from sentinel_proxy.upstream.connection import Connection

Serves = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

IN_CHUNKS = [(b"transfer-encoding", b"chunked")]


@asynccontextmanager
async def server_that(
    serves: Serves, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Its port. What `serves` ends with is nobody's business; whoever is served still, is served no more."""
    serving: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        with suppress(OSError, EOFError, asyncio.CancelledError, RuntimeError):  # uvloop's, of writing after the end
            await serves(reader, writer)
        serving.discard(asyncio.current_task())
        writer.close()

    server = await asyncio.start_server(serve, host, 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in serving:
            if task is not None:
                task.cancel()


def upstream_at(url: str, **options) -> Upstream:
    told = {"connect_timeout_s": 5, "idle_timeout_s": 5, "max_connections": 1, "ca_file": None, **options}
    return Upstream.open(base_url=url, api_key="key", **told)


@asynccontextmanager
async def upstream_that(serves: Serves, **options) -> AsyncIterator[Upstream]:
    async with server_that(serves) as port:
        upstream = upstream_at(f"http://127.0.0.1:{port}/v1", **options)
        try:
            yield upstream
        finally:
            upstream.close()


async def post(upstream: Upstream, name: str = "r") -> Answer:
    async with asyncio.timeout(20):
        return await upstream.send("POST", "/x", [], b"{}", request_id=name)


async def post_streamed(upstream: Upstream, name: str = "r") -> bytes:
    """The same, its answer read piece by piece."""
    async with asyncio.timeout(20), upstream.stream("POST", "/x", [], b"{}", request_id=name) as stream:
        return b"".join([piece async for piece in pieces_of(stream)])


async def pieces_of(answering: Stream | Connection) -> AsyncIterator[bytes]:
    """What is still to be read, as it comes."""
    while (piece := await answering.read()) is not None:
        yield piece


def answer(body: bytes = b"{}", *headers: str, status: str = "200 OK") -> bytes:
    lines = (f"HTTP/1.1 {status}", *headers, f"content-length: {len(body)}", "", "")
    return "\r\n".join(lines).encode() + body


def answer_head(*headers: str, status: str = "200 OK") -> bytes:
    return "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", *headers, "")).encode()


async def asked(reader: asyncio.StreamReader) -> bytes:
    """The next request, when it is whole; IncompleteReadError when none comes."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next((int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:")), 0)
    body = await reader.readexactly(length)
    if b"transfer-encoding: chunked" in lines:
        body = await reader.readuntil(b"0\r\n\r\n")
    return head + body


def name_of(request: bytes) -> str:
    """The request's `x-request-id`."""
    return request.partition(b"x-request-id: ")[2].partition(b"\r\n")[0].decode()

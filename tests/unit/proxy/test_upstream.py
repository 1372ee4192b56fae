"""What the upstream is sent and what is made of its answers, over a real connection."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from sentinel_proxy.upstream import Upstream, UpstreamUnreachable

IN_CHUNKS = [(b"transfer-encoding", b"chunked")]
EVENTS = [b'data: {"n":%d}\n\n' % number for number in range(3)]


@asynccontextmanager
async def upstream_that(answers, **options):
    """An upstream whose connections are served by `answers(reader, writer)`, each of them alone."""

    async def serve(reader, writer):
        try:
            await answers(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    told = {"connect_timeout_s": 5, "idle_timeout_s": 5, "max_connections": 1, "ca_file": None, **options}
    upstream = Upstream.open(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", **told)
    try:
        yield upstream
    finally:
        upstream.close()
        server.close()


def head(*headers, status="200 OK"):
    return "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", "connection: close", *headers, "")).encode()


async def test_an_answer_that_is_packed_unasked_is_unpacked():
    asked = []

    async def packs(reader, writer):
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        packed = gzip.compress(b'{"usage": 1}')
        writer.write(head("content-encoding: gzip", f"content-length: {len(packed)}") + packed)

    async with upstream_that(packs) as upstream:
        answer = await upstream.send("POST", "/x", [(b"accept-encoding", b"br")], b"{}", request_id="r")
    assert answer.body == b'{"usage": 1}'
    assert b"content-encoding" not in dict(answer.headers)
    assert b"accept-encoding: identity\r\n" in asked[0]


async def test_events_that_are_packed_unasked_come_one_by_one():
    read = asyncio.Event()

    async def packs(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        packing = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
        writer.write(head("content-encoding: gzip", "content-type: text/event-stream"))
        for event in EVENTS:
            writer.write(packing.compress(event) + packing.flush(zlib.Z_SYNC_FLUSH))
            await asyncio.wait_for(read.wait(), 5)
            read.clear()
        writer.write(packing.flush())

    async with upstream_that(packs) as upstream, upstream.stream("POST", "/x", [], b"{}", request_id="r") as stream:
        for event in EVENTS:
            assert await stream.read() == event
            read.set()
        assert await stream.read() is None


async def test_a_body_that_breaks_off_is_no_whole_one_to_the_upstream():
    came = asyncio.get_running_loop().create_future()

    async def reads(reader, writer):
        came.set_result(await reader.read())

    async def breaks() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    async with upstream_that(reads) as upstream:
        with pytest.raises(ConnectionResetError):
            async with upstream.stream("POST", "/files", IN_CHUNKS, breaks(), request_id="r"):
                pass
        sent = await asyncio.wait_for(came, 5)
    assert b"\r\nhalf\r\n" in sent
    assert not sent.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("packed", [b"no gzip", gzip.compress(b"{}")[:-4]])
async def test_what_cannot_be_unpacked_is_an_upstream_that_broke(packed):
    async def packs(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head("content-encoding: gzip", f"content-length: {len(packed)}") + packed)

    async with upstream_that(packs) as upstream:
        with pytest.raises(UpstreamUnreachable):
            await upstream.send("POST", "/x", [], b"{}", request_id="r")


@pytest.mark.parametrize("answers", [True, False])
async def test_a_call_cancelled_before_its_answer_holds_its_place_until_that_comes_or_the_silence_is_too_long(answers):
    reached, cancelled, hung = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def answers_late(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        reached.set()
        await cancelled.wait()
        if answers or hung.is_set():
            writer.write(head("content-length: 2") + b"{}")
        else:
            hung.set()
            await reader.read()  # until the other side hangs up

    async with upstream_that(answers_late, idle_timeout_s=60 if answers else 0.5) as upstream:
        call = asyncio.create_task(upstream.send("POST", "/x", [], b"{}", request_id="r"))
        await asyncio.wait_for(reached.wait(), 5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        cancelled.set()
        answer = await asyncio.wait_for(upstream.send("POST", "/x", [], b"{}", request_id="r"), 5)
    assert answer.body == b"{}"


async def test_a_stream_that_is_left_gives_its_place_back_at_once():
    async def goes_on(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head("content-type: text/event-stream") + EVENTS[0])
        await reader.read()  # until the other side hangs up

    async with upstream_that(goes_on, idle_timeout_s=60) as upstream:
        for _ in range(3):
            async with upstream.stream("POST", "/x", [], b"{}", request_id="r") as stream:
                assert await stream.read() == EVENTS[0]

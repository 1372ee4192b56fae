"""What is made of what the upstream answers, whole or broken, in whatever pieces it comes."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sentinel_proxy.upstream import UpstreamTimeout, UpstreamUnreachable
from sentinel_proxy.upstream.connection import Connection
from tests.unit.proxy.upstream.servers import (
    answer,
    answer_head,
    asked,
    pieces_of,
    post,
    post_streamed,
    upstream_that,
)

EVENTS = [b'data: {"n":%d}\n\n' % number for number in range(3)]
PROVISIONAL = [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\nx-early: 1\r\n\r\n"]
MANY = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Line(asyncio.Transport):
    """The other end of a connection, at which each piece arrives as it was cut."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = Connection(asyncio.get_running_loop(), lambda _: None)
        self.closing = self.paused = False
        self.connection.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closing

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def brings(self, piece: bytes) -> None:
        if not self.closing:
            self.connection.data_received(piece)

    def hangs_up(self) -> None:
        if not self.closing:
            self.connection.eof_received()
        self.closing = True
        self.connection.connection_lost(None)


@dataclass(frozen=True)
class Sent:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    wire: bytes
    until_eof: bool


@st.composite
def answers(draw: st.DrawFn, *, may_last_until_eof: bool = True) -> Sent:
    status = draw(st.sampled_from([200, 201, 204, 299, 304, 400, 404, 429, 500, 503]))
    value = st.text("abc :;,=\"'\t~", max_size=20).map(lambda text: text.strip().encode()) | st.just("ä".encode())
    headers = draw(st.lists(st.tuples(st.sampled_from([b"X-One", b"x-two", b"Content-Type"]), value), max_size=4))
    lines = list(headers)
    body, rest, until_eof = b"", b"", False
    if status not in {204, 304}:
        body = draw(st.binary(max_size=400))
        framing = draw(st.sampled_from(["length", "chunks"] + ["eof"] * may_last_until_eof))
        rest, until_eof = body, framing == "eof"
        if framing == "length":
            lines.insert(draw(st.integers(0, len(lines))), (b"Content-Length", b"%d" % len(body)))
        elif framing == "chunks":
            lines.insert(draw(st.integers(0, len(lines))), (b"Transfer-Encoding", b"chunked"))
            cuts = sorted({0, len(body), *draw(st.lists(st.integers(0, len(body)), max_size=4))})
            extension = draw(st.sampled_from([b"", b";a=b"]))
            chunks = [b"%x%b\r\n%b\r\n" % (b - a, extension, body[a:b]) for a, b in pairwise(cuts)]
            rest = b"".join(chunks) + draw(st.sampled_from([b"0\r\n\r\n", b"0\r\nx-sum: 1\r\n\r\n"]))
    head = b"HTTP/1.1 %d Whatever\r\n" % status + b"".join(b"%b: %b\r\n" % line for line in lines) + b"\r\n"
    before = b"".join(draw(st.lists(st.sampled_from(PROVISIONAL), max_size=2)))
    told = [(name.lower(), value) for name, value in lines]
    return Sent(status, told, body, before + head + rest, until_eof)


def cut(wire: bytes, places: list[int]) -> list[bytes]:
    """In pieces, cut wherever `places` say, by turns from the start."""
    cuts = sorted({0, len(wire), *(place % (len(wire) + 1) for place in places)})
    return [wire[a:b] for a, b in pairwise(cuts)]


PLACES = st.lists(st.integers(0, 2_000), max_size=12)


@MANY
@given(sent=answers(), places=PLACES, streamed=st.booleans())
async def test_an_answer_is_the_same_however_it_is_cut(sent, places, streamed):
    line = Line()
    line.connection.begin(b"", b"")
    came: list[bytes] = []

    async def reads() -> None:
        await line.connection.head()
        assert line.connection.status == sent.status
        if streamed:
            came.extend([piece async for piece in pieces_of(line.connection)])
        else:
            came.append(await line.connection.read_all())

    reading = asyncio.create_task(reads())
    for piece in cut(sent.wire, places):
        await asyncio.sleep(0)
        line.brings(piece)
    if sent.until_eof:
        line.hangs_up()
    await asyncio.wait_for(reading, 5)
    assert b"".join(came) == sent.body
    assert line.connection.headers == sent.headers
    assert line.connection.reusable is not sent.until_eof


@MANY
@given(sequence=st.lists(answers(may_last_until_eof=False), min_size=2, max_size=6), places=PLACES)
async def test_answers_that_follow_each_other_on_one_connection_never_mix(sequence, places):
    line = Line()
    for sent in sequence:
        line.connection.begin(b"", b"")
        reading = asyncio.create_task(line.connection.read_all())
        for piece in cut(sent.wire, places):
            await asyncio.sleep(0)
            line.brings(piece)
        assert await asyncio.wait_for(reading, 5) == sent.body
        assert (line.connection.status, line.connection.headers) == (sent.status, sent.headers)
        assert line.connection.reusable
        line.connection.rest()


@MANY
@given(sent=answers(may_last_until_eof=False), places=PLACES, kept=st.integers(0, 10_000), streamed=st.booleans())
async def test_an_answer_that_breaks_off_anywhere_is_a_broken_one_never_a_shorter_one(sent, places, kept, streamed):
    line = Line()
    came: list[bytes] = []

    async def reads() -> None:
        await line.connection.head()
        if not streamed:
            came.append(await line.connection.read_all())
        while (piece := await line.connection.read()) is not None:
            came.append(piece)

    line.connection.begin(b"", b"")
    for piece in cut(sent.wire[: kept % len(sent.wire)], places):
        line.brings(piece)
    line.hangs_up()
    with pytest.raises(UpstreamUnreachable) as caught:
        await reads()
    assert caught.value.reached
    assert sent.body.startswith(b"".join(came))
    assert not line.connection.reusable


@MANY
@given(sent=answers(may_last_until_eof=False), other=answers(), places=PLACES, streamed=st.booleans())
async def test_what_comes_after_an_answer_is_nobodys_answer_and_ends_the_connection(sent, other, places, streamed):
    line = Line()
    line.connection.begin(b"", b"")
    line.brings(sent.wire + other.wire[:1])
    for piece in cut(other.wire[1:], places):
        line.brings(piece)
    if streamed:
        body = b"".join([piece async for piece in pieces_of(line.connection)])
    else:
        body = await line.connection.read_all()
    assert (line.connection.status, line.connection.headers, body) == (sent.status, sent.headers, sent.body)
    assert not line.connection.reusable


async def test_an_answer_nobody_asked_for_ends_the_connection():
    came: list[bytes] = []

    async def answers_twice(reader, writer):
        came.append(await asked(reader))
        writer.write(answer(b"first"))
        await asyncio.sleep(0.05)
        writer.write(answer(b"of nobody"))
        came.append(await reader.read())

    async with upstream_that(answers_twice) as upstream:
        assert (await post(upstream)).body == b"first"
        await asyncio.sleep(0.1)
        assert (await post(upstream)).body == b"first"
    assert came[1] == b""


@pytest.mark.parametrize(
    "broken",
    [
        b"220 smtp.example.com ESMTP\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, gzip\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhixx0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-2\r\nhi\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nx: a\rset-cookie: b\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nx: a\r\n folded\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nx: a\0b\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nx : a\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"",
    ],
)
async def test_what_is_no_answer_is_an_upstream_that_broke_and_its_place_is_free(broken):
    async def breaks(reader, writer):
        request = await asked(reader)
        writer.write(broken if b"x-request-id: first" in request else answer())

    async with upstream_that(breaks, connect_timeout_s=1) as upstream:
        with pytest.raises(UpstreamUnreachable) as caught:
            await post(upstream, "first")
        assert caught.value.reached
        assert (await post(upstream, "second")).body == b"{}"


@pytest.mark.parametrize("coding", ["chunked", "Chunked ", "  chunked  "])
async def test_chunks_are_chunks_however_they_are_written(coding):
    async def answers_it(reader, writer):
        while await asked(reader):
            writer.write(answer_head(f"Transfer-Encoding:{coding}") + b"2;x=y\r\nhi\r\n0\r\n\r\n")

    async with upstream_that(answers_it) as upstream:
        for _ in range(2):
            assert (await post(upstream)).body == b"hi"


async def test_an_upgrade_that_is_only_offered_changes_nothing():
    async def offers(reader, writer):
        while await asked(reader):
            writer.write(answer(b"hi", "connection: upgrade, keep-alive", "upgrade: h2c"))

    async with upstream_that(offers) as upstream:
        for _ in range(2):
            assert (await post(upstream)).body == b"hi"


@pytest.mark.parametrize("provisional", [b"HTTP/1.1 100 Continue\r\n\r\n" * 3, b"HTTP/1.1 102 Processing\r\n\r\n"])
async def test_a_provisional_answer_is_not_the_answer(provisional):
    async def answers_later(reader, writer):
        await asked(reader)
        writer.write(provisional)
        await asyncio.sleep(0.02)
        writer.write(answer(b"the one", "x-a: b", status="201 Created"))

    async with upstream_that(answers_later) as upstream:
        came = await post(upstream)
    assert (came.status, came.body, dict(came.headers)[b"x-a"]) == (201, b"the one", b"b")


@pytest.mark.parametrize("line", ["x-a: b", "a" * 1_000 + ": " + "b" * 1_000])
async def test_headers_without_an_end_are_not_read_for_ever(line):
    async def never_ends(reader, writer):
        await asked(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(line.encode() * 20 + b"\r\n" if ":" not in line else f"{line}\r\n".encode() * 100)
            await writer.drain()

    async with upstream_that(never_ends) as upstream:
        with pytest.raises(UpstreamUnreachable, match="no end"):
            await post(upstream)


async def test_a_long_body_that_comes_with_the_last_of_the_headers_is_no_endless_header():
    body = bytes(600_000)
    line = Line()
    line.connection.begin(b"", b"")
    wire = answer(body)
    line.brings(wire[:20])
    line.brings(wire[20:400_000])
    line.brings(wire[400_000:])
    assert await line.connection.read_all() == body


async def test_a_thousand_headers_come_through():
    headers = [f"x-{number}: {number}" for number in range(1_000)]

    async def answers_them(reader, writer):
        await asked(reader)
        writer.write(answer(b"{}", *headers))

    async with upstream_that(answers_them) as upstream:
        came = await post(upstream)
    assert [f"{name.decode()}: {value.decode()}" for name, value in came.headers[:-1]] == headers


@pytest.mark.parametrize("status", ["200 OK", "304 Not Modified"])
async def test_the_answer_to_a_head_has_no_body_whatever_its_headers_tell(status):
    async def answers_it(reader, writer):
        await asked(reader)
        writer.write(answer_head("content-length: 10", "content-encoding: gzip", status=status))
        await reader.read()

    async with upstream_that(answers_it) as upstream:
        for _ in range(2):
            async with upstream.stream("HEAD", "/x", [], b"", request_id="r") as stream:
                assert await stream.read() is None


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_an_answer_without_a_body_is_whole_with_its_headers(status):
    connections = []

    async def answers_it(reader, writer):
        connections.append(writer)
        while await asked(reader):
            writer.write(answer_head("content-length: 10", status=status))

    async with upstream_that(answers_it) as upstream:
        for _ in range(2):
            assert (await post(upstream)).body == b""
    assert len(connections) == 1


async def test_an_answer_that_is_packed_unasked_is_unpacked():
    requests = []

    async def packs(reader, writer):
        requests.append(await asked(reader))
        writer.write(answer(gzip.compress(b'{"usage": 1}'), "Content-Encoding: GZip "))

    async with upstream_that(packs) as upstream:
        came = await upstream.send("POST", "/x", [(b"accept-encoding", b"br")], b"{}", request_id="r")
    assert came.body == b'{"usage": 1}'
    assert b"content-encoding" not in dict(came.headers)
    assert b"accept-encoding: identity\r\n" in requests[0]


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_packed_in_several_parts_is_unpacked_to_its_end(streamed):
    packed = gzip.compress(b"one") + gzip.compress(b"two") + gzip.compress(b"three")

    async def packs(reader, writer):
        await asked(reader)
        writer.write(answer_head("content-encoding: gzip", f"content-length: {len(packed)}"))
        for byte in packed:
            writer.write(bytes([byte]))
            await asyncio.sleep(0)

    async with upstream_that(packs) as upstream:
        came = await post_streamed(upstream) if streamed else (await post(upstream)).body
        assert came == b"onetwothree"


async def test_events_that_are_packed_unasked_come_one_by_one():
    read = asyncio.Event()

    async def packs(reader, writer):
        await asked(reader)
        packing = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
        writer.write(answer_head("content-encoding: gzip", "content-type: text/event-stream"))
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


@pytest.mark.parametrize(
    ("packed", "packing"),
    [
        pytest.param(b"no gzip", "gzip", id="not packed"),
        pytest.param(gzip.compress(b"{}")[:-4], "gzip", id="cut"),
        pytest.param(gzip.compress(b"{}") + gzip.compress(b"{}")[:-4], "gzip", id="second part cut"),
        pytest.param(gzip.compress(b"{}") + b"more", "gzip", id="more than packed"),
        pytest.param(b"{}", "br", id="unknown"),
        pytest.param(gzip.compress(b"{}"), "gzip\r\ncontent-encoding: br", id="packed twice"),
    ],
)
async def test_what_cannot_be_unpacked_is_an_upstream_that_broke(packed, packing):
    async def packs(reader, writer):
        await asked(reader)
        writer.write(answer(packed, f"content-encoding: {packing}"))

    async with upstream_that(packs) as upstream:
        with pytest.raises(UpstreamUnreachable):
            await post(upstream)
        with pytest.raises(UpstreamUnreachable):
            await post_streamed(upstream)


async def test_what_came_before_a_stream_broke_is_delivered_first():
    async def breaks(reader, writer):
        await asked(reader)
        writer.write(answer_head("content-length: 100") + EVENTS[0])

    async with upstream_that(breaks) as upstream, upstream.stream("POST", "/x", [], b"{}", request_id="r") as stream:
        await asyncio.sleep(0.05)
        assert await stream.read() == EVENTS[0]
        for _ in range(2):
            with pytest.raises(UpstreamUnreachable):
                await stream.read()


async def test_an_upstream_that_falls_silent_is_a_time_out_before_and_in_its_answer():
    async def falls_silent(reader, writer):
        if b"x-request-id: at once" not in await asked(reader):
            writer.write(answer_head("content-length: 100") + EVENTS[0])
        await reader.read()

    async with upstream_that(falls_silent, idle_timeout_s=0.5) as upstream:
        with pytest.raises(UpstreamTimeout) as caught:
            await post(upstream, "at once")
        assert caught.value.reached
        async with upstream.stream("POST", "/x", [], b"{}", request_id="r") as stream:
            assert await stream.read() == EVENTS[0]
            with pytest.raises(UpstreamTimeout):
                await stream.read()


async def test_bytes_now_and_then_are_no_silence():
    async def drips(reader, writer):
        await asked(reader)
        writer.write(answer_head("transfer-encoding: chunked"))
        for _ in range(10):
            await asyncio.sleep(0.2)
            writer.write(b"1\r\n.\r\n")
        writer.write(b"0\r\n\r\n")

    async with upstream_that(drips, idle_timeout_s=1.5) as upstream:
        assert (await post(upstream)).body == b"." * 10


async def test_a_slow_client_makes_the_upstream_wait_and_gets_all_of_it():
    body, written = bytes(range(256)) * 80_000, 0

    async def sends_much(reader, writer):
        nonlocal written
        await asked(reader)
        writer.write(answer_head(f"content-length: {len(body)}"))
        for start in range(0, len(body), 65_536):
            writer.write(body[start : start + 65_536])
            await writer.drain()
            written = start

    async with (
        upstream_that(sends_much, idle_timeout_s=1) as upstream,
        upstream.stream("POST", "/x", [], b"{}", request_id="r") as stream,
    ):
        before = -1
        while written != before or not written:
            before = written
            await asyncio.sleep(0.6)  # a client that reads nothing, for longer than the upstream may be silent
        assert written < len(body) - 65_536
        assert stream._connection._unread_bytes < 1_000_000
        came = []
        while (piece := await asyncio.wait_for(stream.read(), 5)) is not None:
            came.append(piece)
            await asyncio.sleep(0)
    assert b"".join(came) == body


@pytest.mark.parametrize("framing", ["connection: close", f"content-length: {1_000_000}"])
async def test_a_stream_that_ended_while_its_client_was_slow_is_delivered_whole(framing):
    async def sends_much_and_leaves(reader, writer):
        await asked(reader)
        writer.write(answer_head(framing) + bytes(1_000_000))

    async with (
        upstream_that(sends_much_and_leaves, idle_timeout_s=1) as upstream,
        upstream.stream("POST", "/x", [], b"{}", request_id="r") as stream,
    ):
        await asyncio.sleep(1.2)
        came = 0
        while (piece := await asyncio.wait_for(stream.read(), 5)) is not None:
            came += len(piece)
    assert came == 1_000_000


async def test_a_whole_answer_is_read_at_once_however_long_it_is():
    body = bytes(5_000_000)

    async def sends_much(reader, writer):
        while await asked(reader):
            writer.write(answer(body))
            await writer.drain()

    async with upstream_that(sends_much) as upstream:
        assert (await post(upstream)).body == body
        async with upstream.stream("POST", "/x", [], b"{}", request_id="r") as stream:
            await asyncio.sleep(0.05)  # until it had to wait
            assert await asyncio.wait_for(stream.read_all(), 5) == body

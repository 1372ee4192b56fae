"""What the upstream is sent of a request, whole or in pieces, and what becomes of it on the way."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentinel_proxy.upstream import Upstream, UpstreamTimeout, UpstreamUnreachable
from tests.unit.proxy.upstream.servers import (
    IN_CHUNKS,
    answer,
    answer_head,
    asked,
    name_of,
    post,
    upstream_at,
    upstream_that,
)


async def in_pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        await asyncio.sleep(0)
        yield piece


def keeps(requests):
    async def answers(reader, writer):
        while True:
            requests.append(await asked(reader))
            writer.write(answer())

    return answers


async def upload(upstream: Upstream, headers, body, *, method: str = "POST"):
    async with asyncio.timeout(20), upstream.stream(method, "/files", headers, body, request_id="up") as stream:
        return stream.status, await stream.read_all()


async def test_a_request_is_the_clients_without_what_concerns_its_connection_and_its_credentials_alone():
    requests: list[bytes] = []
    headers = [
        (b"host", b"sentinel"),
        (b"content-type", b"application/json"),
        (b"authorization", b"Bearer caller"),
        (b"cookie", b"a=b"),
        (b"connection", b"upgrade"),
        (b"upgrade", b"h2c"),
        (b"te", b"trailers"),
        (b"expect", b"100-continue"),
        (b"content-length", b"100"),
        (b"transfer-encoding", b"chunked"),
        (b"x-request-id", b"another"),
        (b"x-name", "Jürgen".encode("latin-1")),
        (b"x-name", "Jürgen".encode()),
    ]
    async with upstream_that(keeps(requests)) as upstream:
        await upstream.send("POST", "/x?a=%20ü&b", headers, b'{"a": 1}', request_id="r")
    assert requests == [
        b"POST /v1/x?a=%%20\xfc&b HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nauthorization: Bearer key\r\n"
        b"accept-encoding: identity\r\nx-request-id: r\r\ncontent-length: 8\r\ncontent-type: application/json\r\n"
        b"x-name: J\xfcrgen\r\nx-name: J\xc3\xbcrgen\r\nuser-agent: sentinel\r\n\r\n" % upstream.port + b'{"a": 1}'
    ]


@given(
    evil=st.sampled_from([b"\r\n", b"\r", b"\n", b"\r\n\r\nGET / HTTP/1.1\r\n\r\n"]),
    before=st.binary(max_size=5),
    after=st.binary(max_size=5),
    where=st.sampled_from(["name", "value", "path", "id"]),
)
def test_no_line_end_leaves_in_a_header_or_a_path(evil, before, after, where):
    upstream = upstream_at("http://127.0.0.1:1/v1")
    bad = before + evil + after
    path, request_id, header = "/x", "r", (b"x-a", b"b")
    if where == "path":
        path += bad.decode("latin-1")
    elif where == "id":
        request_id += bad.decode("latin-1")
    else:
        header = (b"x-a", b"b" + bad) if where == "value" else (b"x-a" + bad, b"b")
    with pytest.raises(ValueError, match="line end"):
        upstream._head("POST", path, [(b"x-c", b"d"), header], request_id, "content-length: 0\r\n")


async def test_a_request_that_is_refused_for_its_line_end_holds_no_place():
    requests: list[bytes] = []
    async with upstream_that(keeps(requests), connect_timeout_s=1) as upstream:
        for _ in range(3):
            with pytest.raises(ValueError, match="line end"):
                await upstream.send("POST", "/x", [(b"a", b"b\r\nc: d")], b"{}", request_id="r")
        await post(upstream)
    assert len(requests) == 1


async def test_a_large_body_arrives_whole_while_its_answer_is_waited_for():
    body = bytes(range(256)) * 20_000
    requests: list[bytes] = []
    async with upstream_that(keeps(requests)) as upstream:
        for _ in range(2):
            await upstream.send("POST", "/x", [], body, request_id="r")
    assert all(request.endswith(b"\r\n\r\n" + body) for request in requests)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
async def test_what_has_no_body_tells_no_length(method):
    requests: list[bytes] = []
    async with upstream_that(keeps(requests)) as upstream, upstream.stream(method, "/x", [], b"", request_id="r"):
        pass
    assert b"content-length" not in requests[0]


async def test_an_upload_keeps_the_length_its_client_told_and_its_connection():
    requests: list[bytes] = []
    connections = []

    async def counts(reader, writer):
        connections.append(writer)
        await keeps(requests)(reader, writer)

    async with upstream_that(counts) as upstream:
        for _ in range(2):
            assert await upload(upstream, [(b"content-length", b"7")], in_pieces(b"abc", b"", b"defg")) == (200, b"{}")
    assert all(b"\r\ncontent-length: 7\r\n" in request for request in requests)
    assert all(request.endswith(b"\r\n\r\nabcdefg") for request in requests)
    assert len(requests) == 2
    assert len(connections) == 1


async def test_an_upload_of_unknown_length_goes_in_chunks_and_an_empty_piece_is_not_its_end():
    requests: list[bytes] = []
    async with upstream_that(keeps(requests)) as upstream:
        for _ in range(2):
            await upload(upstream, IN_CHUNKS, in_pieces(b"", b"abc", b"", b"0123456789abcdef", b""))
    assert len(requests) == 2
    for request in requests:
        assert b"\r\ntransfer-encoding: chunked\r\n" in request
        assert b"content-length" not in request
        assert request.endswith(b"\r\n\r\n3\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\n\r\n")


async def test_an_upload_of_nothing_is_one_of_no_bytes():
    requests: list[bytes] = []
    async with upstream_that(keeps(requests)) as upstream:
        await upload(upstream, [], in_pieces())
        await upload(upstream, IN_CHUNKS, in_pieces())
    assert b"\r\ncontent-length: 0\r\n" in requests[0]
    assert requests[1].endswith(b"\r\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("pieces", [(b"abcd", b"ef"), (b"abcdefg", b"GET / HTTP/1.1\r\n\r\n"), (b"abcdefgh",), ()])
async def test_a_body_of_another_length_than_told_ends_with_its_connection(pieces):
    came = []

    async def reads(reader, writer):
        came.append(await reader.read())

    async with upstream_that(reads) as upstream:
        with pytest.raises(ValueError, match="as long as"):
            await upload(upstream, [(b"content-length", b"7")], in_pieces(*pieces))
        while not came:
            await asyncio.sleep(0.001)
    assert b"GET /" not in came[0]
    assert len(came[0].partition(b"\r\n\r\n")[2]) <= 7


async def test_a_body_that_breaks_off_is_no_whole_one_to_the_upstream():
    came = asyncio.get_running_loop().create_future()

    async def reads(reader, writer):
        came.set_result(await reader.read())

    async def breaks() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    async with upstream_that(reads) as upstream:
        with pytest.raises(ConnectionResetError):
            await upload(upstream, IN_CHUNKS, breaks())
        sent = await asyncio.wait_for(came, 5)
    assert b"\r\nhalf\r\n" in sent
    assert not sent.endswith(b"0\r\n\r\n")


async def test_an_answer_before_the_upload_is_whole_is_the_answer_and_ends_upload_and_connection():
    stopped, connections = asyncio.Event(), []

    async def refuses(reader, writer):
        connections.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(b"too much", status="413 Content Too Large"))
        await reader.read()

    async def goes_on() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(1_000)
                await asyncio.sleep(0.001)
        finally:
            stopped.set()

    async with upstream_that(refuses) as upstream:
        for _ in range(2):
            assert await upload(upstream, IN_CHUNKS, goes_on()) == (413, b"too much")
            await asyncio.wait_for(stopped.wait(), 5)
            stopped.clear()
    assert len(connections) == 2


@pytest.mark.parametrize("half", [False, True])
async def test_an_upstream_that_hangs_up_in_the_middle_of_an_upload_broke(half):
    stuck, given = asyncio.Event(), 0

    async def hangs_up(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await stuck.wait()
        if half:
            writer.write_eof()
            await asyncio.sleep(60)

    async def goes_on() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 1
            yield bytes(100_000)

    async with upstream_that(hangs_up, idle_timeout_s=60, connect_timeout_s=1) as upstream:
        for _ in range(2):
            stuck.clear()
            uploading = asyncio.create_task(upload(upstream, IN_CHUNKS, goes_on()))
            before = -1
            while given != before or not given:
                before = given
                await asyncio.sleep(0.05)
            stuck.set()
            with pytest.raises(UpstreamUnreachable) as caught:
                await asyncio.wait_for(uploading, 5)
            assert caught.value.reached


async def test_a_body_waits_for_an_upstream_that_is_slow_to_take_it():
    taken, given = 0, 0
    go_on = asyncio.Event()

    async def is_slow(reader, writer):
        nonlocal taken
        await reader.readuntil(b"\r\n\r\n")
        await go_on.wait()
        while taken < 20_000_000:
            taken += len(await reader.read(1_000_000))
        writer.write(answer())
        await reader.read()

    async def much() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(400):
            given += 50_000
            yield bytes(50_000)

    async with upstream_that(is_slow) as upstream:
        uploading = asyncio.create_task(upload(upstream, [(b"content-length", b"20000000")], much()))
        before = -1
        while given != before or not given:
            before = given
            await asyncio.sleep(0.1)
        assert given < 15_000_000  # what the sockets' buffers took
        go_on.set()
        assert await uploading == (200, b"{}")


async def test_an_upload_may_take_longer_than_the_upstream_may_be_silent():
    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(8):
            await asyncio.sleep(0.2)
            yield b"a"

    async with upstream_that(keeps([]), idle_timeout_s=1) as upstream:
        assert await upload(upstream, [(b"content-length", b"8")], slowly()) == (200, b"{}")


@pytest.mark.parametrize("takes_it", [False, True])
async def test_an_upload_in_which_nothing_moves_ends_by_the_idle_time_out(takes_it):
    async def takes_nothing(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(60)

    async def stalls() -> AsyncIterator[bytes]:
        if takes_it:
            await asyncio.sleep(60)
        while True:
            yield bytes(1_000_000)

    async with upstream_that(takes_nothing, idle_timeout_s=0.1) as upstream:
        for _ in range(2):
            with pytest.raises(UpstreamTimeout):
                await upload(upstream, IN_CHUNKS, stalls())


async def test_a_cancelled_upload_ends_its_body_and_its_connection():
    ended, began, connections = asyncio.Event(), asyncio.Event(), []

    async def answers(reader, writer):
        connections.append(writer)
        await keeps([])(reader, writer)

    async def stalls() -> AsyncIterator[bytes]:
        try:
            yield b"half"
            began.set()
            await asyncio.sleep(60)
        finally:
            ended.set()

    async with upstream_that(answers) as upstream:
        uploading = asyncio.create_task(upload(upstream, IN_CHUNKS, stalls()))
        await asyncio.wait_for(began.wait(), 5)
        uploading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await uploading
        await asyncio.wait_for(ended.wait(), 5)
        await post(upstream)
    assert len(connections) == 2


async def test_a_request_is_sent_once_whatever_becomes_of_it():
    names: list[str] = []
    failures: list[UpstreamUnreachable] = []

    async def reads_and_hangs_up(reader, writer):
        names.append(name_of(await asked(reader)))
        if len(names) % 3 == 0:
            writer.write(answer())
            names.append(name_of(await asked(reader)))
        if len(names) % 2:  # a reset instead of an end
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    sent = [str(number) for number in range(30)]
    async with upstream_that(reads_and_hangs_up) as upstream:
        for name in sent:
            try:
                await post(upstream, name)
            except UpstreamUnreachable as error:
                failures.append(error)
    assert names == sent
    assert failures
    assert all(failure.reached for failure in failures)


async def test_the_answer_of_an_upstream_that_answers_and_leaves_at_once_is_read():
    async def leaves(reader, writer):
        await asked(reader)
        writer.write(answer_head("connection: close") + b"all of it")

    async with upstream_that(leaves) as upstream:
        for _ in range(3):
            assert (await post(upstream)).body == b"all of it"


HUGE = bytes(range(256)) * 12_000


async def test_huge_bodies_arrive_whole():
    requests: list[bytes] = []

    async def takes_it_bit_by_bit(reader, writer):
        for _ in range(2):
            requests.append(await asked(reader))
            writer.write(answer())

    async with upstream_that(takes_it_bit_by_bit) as upstream, asyncio.timeout(20):
        for _ in range(2):
            told = await upstream.send("POST", "/x", [], HUGE, request_id="r")
            assert told.body == b"{}"
    assert [request.partition(b"\r\n\r\n")[2] == HUGE for request in requests] == [True, True]


async def test_others_have_their_turn_while_a_huge_body_is_written():
    turns = 0

    async def counts():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def takes(reader, writer):
        await asked(reader)
        writer.write(answer())

    async with upstream_that(takes) as upstream, asyncio.timeout(20):
        counting = asyncio.create_task(counts())
        await upstream.send("POST", "/x", [], HUGE, request_id="r")
        counting.cancel()
    assert turns >= len(HUGE) // (64 * 1024)


async def test_a_huge_body_whose_answer_comes_before_its_end_is_not_written_on():
    took: list[int] = []

    async def answers_at_once(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(b"too large", status="413 Too Large"))
        took.append(len(await reader.read()))

    async with upstream_that(answers_at_once) as upstream:
        for _ in range(2):
            async with asyncio.timeout(20):
                told = await upstream.send("POST", "/x", [], HUGE * 10, request_id="r")
            assert (told.status, told.body) == (413, b"too large")
    assert all(count < len(HUGE) * 10 for count in took)

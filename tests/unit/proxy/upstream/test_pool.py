"""Which connection a call gets, how long it is kept, and that its place is free again whatever happened."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from sentinel_proxy.upstream import Upstream, UpstreamError, UpstreamUnreachable
from tests.unit.proxy.upstream.servers import (
    IN_CHUNKS,
    answer,
    answer_head,
    asked,
    name_of,
    post,
    post_streamed,
    server_that,
    upstream_at,
    upstream_that,
)

EVENT = b"data: {}\n\n"
RESET = b"\1\0\0\0\0\0\0\0"


async def until(holds) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.001)


def places(upstream: Upstream) -> int:
    """That are free, or hold a free connection."""
    return upstream._pool._places + len(upstream._pool._free)


def shut(served: asyncio.StreamWriter) -> None:
    """The server's end, at once and not by the loop."""
    with socket.socket(fileno=os.dup(served.get_extra_info("socket").fileno())) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def counting(opened: list[asyncio.StreamWriter], *headers: str):
    async def answers(reader, writer):
        opened.append(writer)
        while True:
            writer.write(answer(name_of(await asked(reader)).encode(), *headers))

    return answers


async def test_one_connection_serves_call_after_call():
    opened: list[asyncio.StreamWriter] = []
    async with upstream_that(counting(opened), max_connections=5) as upstream:
        for number in range(20):
            assert (await post(upstream, str(number))).body == str(number).encode()
    assert len(opened) == 1


async def test_there_are_never_more_connections_than_places_and_all_are_used():
    opened: list[asyncio.StreamWriter] = []
    at_once = most = 0

    async def counts(reader, writer):
        nonlocal at_once, most
        opened.append(writer)
        while True:
            request = await asked(reader)
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0.01)
            at_once -= 1
            writer.write(answer(name_of(request).encode()))

    async with upstream_that(counts, max_connections=4) as upstream:
        answers = await asyncio.gather(*(post(upstream, str(number)) for number in range(40)))
    assert [came.body for came in answers] == [str(number).encode() for number in range(40)]
    assert most == len(opened) == 4


async def test_without_a_place_in_time_the_call_was_not_sent():
    began, names = asyncio.Event(), []

    async def is_busy(reader, writer):
        names.append(name_of(await asked(reader)))
        began.set()
        await reader.read()

    async with upstream_that(is_busy, connect_timeout_s=0.1) as upstream:
        first = asyncio.create_task(post(upstream, "first"))
        await began.wait()
        for _ in range(3):
            with pytest.raises(UpstreamUnreachable) as caught:
                await post(upstream, "second")
            assert not caught.value.reached
        assert not upstream._pool._waiting
        first.cancel()
        await asyncio.wait([first])
    assert names == ["first"]


async def test_who_waits_first_is_served_first():
    served = []

    async def answers(reader, writer):
        while True:
            served.append(name_of(await asked(reader)))
            writer.write(answer())

    async with upstream_that(answers) as upstream:
        await asyncio.gather(*(post(upstream, str(number)) for number in range(10)))
    assert served == [str(number) for number in range(10)]


@pytest.mark.parametrize(
    "told",
    [
        answer(b"{}", "connection: close"),
        answer(b"{}", "Connection: Keep-Alive, Close"),
        answer(b"{}").replace(b"HTTP/1.1", b"HTTP/1.0"),
        answer(b"{}") + b"more",
        answer(b"{}") + answer(b"another"),
        answer_head("transfer-encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\nmore",
    ],
)
async def test_a_connection_is_not_used_again_when_it_should_not_be(told):
    opened = []

    async def answers(reader, writer):
        opened.append(writer)
        await asked(reader)
        writer.write(told)
        assert await reader.read() == b""

    async with upstream_that(answers) as upstream:
        for _ in range(3):
            assert (await post(upstream)).body == b"{}"
    assert len(opened) == 3


async def test_a_stream_left_unread_after_it_ended_leaves_no_connection_that_reads_no_more():
    opened = []

    async def sends_much(reader, writer):
        opened.append(writer)
        while await asked(reader):
            writer.write(answer(bytes(500_000)))

    async with upstream_that(sends_much) as upstream:
        for _ in range(2):
            async with upstream.stream("POST", "/x", [], b"{}", request_id="r") as stream:
                connection = stream._connection
                await until(lambda: connection._paused)  # noqa: B023 -- at once
            assert len((await post(upstream)).body) == 500_000
            assert connection not in upstream._pool._held


async def test_a_connection_whose_request_did_not_leave_as_a_whole_is_not_used_again():
    opened = []

    async def answers_early(reader, writer):
        opened.append(writer)
        request = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(name_of(request).encode()))
        await asyncio.sleep(60)

    async with upstream_that(answers_early) as upstream:
        for name in ("a", "b"):
            body = bytes(20_000_000)
            assert (await upstream.send("POST", "/x", [], body, request_id=name)).body == name.encode()
    assert len(opened) == 2


async def test_a_server_that_hangs_up_between_two_calls_is_noticed():
    opened: list[asyncio.StreamWriter] = []
    async with upstream_that(counting(opened)) as upstream:
        for number in range(5):
            await post(upstream)
            opened[number].close()
            await until(lambda: not upstream._pool._held)
    assert len(opened) == 5


async def test_a_server_that_hung_up_before_the_loop_could_know_is_noticed():
    opened: list[asyncio.StreamWriter] = []
    async with upstream_that(counting(opened)) as upstream:
        for number in range(5):
            await post(upstream)
            shut(opened[number])
            await post(upstream)  # without a turn of the loop in between
            await until(lambda: len(upstream._pool._held) == 1)
            opened[-1].close()
            await until(lambda: not upstream._pool._held)
            opened[number + 1 :] = []
    assert places(upstream) == 1


@pytest.mark.parametrize("told_s", [1, 2])
async def test_a_connection_is_closed_before_the_server_said_it_would(told_s):
    opened: list[asyncio.StreamWriter] = []
    async with upstream_that(counting(opened, f"keep-alive: max=100, timeout={told_s}")) as upstream:
        await post(upstream)
        connection = next(iter(upstream._pool._held))
        await post(upstream)
        assert len(opened) == 3 - told_s
        connection = upstream._pool._free[-1]
        assert connection._close_at_s - connection.last_s == told_s - 1
        connection._close_at_s = 0  # the time is up
        await post(upstream)
        assert len(opened) == 4 - told_s
        await until(lambda: not connection.usable)


async def test_a_free_connection_is_closed_when_its_time_is_up():
    opened: list[asyncio.StreamWriter] = []
    async with upstream_that(counting(opened), idle_timeout_s=1) as upstream:
        await post(upstream)
        upstream._pool._free[0]._close_at_s = 0
        await until(lambda: not upstream._pool._held)
        assert places(upstream) == 1
        await until(lambda: upstream._pool._looking is None)


async def test_a_free_connection_is_not_silent():
    opened: list[asyncio.StreamWriter] = []
    async with upstream_that(counting(opened), idle_timeout_s=1) as upstream:
        await post(upstream)
        await asyncio.sleep(1.2)
        await post(upstream)
    assert len(opened) == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_call_cancelled_before_its_answer_gives_its_place_back_at_once(streamed):
    reached, hung_up = asyncio.Event(), asyncio.Event()

    async def never_answers(reader, writer):
        request = await asked(reader)
        if name_of(request) == "second":
            writer.write(answer(b"second"))
            return
        reached.set()
        assert await reader.read() == b""
        hung_up.set()

    async def call(upstream: Upstream) -> None:
        if not streamed:
            await post(upstream)
        async with upstream.stream("POST", "/x", [], b"{}", request_id="r"):
            pass

    async with upstream_that(never_answers, idle_timeout_s=60) as upstream:
        calling = asyncio.create_task(call(upstream))
        await reached.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert (await post(upstream, "second")).body == b"second"
        await asyncio.wait_for(hung_up.wait(), 5)


async def test_a_stream_that_is_left_gives_its_place_back_at_once_and_cannot_be_read_any_more():
    async def goes_on(reader, writer):
        await asked(reader)
        writer.write(answer_head("content-type: text/event-stream") + EVENT)
        await reader.read()  # until the other side hangs up

    async with upstream_that(goes_on, idle_timeout_s=60) as upstream:
        for _ in range(3):
            async with upstream.stream("POST", "/x", [], b"{}", request_id="r") as stream:
                assert await stream.read() == EVENT
            with pytest.raises(AttributeError):
                await stream.read()


async def test_a_stream_read_to_its_end_leaves_its_connection_to_the_next():
    opened = []

    async def streams(reader, writer):
        opened.append(writer)
        while await asked(reader):
            writer.write(answer_head("transfer-encoding: chunked") + b"a\r\n0123456789\r\n0\r\n\r\n")

    async with upstream_that(streams) as upstream:
        for _ in range(3):
            async with upstream.stream("POST", "/x", [], b"{}", request_id="r") as stream:
                assert await stream.read_all() == b"0123456789"
            assert await post_streamed(upstream) == b"0123456789"
    assert len(opened) == 1


async def test_whoever_is_cancelled_as_a_connection_is_handed_to_it_hands_it_on():
    opened: list[asyncio.StreamWriter] = []
    async with upstream_that(counting(opened)) as upstream:
        pool = upstream._pool
        for cancelled in range(6):
            held = await pool.take()
            held.begin(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n", b"")
            await held.read_all()
            waiting = [asyncio.create_task(pool.take()) for _ in range(4)]
            await asyncio.sleep(0)
            pool.give_back(held)  # to the first
            for task in waiting[:cancelled]:
                task.cancel()
            got = next((task for task in waiting if not task.cancelling()), None)
            if got is not None:
                assert await asyncio.wait_for(got, 5) is held
                held.rest()
                for task in waiting:
                    task.cancel()
                await asyncio.wait(waiting)
                pool._hand_on(held)
            await asyncio.wait(waiting)
            assert places(upstream) == 1
            assert not pool._waiting
    assert len(opened) == 1


async def test_a_connection_that_is_lost_as_it_is_handed_on_makes_place_for_another():
    opened: list[asyncio.StreamWriter] = []
    async with upstream_that(counting(opened)) as upstream:
        pool = upstream._pool
        for lose in (lambda held: held.abort(), lambda _: shut(opened[-1])):
            held = await pool.take()
            held.begin(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n", b"")
            await held.read_all()
            waiting = asyncio.create_task(post(upstream))
            await asyncio.sleep(0)
            pool.give_back(held)
            lose(held)
            assert (await waiting).body == b"r"
            assert held not in pool._held
    assert len(opened) == 3


async def test_closing_ends_calls_that_run_and_those_that_wait_and_nothing_is_dialled_afterwards():
    began, opened = asyncio.Event(), []

    async def never_answers(reader, writer):
        opened.append(writer)
        await asked(reader)
        began.set()
        await reader.read()

    async with upstream_that(never_answers) as upstream:
        calls = [asyncio.create_task(post(upstream)) for _ in range(4)]
        await began.wait()
        upstream.close()
        for call in calls:
            with pytest.raises(UpstreamUnreachable):
                await call
        with pytest.raises(UpstreamUnreachable) as caught:
            await post(upstream)
        assert not caught.value.reached
        assert places(upstream) == 1
    assert len(opened) == 1


async def test_closing_while_a_connection_is_dialled_ends_the_call_unsent():
    requests = []

    async def never_answers(reader, writer):
        requests.append(await asked(reader))
        await reader.read()

    for turns in range(12):
        async with upstream_that(never_answers) as upstream:
            requests.clear()
            call = asyncio.create_task(post(upstream))
            for _ in range(turns):
                await asyncio.sleep(0)
            made = any(connection._transport for connection in upstream._pool._held)
            upstream.close()
            with pytest.raises(UpstreamUnreachable) as caught:
                await call
            assert made or not caught.value.reached
            assert caught.value.reached or not requests
            await until(lambda: places(upstream) == 1)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
async def test_a_call_cancelled_at_any_turn_of_the_loop_leaves_no_trace(name):
    async def answers(reader, writer):
        while True:
            writer.write(answer(name_of(await asked(reader)).encode()))

    async with server_that(answers) as port:
        done = turns = 0
        while done < 5:
            turns += 1
            upstream = upstream_at(f"http://{name}:{port}/v1")
            call = asyncio.create_task(post(upstream, "one"))
            for _ in range(turns):
                await asyncio.sleep(0)
            done += call.done()
            unfinished = call.cancel()
            await asyncio.wait([call])
            assert call.cancelled() is unfinished
            await until(lambda: places(upstream) == 1)  # noqa: B023 -- at once
            assert (await post(upstream, "two")).body == b"two"
            upstream.close()
            await until(lambda: not upstream._pool._held)  # noqa: B023 -- at once


class Moody:
    """A server that answers, late or in pieces, answers too much, hangs up, resets, or says nothing at all."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.moods = ["good"] * 8 + ["late", "pieces"] * 4
        self.moods += ["closes", "lasts", "too_much", "garbage", "cut", "resets", "silent"]

    async def serves(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            name = name_of(await asked(reader))
            self.seen[name] += 1
            if not await getattr(self, self.random.choice(self.moods))(name.encode(), reader, writer):
                return

    async def good(self, name: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer(name * 50))
        return True

    async def late(self, name: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(self.random.random() * 0.02)
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" + answer(name * 50))
        return True

    async def pieces(self, name: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer_head("transfer-encoding: chunked"))
        for _number in range(50):
            writer.write(b"%x\r\n%b\r\n" % (len(name), name))
            if self.random.random() < 0.2:
                await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")
        return True

    async def closes(self, name: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer(name * 50))  # and hangs up, although it did not say so
        await asyncio.sleep(self.random.choice([0, 0.001, 0.005]))
        return False

    async def lasts(self, name: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer_head() + name * 50)
        return False

    async def too_much(self, name: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer(name * 50) + answer(b"of nobody"))
        return True

    async def garbage(self, *_: object) -> bool:
        writer = _[2]
        assert isinstance(writer, asyncio.StreamWriter)
        writer.write(self.random.randbytes(40))
        return self.random.random() < 0.5

    async def cut(self, name: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer(name * 50)[: self.random.randrange(60)])
        return False

    async def resets(self, _name: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return False

    async def silent(self, _name: bytes, reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> bool:
        await reader.read()
        return False


@pytest.mark.parametrize("seed", range(2))
async def test_in_a_storm_each_answer_belongs_to_its_call_and_every_place_is_free_again(seed):  # noqa: C901 -- one storm
    moody, dice = Moody(seed), random.Random(seed)
    told: Counter[str] = Counter()

    async def uploaded() -> AsyncIterator[bytes]:
        for _ in range(dice.randrange(5)):
            yield bytes(dice.randrange(3_000))
            await asyncio.sleep(dice.random() * 0.002)
            if dice.random() < 0.05:
                raise EOFError

    async def call(upstream: Upstream, name: str) -> None:
        try:
            if dice.random() < 0.5:
                body = (await post(upstream, name)).body
            else:
                body = b""
                sent = (IN_CHUNKS, uploaded()) if dice.random() < 0.5 else ([], b"{}")
                async with upstream.stream("POST", "/x", *sent, request_id=name) as stream:
                    while (piece := await stream.read()) is not None:
                        body += piece
                        if dice.random() < 0.02:
                            told["left"] += 1
                            return
                        if dice.random() < 0.3:
                            await asyncio.sleep(dice.random() * 0.003)
            assert body == name.encode() * 50
            told["answered"] += 1
        except UpstreamError as error:
            told["reached" if error.reached else "unsent"] += 1
            told["untrue"] += not error.reached and moody.seen[name]
        except EOFError:
            told["broke off"] += 1
            told["untrue"] += moody.seen[name]

    async with upstream_that(moody.serves, max_connections=8, idle_timeout_s=0.2, connect_timeout_s=2) as upstream:
        calls = []
        for number in range(500):
            calls.append(asyncio.create_task(call(upstream, f"call-{number}")))
            if dice.random() < 0.3:
                asyncio.get_running_loop().call_later(dice.random() * 0.15, calls[-1].cancel)
            if dice.random() < 0.3:
                await asyncio.sleep(dice.random() * 0.004)
        done, _ = await asyncio.wait(calls, timeout=20)
        assert len(done) == len(calls)
        for task in calls:
            if not task.cancelled():
                task.result()
        assert max(moody.seen.values()) == 1  # nothing was sent twice
        assert not told["untrue"]
        assert told["answered"] > 100
        assert told["reached"] > 10
        assert told["broke off"]
        await until(lambda: places(upstream) == 8)
        assert not upstream._pool._waiting
        moody.moods = ["late"]
        upstream._pool._wait_s = 0  # each of the eight has a place of its own
        for _ in range(2):
            names = [f"after-{number}" for number in range(8)]
            answers = await asyncio.gather(*(post(upstream, name) for name in names))
            assert [came.body for came in answers] == [name.encode() * 50 for name in names]
        upstream.close()
        await until(lambda: not upstream._pool._held)
        assert upstream._pool._places == 8
    gc.collect()

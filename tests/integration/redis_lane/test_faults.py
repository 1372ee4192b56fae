from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, cast

import pytest

from sentinel_shared.errors import RedisOutcomeUnknown, RedisUnavailable
from sentinel_shared.redis_lane import RedisLane, Script
from sentinel_shared.redis_lane.node import StateLog
from tests.support.redis_server import RedisServer

ECHO = Script.of("echo", b"return ARGV[1]")


async def _serves(lane: RedisLane) -> bool:
    try:
        return await lane.execute("k", "PING") == b"PONG"
    except RedisUnavailable:
        return False


async def _certainly_fails(lane: RedisLane) -> bool:
    try:
        await lane.execute("k", "PING")
    except RedisOutcomeUnknown:
        return False
    except RedisUnavailable:
        return True
    return False


async def test_a_stopped_redis_leaves_the_outcome_unknown_and_late_replies_reach_nobody(server, connected, eventually):
    async with connected(server.url, command_timeout_s=0.25, scripts=[ECHO]) as lane:
        server.pause()
        stuck = [lane.submit("n", "INCR", "n") for _ in range(3)]
        results = await asyncio.gather(*stuck, return_exceptions=True)
        assert [type(result) for result in results] == [RedisOutcomeUnknown] * 3
        assert lane.stats.timeouts == 1
        assert not lane.connected
        server.resume()
        await eventually(lambda: _serves(lane))
        assert await lane.call(ECHO, ["k"], ["mine"]) == b"mine"
        assert await lane.execute("n", "GET", "n") == b"3"
        assert lane.stats.reconnects == 1


async def test_commands_issued_after_a_time_out_are_for_certain_not_applied(server, connected, eventually):
    async with connected(server.url, command_timeout_s=0.25, connect_timeout_s=0.5) as lane:
        server.pause()
        with pytest.raises(RedisOutcomeUnknown):
            await lane.execute("n", "INCR", "n")
        for _ in range(3):
            with pytest.raises(RedisUnavailable) as caught:
                await lane.execute("n", "INCR", "n")
            assert not isinstance(caught.value, RedisOutcomeUnknown)
        server.resume()
        await eventually(lambda: _serves(lane))
        assert await lane.execute("n", "GET", "n") == b"1"


async def test_a_command_waits_for_a_reconnect_that_is_just_under_way(server, connected):
    async with connected(server.url, command_timeout_s=1.5, connect_timeout_s=5.0) as lane:
        server.pause()
        with pytest.raises(RedisOutcomeUnknown):
            await lane.execute("k", "PING")
        waiting = lane.submit("k", "PING")
        server.resume()
        assert await waiting == b"PONG"


async def test_killed_and_started_again_with_aof_nothing_acknowledged_is_lost(tmp_path, connected, eventually):
    with RedisServer(tmp_path / "redis", appendonly="yes", appendfsync="always") as server:
        async with connected(server.url, scripts=[ECHO]) as lane:
            await lane.execute("k", "SET", "k", "v")
            server.kill()
            await eventually(lambda: _certainly_fails(lane))
            assert not lane.connected
            server.start()
            await eventually(lambda: _serves(lane))
            assert lane.connected
            assert lane.stats.reconnects == 1
            assert await lane.execute("k", "GET", "k") == b"v"
            assert await lane.call(ECHO, ["k"], ["hello"]) == b"hello"
            assert lane.stats.script_misses == 0  # every new connection loads the scripts


async def test_what_was_written_when_redis_died_is_unknown_and_what_was_not_is_not(server, connected):
    async with connected(server.url, command_timeout_s=5.0) as lane:
        server.pause()
        written = lane.submit("k", "SET", "k", "v")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        filling = []
        for _ in range(60):  # until the socket's buffers are full
            filling.append(lane.submit("k", "SET", "k", b"x" * 200_000))
            await asyncio.sleep(0)
        server.kill()
        results = await asyncio.gather(written, *filling, return_exceptions=True)
        kinds = [type(result) for result in results]
        assert kinds[0] is RedisOutcomeUnknown
        assert kinds[-1] is RedisUnavailable
        assert kinds == sorted(kinds, key=lambda kind: kind is RedisUnavailable)


async def test_a_socket_that_takes_no_more_holds_commands_back_until_it_does(server, connected):
    async with connected(server.url, command_timeout_s=10.0) as lane:
        server.pause()
        futures = []
        for _ in range(60):
            futures.append(lane.submit("k", "APPEND", "k", b"x" * 200_000))
            await asyncio.sleep(0)
        assert lane._topology.nodes()[0].connection._unsent
        server.resume()
        assert await asyncio.gather(*futures) == [200_000 * (number + 1) for number in range(60)]


async def test_a_demoted_master_is_left_and_found_again(server, connected, eventually):
    async with connected(server.url) as lane:
        server.ask("REPLICAOF", "127.0.0.1", 1)
        with pytest.raises(RedisUnavailable, match="READONLY"):
            await lane.execute("k", "SET", "k", "v")
        server.ask("REPLICAOF", "NO", "ONE")
        await eventually(lambda: _serves(lane))
        assert await lane.execute("k", "SET", "k", "v") == b"OK"
        assert lane.stats.reconnects >= 1


async def test_a_replica_without_its_master_counts_as_away(server, connected):
    server.ask("CONFIG", "SET", "replica-serve-stale-data", "no")
    async with connected(server.url) as lane:
        server.ask("REPLICAOF", "127.0.0.1", 1)
        with pytest.raises(RedisUnavailable, match="MASTERDOWN"):
            await lane.execute("k", "GET", "k")


async def test_a_redis_that_cannot_write_to_its_disk_counts_as_away(server, connected):
    async with connected(server.url) as lane:
        server.ask("CONFIG", "SET", "min-replicas-to-write", 1)
        with pytest.raises(RedisUnavailable, match="NOREPLICAS"):
            await lane.execute("k", "SET", "k", "v")


async def test_a_stall_of_our_own_process_is_not_taken_for_a_silent_redis(server, connected):
    async with connected(server.url, command_timeout_s=0.25) as lane:
        pong = lane.submit("k", "PING")
        time.sleep(0.6)
        assert await pong == b"PONG"
        assert lane.stats.timeouts == 0


@pytest.mark.parametrize("answer", [b"+OK\r\n+OK\r\n+nobody asked\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_a_server_that_does_not_speak_redis_is_left(answer, connected):
    hello = b"-ERR\r\n-ERR\r\n:1\r\n:1\r\n"  # to ROLE, CLIENT SETNAME, EVAL, EVALSHA

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"EVALSHA")
        writer.write(hello)
        await reader.readuntil(b"PING")
        writer.write(answer)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as fake:
        port = fake.sockets[0].getsockname()[1]
        async with connected(f"redis://127.0.0.1:{port}") as lane:
            first, second = lane.submit("k", "PING"), lane.submit("k", "PING")
            await asyncio.gather(first, second, return_exceptions=True)
            assert not lane.connected


def test_the_log_says_one_line_a_second_and_the_newest_state_last(caplog):
    class Clock:
        now_s = 100.0
        due: Any = None

        def time(self):
            return self.now_s

        def call_at(self, at_s, callback):
            self.due = (at_s, callback)

    clock = Clock()
    log = StateLog(cast("asyncio.AbstractEventLoop", clock))
    caplog.set_level(logging.INFO)
    for number in range(100):
        log.say(logging.WARNING, f"lost {number}")
    log.say(logging.INFO, "back")
    assert caplog.messages == ["lost 0"]
    clock.now_s, (at_s, callback) = 101.0, clock.due
    assert at_s == 101.0
    callback()
    assert caplog.messages == ["lost 0", "back"]


async def test_losing_redis_and_having_it_back_are_both_logged(server, connected, eventually, caplog):
    caplog.set_level(logging.INFO)
    async with connected(server.url) as lane:
        server.kill()
        await eventually(lambda: _certainly_fails(lane))
        server.start()
        await eventually(lambda: _serves(lane))

        async def said() -> bool:
            return "connected after" in caplog.text

        await eventually(said)
    assert "lost" in caplog.text

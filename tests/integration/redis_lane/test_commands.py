from __future__ import annotations

import asyncio
import random

import pytest

from sentinel_shared.errors import RedisFull, RedisRefused, RedisUnavailable
from sentinel_shared.redis_lane import RedisLane, Script

ECHO = Script.of("echo", b"return ARGV[1]")
STORE = Script.of("store", b"return redis.call('SET', KEYS[1], ARGV[1])")
STORE_ANYWAY = Script.of("store_anyway", b"#!lua flags=allow-oom\nreturn redis.call('SET', KEYS[1], ARGV[1])")


async def test_replies_come_as_redis_says_them(server, connected):
    async with connected(server.url) as lane:
        assert await lane.execute("k", b"SET", "k", 12) == b"OK"
        assert await lane.execute("k", "GET", "k") == b"12"
        assert await lane.execute("k", "INCRBY", b"k", 30) == 42
        assert await lane.execute("k", "GET", "absent") is None
        assert await lane.execute("k", "MGET", "k", "absent") == [b"42", None]


async def test_the_commands_of_one_tick_leave_in_one_write(server, connected, monkeypatch):
    async with connected(server.url) as lane:
        connection = lane._topology.nodes()[0].connection
        writes: list[bytes] = []
        real = connection._transport

        class Spy:
            def write(self, data: bytes) -> None:
                writes.append(data)
                real.write(data)

        monkeypatch.setattr(connection, "_transport", Spy())
        futures = [lane.submit("n", "INCR", "n") for _ in range(50)]
        assert await asyncio.gather(*futures) == list(range(1, 51))
        assert len(writes) == 1
        monkeypatch.setattr(connection, "_transport", real)


async def test_ten_thousand_random_cancels_never_cross_identities(server, connected):
    chance = random.Random(7)
    async with connected(server.url, scripts=[ECHO], command_timeout_s=10.0) as lane:
        seen: dict[int, object] = {}

        async def caller(number: int) -> None:
            seen[number] = await lane.call(ECHO, ["k"], [number])

        for wave in range(20):
            tasks = [asyncio.create_task(caller(wave * 1000 + number)) for number in range(1000)]
            doomed = chance.sample(tasks, 500)
            for task in doomed:
                if chance.random() < 0.1:
                    await asyncio.sleep(0)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert await lane.call(ECHO, ["k"], ["last"]) == b"last"
        assert lane.stats.reconnects == 0
    assert all(reply == b"%d" % number for number, reply in seen.items())
    assert 10_000 <= len(seen) < 20_000


async def test_identities_never_cross_when_the_connection_is_cut_now_and_then(server, connected):
    chance = random.Random(8)
    async with connected(server.url, scripts=[ECHO]) as lane:
        answered = 0

        async def caller(number: int) -> None:
            nonlocal answered
            try:
                async with asyncio.timeout(chance.choice([0.0, 0.001, 5.0])):
                    assert await lane.call(ECHO, ["k"], [number]) == b"%d" % number
                    answered += 1
            except (TimeoutError, RedisUnavailable):
                await asyncio.sleep(0.001)

        for wave in range(30):
            calls = [caller(wave * 100 + number) for number in range(100)]
            await asyncio.gather(*calls)
            if wave % 10 == 9:
                server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert answered > 0


async def test_a_script_that_redis_forgot_runs_all_the_same(server, connected):
    async with connected(server.url, scripts=[ECHO]) as lane:
        assert await asyncio.gather(*lane.call_on_each("SCRIPT", "EXISTS", ECHO.sha1)) == [[1]]
        server.ask("SCRIPT", "FLUSH")
        assert await lane.call(ECHO, ["k"], ["hello"]) == b"hello"
        assert lane.stats.script_misses == 1
        assert await lane.call(ECHO, ["k"], ["again"]) == b"again"
        assert lane.stats.script_misses == 1


async def test_a_script_that_was_not_given_at_connect_runs_too(server, connected):
    async with connected(server.url) as lane:
        assert await lane.call(ECHO, ["k"], ["hello"]) == b"hello"


async def test_a_full_redis_is_told_apart_and_debts_are_still_accepted(server, connected):
    async with connected(server.url, scripts=[STORE, STORE_ANYWAY]) as lane:
        server.ask("CONFIG", "SET", "maxmemory", 1)
        with pytest.raises(RedisFull):
            await lane.execute("k", "SET", "k", "v")
        with pytest.raises(RedisFull):
            await lane.call(STORE, ["k"], ["v"])
        assert await lane.call(STORE_ANYWAY, ["k"], ["v"]) == b"OK"
        assert await lane.execute("k", "GET", "k") == b"v"
    async with connected(server.url, scripts=[STORE, STORE_ANYWAY]) as started_while_full:
        assert await started_while_full.call(STORE_ANYWAY, ["k"], ["w"]) == b"OK"


async def test_any_other_error_reply_is_a_refusal_with_the_words_of_redis(server, connected):
    async with connected(server.url) as lane:
        await lane.execute("k", "SET", "k", "text")
        with pytest.raises(RedisRefused, match="WRONGTYPE"):
            await lane.execute("k", "HGET", "k", "field")
        assert await lane.execute("k", "GET", "k") == b"text"
        assert lane.stats.reconnects == 0


async def test_more_than_the_bound_of_outstanding_commands_is_refused_at_once(server, connected):
    async with connected(server.url, max_outstanding=10) as lane:
        futures = [lane.submit("n", "INCR", "n") for _ in range(15)]
        assert [future.done() for future in futures] == [False] * 10 + [True] * 5
        for future in futures[10:]:
            with pytest.raises(RedisUnavailable, match="too many"):
                await future
        assert await asyncio.gather(*futures[:10]) == list(range(1, 11))
        assert lane.stats.overflows == 5
        assert await lane.execute("n", "GET", "n") == b"10"


async def test_more_than_the_bound_of_bytes_is_refused_at_once(server, connected):
    async with connected(server.url, max_unsent_bytes=1000) as lane:
        kept = lane.submit("k", "SET", "k", b"x" * 600)
        with pytest.raises(RedisUnavailable, match="too many"):
            await lane.submit("k", "SET", "k", b"y" * 600)
        await kept
        assert await lane.execute("k", "GET", "k") == b"x" * 600


async def test_a_unix_socket_a_database_and_a_name(server, connected):
    async with connected(f"unix://{server.socket_path}?db=3", client_name="sentinel-proxy") as lane:
        await lane.execute("k", "SET", "k", "v")
        assert await lane.execute("k", "CLIENT", "GETNAME") == b"sentinel-proxy"
    async with connected(f"{server.url}/3") as lane:
        assert await lane.execute("k", "GET", "k") == b"v"
    async with connected(server.url) as lane:
        assert await lane.execute("k", "GET", "k") is None


async def test_ping_measures_and_health_shows_it(server, connected):
    async with connected(server.url) as lane:
        assert lane.connected
        assert lane.latency_ms is None
        latency_ms = await lane.ping()
        assert latency_ms > 0
        assert lane.latency_ms == latency_ms
        assert lane.nodes == [f"127.0.0.1:{server.port}"]


async def test_wait_tells_how_many_replicas_have_the_write(server, connected):
    async with connected(server.url, command_timeout_s=1.0) as lane:
        written, copies = lane.submit("k", "SET", "k", "v"), lane.wait("k", replicas=1, timeout_ms=20)
        assert await written == b"OK"
        assert await copies == 0
        with pytest.raises(ValueError, match="below"):
            await lane.wait("k", replicas=1, timeout_ms=1000)


async def test_a_reply_of_megabytes_arrives_whole(server, connected):
    async with connected(server.url) as lane:
        value = random.Random(1).randbytes(5_000_000)
        await lane.execute("k", "SET", "k", value)
        replies = await asyncio.gather(lane.submit("k", "GET", "k"), lane.submit("k", "STRLEN", "k"))
        assert list(replies) == [value, len(value)]


async def test_closing_leaves_no_connection_and_fails_what_comes_later(server):
    lane = await RedisLane.connect(server.url, client_name="leaver")
    await lane.close()
    with pytest.raises(RedisUnavailable, match="closed"):
        await lane.execute("k", "PING")
    assert not lane.connected

from __future__ import annotations

import asyncio

import pytest

from sentinel_shared.errors import RedisUnavailable
from sentinel_shared.redis_lane import RedisLane, Script
from tests.support.redis_server import RedisServer, SentinelSetup, free_port

STORE = Script.of("store", b"return redis.call('SET', KEYS[1], ARGV[1])")


@pytest.fixture
def setup(tmp_path):
    with SentinelSetup(tmp_path) as started:
        yield started


async def test_when_the_master_dies_the_promoted_replica_is_found(setup, connected, eventually):
    async with connected(setup.url, scripts=[STORE], command_timeout_s=1.0) as lane:
        written, copies = lane.call(STORE, ["k"], ["before"]), lane.wait("k", replicas=1, timeout_ms=900)
        assert await written == b"OK"
        assert await copies == 1
        setup.master.kill()

        async def stores() -> bool:
            try:
                return bool(await lane.call(STORE, ["after"], ["v"]) == b"OK")
            except RedisUnavailable:
                return False

        await eventually(stores)
        assert setup.replica.ask("GET", "k") == "before"
        assert setup.replica.ask("GET", "after") == "v"


async def test_sentinels_that_are_away_are_passed_over(setup, connected):
    url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{setup.sentinel.port}/mymaster"
    async with connected(url) as lane:
        assert await lane.execute("k", "PING") == b"PONG"


async def test_an_unknown_service_is_told(setup):
    with pytest.raises(RedisUnavailable, match="no Sentinel knows a master named nobody"):
        await RedisLane.connect(f"redis+sentinel://127.0.0.1:{setup.sentinel.port}/nobody", client_name="test")


async def test_a_sentinel_that_is_behind_and_names_a_replica_is_not_believed(tmp_path):
    with RedisServer(tmp_path, replicaof="127.0.0.1 1") as replica:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"mymaster\r\n")
            writer.write(b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%d\r\n" % (len(str(replica.port)), replica.port))
            await reader.read()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as behind:
            port = behind.sockets[0].getsockname()[1]
            with pytest.raises(RedisUnavailable, match="not a master"):
                await RedisLane.connect(f"redis+sentinel://127.0.0.1:{port}/mymaster", client_name="test")

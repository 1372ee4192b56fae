"""How many replicas have a write, asked of real masters."""

from __future__ import annotations

import asyncio

import pytest

from sentinel_shared import keys
from sentinel_shared.redis_lane import Script
from sentinel_shared.redis_lane.cluster import slot_of
from sentinel_shared.replication import Replication
from tests.support.redis_server import RedisCluster, RedisServer

STORE = Script.of("store", b"return redis.call('SET', KEYS[1], ARGV[1])")


def key_of(shard):
    return keys.shard_prefix(shard) + "anything"


async def replicas_of_a_write(lane, replication, shard):
    reply, replicas = await replication.of(shard, lane.call(STORE, [key_of(shard)], ["v"]))
    assert reply == b"OK"
    return replicas


async def test_a_replica_that_stands_still_does_not_count_and_one_that_is_back_does(tmp_path, connected, eventually):
    with (
        RedisServer(tmp_path / "master", repl_diskless_sync_delay=0) as master,
        RedisServer(tmp_path / "replica", replicaof=f"127.0.0.1 {master.port}") as replica,
    ):
        async with connected(master.url, scripts=[STORE]) as lane:
            replication = Replication(lane, 1)

            async def counts() -> bool:
                return bool(await replicas_of_a_write(lane, replication, 3) == 1)

            await eventually(counts)
            replica.pause()
            try:
                writes = [replication.of(3, lane.call(STORE, [key_of(3)], [number])) for number in range(50)]
                assert set(await asyncio.gather(*writes)) == {(b"OK", 0)}
            finally:
                replica.resume()
            await eventually(counts)
            # Redis forgot the script: it is sent again after all that this tick has sent, the question too.
            await lane.execute("k", "SCRIPT", "FLUSH")
            assert await counts()
            assert replica.ask("GET", key_of(3)) == "v"


@pytest.mark.asyncio(loop_factories=["uvloop"])
async def test_each_master_of_a_cluster_answers_for_its_own_shards(tmp_path, connected):
    with RedisCluster(tmp_path) as cluster:
        source, target, third = cluster.nodes
        cluster.add_replica_of(source)
        slots = {shard: slot_of(key_of(shard)) for shard in range(keys.SHARDS)}
        first, last = next((a, b) for a, b, (_, port, *_), *_ in source.ask("CLUSTER", "SLOTS") if a == 0)
        async with connected(cluster.url, scripts=[STORE]) as lane:
            replication = Replication(lane, 1)
            told = await asyncio.gather(*(replicas_of_a_write(lane, replication, shard) for shard in slots))
            assert told == [int(first <= slot <= last) for slot in slots.values()]
            # A write that was sent elsewhere than the question would be is not taken for replicated.
            shard = next(shard for shard, slot in slots.items() if first <= slot <= last)
            source.ask("FLUSHALL")
            for master in (target, source, third):
                master.ask("CLUSTER", "SETSLOT", slots[shard], "NODE", cluster.id_of(target))
            assert await replicas_of_a_write(lane, replication, shard) == 0

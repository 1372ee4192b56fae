from __future__ import annotations

import asyncio

import pytest

from sentinel_shared.errors import RedisRefused, RedisUnavailable
from sentinel_shared.redis_lane import RedisLane, Script
from sentinel_shared.redis_lane.cluster import slot_of
from tests.support.redis_server import RedisCluster, RedisServer

STORE = Script.of("store", b"return redis.call('SET', KEYS[1], ARGV[1])")
KEYS = [f"sentinel:{{s{shard:02d}}}:account:ann" for shard in range(16)]


@pytest.fixture
def cluster(tmp_path):
    with RedisCluster(tmp_path) as formed:
        yield formed


def owner_of(cluster: RedisCluster, slot: int) -> RedisServer:
    for first, last, (_, port, *_), *_ in cluster.nodes[0].ask("CLUSTER", "SLOTS"):
        if first <= slot <= last:
            return next(node for node in cluster.nodes if node.port == port)
    raise AssertionError(slot)


def other_than(cluster: RedisCluster, owner: RedisServer) -> RedisServer:
    return next(node for node in cluster.nodes if node is not owner)


async def serves(lane: RedisLane, key: str) -> bool:
    try:
        return bool(await lane.execute(key, "EXISTS", key) in {0, 1})
    except RedisUnavailable:
        return False


@pytest.mark.parametrize("key", ["user", "{s07}", "a{s07}b", "{}a", "{a", "a{}{b}", "ключ{тег}", b"\xff{\x00}"])
def test_slots_are_those_of_redis(tmp_path_factory, key, slot_oracle):
    assert slot_of(key) == slot_oracle.ask("CLUSTER", "KEYSLOT", key)


@pytest.fixture(scope="module")
def slot_oracle(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("oracle"), cluster_enabled="yes") as server:
        yield server


async def test_each_key_is_served_by_its_node_and_each_master_knows_the_scripts(cluster, connected):
    async with connected(cluster.url, scripts=[STORE]) as lane:
        assert len(lane.nodes) == 3
        assert set(await asyncio.gather(*(lane.call(STORE, [key], [key]) for key in KEYS))) == {b"OK"}
        assert [await lane.execute(key, "GET", key) for key in KEYS] == [key.encode() for key in KEYS]
        assert await asyncio.gather(*lane.call_on_each("SCRIPT", "EXISTS", STORE.sha1)) == [[1]] * 3
        assert lane.stats.redirects == 0
        with pytest.raises(RedisRefused, match="CROSSSLOT"):
            await lane.execute(KEYS[0], "MGET", *KEYS)


async def test_one_seed_is_enough(cluster, connected):
    async with connected(f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster.nodes[2].port}") as lane:
        assert len(lane.nodes) == 3


async def test_a_slot_that_moved_is_followed_and_then_known(cluster, connected, eventually):
    key, slot = KEYS[3], slot_of(KEYS[3])
    async with connected(cluster.url, scripts=[STORE]) as lane:
        target = other_than(cluster, owner_of(cluster, slot))
        cluster.move_slot(slot, target)
        futures = [lane.call(STORE, [key], ["v"]) for _ in range(20)]
        assert set(await asyncio.gather(*futures)) == {b"OK"}
        assert lane.stats.redirects >= 20
        assert target.ask("GET", key) == "v"
        assert all([await serves(lane, key) for key in KEYS])
        redirects = lane.stats.redirects
        assert await lane.execute(key, "GET", key) == b"v"
        assert lane.stats.redirects == redirects


async def test_during_a_migration_absent_keys_are_asked_for_at_the_target(cluster, connected):
    key, slot = "{s05}new", slot_of("{s05}")
    source = owner_of(cluster, slot)
    target = other_than(cluster, source)
    async with connected(cluster.url) as lane:
        await lane.execute("{s05}old", "SET", "{s05}old", "here")
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.id_of(source))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.id_of(target))
        futures = [lane.call(STORE, [key], [number]) for number in range(20)]
        futures += [lane.submit("{s05}old", "GET", "{s05}old")]
        assert await asyncio.gather(*futures) == [b"OK"] * 20 + [b"here"]
        assert await lane.execute(key, "GET", key) == b"19"
        # Half of these keys are here and half there: tried again until the migration is through.
        both = lane.submit(key, "MGET", key, "{s05}old")
        await asyncio.sleep(0.05)
        assert not both.done()
        source.ask("MIGRATE", "127.0.0.1", target.port, "{s05}old", 0, 5000)
        cluster.move_slot(slot, target)
        assert await both == [b"19", b"here"]


async def test_a_dead_node_fails_its_own_keys_only_and_comes_back(cluster, connected, eventually):
    async with connected(cluster.url, command_timeout_s=1.0) as lane:
        victim = cluster.nodes[1]
        lost = [key for key in KEYS if owner_of(cluster, slot_of(key)) is victim]
        kept = [key for key in KEYS if key not in lost]
        victim.kill()
        with pytest.raises(RedisUnavailable):
            await lane.execute(lost[0], "GET", lost[0])
        assert not lane.connected
        assert all([await serves(lane, key) for key in kept])
        victim.start()
        await eventually(lambda: serves(lane, lost[0]))

        async def whole() -> bool:
            return bool(lane.connected)

        await eventually(whole)


async def test_a_promoted_replica_that_nobody_knew_is_found(cluster, connected, eventually):
    master = cluster.nodes[0]
    replica = cluster.add_replica_of(master)
    key = next(key for key in KEYS if owner_of(cluster, slot_of(key)) is master)
    async with connected(cluster.url, scripts=[STORE], command_timeout_s=1.0) as lane:
        await lane.call(STORE, [key], ["before"])
        replica.ask("CLUSTER", "FAILOVER")

        async def moved() -> bool:
            return await serves(lane, key) and f"127.0.0.1:{replica.port}" in lane.nodes and lane.connected

        await eventually(moved)
        assert await lane.execute(key, "GET", key) == b"before"
        master.kill()
        assert await lane.call(STORE, [key], ["after"]) == b"OK"
        assert len(lane.nodes) == 3

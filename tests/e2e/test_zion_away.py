"""Zion away under load: nobody notices, what is owed coalesces by user, and it is told soon after Zion's return."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter

import httpx
import pytest
import redis

from sentinel_shared import keys
from tests.support.system import System, chat_body, eventually

pytestmark = pytest.mark.xdist_group("e2e-zion-away")

USERS = 12


@pytest.fixture
def place(tmp_path):
    with System(tmp_path / "system", LOG_LEVEL="warning") as running:
        running.start_all("proxy", "proxy", "usage-worker", "usage-worker", "limits-sync")
        yield running


def load(place, users, *, seconds):
    """Requests one after another over six connections; how many of each status."""
    until_s = time.monotonic() + seconds

    async def client(http, number):
        statuses: Counter[int] = Counter()
        while time.monotonic() < until_s:
            user = users[(number + statuses.total()) % len(users)]
            url = f"{place.proxies[number % 2].url}/v1/chat/completions"
            answer = await http.post(url, json=chat_body(user), headers=user.headers)
            statuses[answer.status_code] += 1
        return statuses

    async def all_of_them():
        async with httpx.AsyncClient(timeout=10) as http:
            return sum(await asyncio.gather(*(client(http, number) for number in range(6))), Counter())

    return asyncio.run(all_of_them())


def owed(place):
    """Users on the queue, and batches whose fate is open."""
    shards = range(keys.SHARDS)
    return (
        sum(place.redis.ask("ZCARD", keys.queue(shard)) for shard in shards),
        sum(place.redis.ask("ZCARD", keys.batches(shard)) for shard in shards),
    )


def kept(place):
    """Keys and bytes in Redis, but for the marker and the audit event that each request leaves for a while anyhow."""
    passing = re.compile(rb"sentinel:\{s\d+}:(settled:|audit$)")
    with redis.Redis.from_url(place.redis.url) as store:
        stay = [key for key in store.scan_iter("sentinel:{*", count=1_000) if not passing.match(key)]
        return len(stay), sum(store.memory_usage(key, samples=0) or 0 for key in stay)


def calls(place):
    """How often Zion was asked anything."""
    return sum(route["count"] for route in place.zion.get("/admin/calls").json().values())


def zion_is_away_and_comes_back(place, *, seconds):
    users = [place.add_user() for _ in range(USERS)]
    assert set(load(place, users, seconds=1)) == {200}
    eventually(lambda: owed(place) == (0, 0), within_s=10)
    before, (keys_before, bytes_before) = calls(place), kept(place)
    place.zion.post("/admin/faults", [{"kind": "refuse", "route": "*"}])
    statuses = load(place, users, seconds=seconds)
    assert set(statuses) == {200}, "cached users are served, whoever is away"
    queued, batches = owed(place)
    assert queued <= USERS
    assert batches <= keys.SHARDS, "what is frozen stays as it is, the rest coalesces where it is"
    keys_after, bytes_after = kept(place)
    assert keys_after - keys_before <= 3 * keys.SHARDS, "queues, batches and their index"
    assert bytes_after - bytes_before <= 2_000 * (USERS + keys.SHARDS), "by user and shard, however many requests"
    httpx.delete(place.zion.url + "/admin/faults", timeout=5).raise_for_status()
    began_s = time.monotonic()
    eventually(lambda: owed(place) == (0, 0), within_s=10)
    drained_s = time.monotonic() - began_s
    eventually(lambda: all(place.booked(user) == place.charged(user) for user in users), within_s=5)
    asked = calls(place) - before
    print(
        f"{statuses[200]} requests in {seconds} s without Zion: {queued} users and {batches} batches waited, "
        f"{bytes_after - bytes_before:+} bytes and {keys_after - keys_before:+} keys in Redis; "
        f"told within {drained_s:.1f} s of its return, in {asked} calls all in all"
    )
    assert asked <= max(statuses[200] / 50, 2 * keys.SHARDS)


def test_twelve_seconds_without_zion(place):
    zion_is_away_and_comes_back(place, seconds=12)


@pytest.mark.soak
def test_a_minute_without_zion(place):
    zion_is_away_and_comes_back(place, seconds=60)

"""Zion away for long: nothing is claimed, hardly anything is asked, and what waited is there soon after its return."""

from __future__ import annotations

import pytest

from sentinel_shared.breaker import BreakerState
from sentinel_shared.errors import RedisUnavailable

pytestmark = pytest.mark.xdist_group("usage-worker-outages")


async def open_the_breaker(bench, hand, users):
    """20 calls that fail: 16 shards, and some of them again."""
    await bench.use(*users)
    while hand.breaker.state is BreakerState.CLOSED:
        await bench.tick(hand)
        bench.lapse_leases()


async def test_while_zion_is_away_usage_coalesces_and_one_batch_probes(bench):
    hand, users = bench.hand(), await bench.users(60)
    bench.trouble(kind="status", status=503)
    await open_the_breaker(bench, hand, users)
    _, frozen = await bench.waits()
    calls = bench.calls()
    for step in range(1, 13):
        await bench.use(*users)
        bench.clock.ahead_s += 5
        await bench.tick(hand)
        await bench.tick(hand)
        assert (await bench.waits())[1] == frozen, "no more batches, however long"
        assert bench.calls() == calls + step, "one probe a back-off"
    assert hand.metric("sentinel_usage_flushes_total", result="unknown") == bench.calls()
    bench.well()
    bench.lapse_leases()
    bench.clock.ahead_s += 5
    await bench.settled_down(hand)


async def test_the_first_success_makes_all_that_backs_off_due_at_once(bench):
    hand, users = bench.hand(backoff=1.0), await bench.users(60)
    bench.trouble(kind="status", status=503)
    await open_the_breaker(bench, hand, users)
    bench.clock.ahead_s += 5
    await bench.tick(hand)
    _, frozen = await bench.waits()
    await bench.use(*users)
    bench.well()
    bench.clock.ahead_s += 5
    bench.lapse_leases(at_most=1)
    await bench.ticks_until(hand, bench.balanced, within_s=2.5)  # half of what the back-offs last
    assert frozen > 10


async def test_a_lone_batch_backs_off_for_four_seconds_at_most(bench):
    hand, (name,) = bench.hand(backoff=1.0), await bench.users()
    delays = []
    postpone = bench.queue.postpone

    async def noted(batch, *, until_ms):
        delays.append(until_ms / 1000 - bench.clock.unix_s())
        await postpone(batch, until_ms=until_ms)

    bench.queue.postpone = noted
    bench.trouble(kind="status", status=500)
    await bench.use(name)
    for _ in range(6):
        await bench.tick(hand)
        bench.lapse_leases()
    assert [round(delay, 1) for delay in delays] == [1, 2, 4, 4, 4, 4]


async def test_with_nothing_frozen_new_usage_probes(bench):
    """Another worker has sent what this one failed to send: its own breaker must not stay open for ever."""
    hand, other, users = bench.hand(), bench.hand(), await bench.users(60)
    bench.trouble(kind="status", status=503)
    await open_the_breaker(bench, hand, users)
    bench.well()
    await bench.settled_down(other)
    bench.clock.ahead_s += 5
    await bench.use(*users)
    await bench.settled_down(hand)
    assert hand.breaker.state is BreakerState.CLOSED


async def test_zions_word_is_booked_when_redis_was_away_for_a_moment(bench):
    hand, (name,) = bench.hand(), await bench.users()
    ack, failures = bench.queue.ack, [RedisUnavailable("away")] * 3

    async def away_at_first(batch, results):
        if failures:
            raise failures.pop()
        return await ack(batch, results)

    bench.queue.ack = away_at_first
    await bench.use(name)
    await bench.settled_down(hand)
    assert bench.calls() == 1


async def test_a_batch_that_takes_long_keeps_its_lease(bench, monkeypatch):
    monkeypatch.setattr("sentinel_usage_worker.flush.LEASE_S", 0.3)
    hand, other, (name,) = bench.hand(), bench.hand(), await bench.users()
    bench.trouble(kind="delay", seconds=0.45)
    await bench.use(name)
    hand.flusher.flush()
    await bench.ticks_until(other, lambda: bench.balanced() and not hand.flusher._running)
    assert bench.calls() == 1
    assert other.metric("sentinel_usage_increments_total", result="applied") == 0


async def test_a_stop_finishes_what_is_under_way_and_claims_nothing_more(bench):
    hand, (first, second) = bench.hand(), await bench.users(2)
    bench.trouble(kind="delay", seconds=0.3)
    await bench.use(first)
    hand.flusher.flush()
    while not bench.calls():
        await bench.turn()
    await bench.use(second)
    await hand.flusher.stop(within_s=5)
    assert bench.booked(first) == dict(bench.settled[first])
    await bench.tick(hand)
    assert (await bench.owed(second))["ai_requests"] == [1, 0, 0]
    bench.well()
    await bench.settled_down(bench.hand())


async def test_a_stop_in_the_middle_of_single_items_leaves_the_rest_to_others_at_once(bench):
    hand, users = bench.hand(), await bench.users(200)
    bench.trouble(kind="no_batch")
    bench.trouble(kind="delay", seconds=0.1, route="increment")
    await bench.use(*users)
    hand.flusher.flush()
    while bench.calls("increment") < 8:
        await bench.turn()
    await hand.flusher.stop(within_s=5)
    assert bench.calls("increment") < 100
    bench.well()
    await bench.settled_down(bench.hand())
    assert bench.calls("increment") <= 600, "those that were done are not sent again"

"""A Zion that does not honour keys: before anything goes again, its `used` is compared with what it should be."""

from __future__ import annotations

import time

import pytest

from sentinel_dev.zion import create_zion
from sentinel_shared.contracts import LIMIT_NAMES, LimitSnapshot
from tests.integration.usage_worker.conftest import FRESHNESS

pytestmark = pytest.mark.xdist_group("usage-worker-without-idempotency")


@pytest.fixture
def bench(bench):
    bench.zion = create_zion(honour_keys=False)
    return bench


async def refreshed(bench, name):
    """As limits-sync does it, whatever Zion says now."""
    used = bench.booked(name)
    await bench.accounts.refresh_commit(
        external_id=name,
        start=await bench.accounts.refresh_begin(name),
        limits=[LimitSnapshot(limit, None, used.get(limit, 0), None, None, None) for limit in LIMIT_NAMES],
        freshness=FRESHNESS,
        next_refresh_s=200,
        now_s=time.time(),
    )


async def test_what_was_applied_in_silence_is_not_sent_again(bench):
    hand, names = bench.hand(idempotent=False), await bench.users(3)
    await bench.use(*names)
    await bench.settled_down(hand)
    calls = bench.calls()
    bench.trouble(kind="applied_then_silent", times=1)
    await bench.use(names[0])
    await bench.settled_down(hand)
    assert bench.calls() == calls + 1


async def test_what_was_not_applied_is_sent_again(bench):
    hand, names = bench.hand(idempotent=False), await bench.users(3)
    bench.trouble(kind="status", status=500, times=2)
    await bench.use(*names)
    await bench.settled_down(hand)


async def test_only_the_items_that_are_not_in_zions_books_are_sent_again(bench):
    """Half of a batch was applied before Zion died."""
    hand, (name,) = bench.hand(idempotent=False), await bench.users()
    bench.trouble(kind="partial", limit_name="ai_output_tokens", times=1)
    bench.trouble(kind="applied_then_silent", times=1)
    await bench.use(name)
    await bench.settled_down(hand)


async def test_limits_that_are_read_in_between_do_not_mislead(bench):
    hand, (name,) = bench.hand(idempotent=False), await bench.users()
    bench.trouble(kind="applied_then_silent", times=1)
    await bench.use(name)
    await bench.tick(hand)
    await refreshed(bench, name)
    await bench.settled_down(hand)
    assert bench.calls() == 1


async def test_another_worker_compares_with_the_limits_as_they_were_before_the_claim(bench):
    (name,) = await bench.users()
    bench.trouble(kind="applied_then_silent", times=1)
    await bench.use(name)
    await bench.tick(bench.hand(idempotent=False))
    bench.lapse_leases()
    await bench.settled_down(bench.hand(idempotent=False))
    assert bench.calls() == 1


async def test_single_items_of_unknown_fate_are_compared_too(bench):
    hand, (name,) = bench.hand(idempotent=False), await bench.users()
    bench.trouble(kind="no_batch")
    bench.trouble(kind="applied_then_silent", route="increment", times=1)
    await bench.use(name)
    await bench.settled_down(hand)
    assert bench.calls("increment") == 3


async def test_the_window_that_remains_is_a_worker_that_dies_and_limits_that_are_read_meanwhile(bench):
    """Then nobody knows any more what Zion had before: at least once. The documentation says so."""
    (name,) = await bench.users()
    bench.trouble(kind="applied_then_silent", times=1)
    await bench.use(name)
    await bench.tick(bench.hand(idempotent=False))
    await refreshed(bench, name)
    bench.lapse_leases()
    await bench.ticks_until(bench.hand(idempotent=False), lambda: bench.calls() == 2)
    assert bench.booked(name) == {limit: 2 * amount for limit, amount in bench.settled[name].items()}

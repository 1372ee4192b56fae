"""Whatever Zion answers to a batch, each unit ends in its books once, in the queue again, or as a dead letter."""

from __future__ import annotations

from typing import Any

import pytest

from sentinel_shared.contracts import LIMIT_NAMES, LimitName
from tests.support.redis_server import free_port

pytestmark = pytest.mark.xdist_group("usage-worker-answers")

FATE_UNKNOWN: dict[str, dict[str, Any]] = {
    "500": {"kind": "status", "status": 500},
    "503": {"kind": "status", "status": 503},
    "a connection that closes": {"kind": "refuse"},
    "no answer in time": {"kind": "hang"},
    "garbage": {"kind": "garbage"},
    "items missing": {"kind": "missing_items"},
    "applied, then a closed connection": {"kind": "applied_then_silent"},
    "applied, then no answer in time": {"kind": "applied_then_silent", "hang": True},
    "applied, then an error": {"kind": "applied_then_silent", "status": 502},
    "applied, then 429": {"kind": "applied_then_silent", "status": 429},
}


async def test_200_becomes_base_and_nothing_is_left(bench):
    hand, names = bench.hand(), await bench.users(3)
    await bench.use(*names, *names)
    await bench.settled_down(hand)
    for name in names:
        assert [base for base, *_ in (await bench.view(name)).ledger] == [2, 10, 14]
        assert set(await bench.owed(name)) == set(LIMIT_NAMES)
        assert all(owed == [0, 0, 0] for owed in (await bench.owed(name)).values())
    assert hand.metric("sentinel_usage_increments_total", result="applied") == 9
    assert hand.metric("sentinel_usage_lag_seconds_count") > 0


async def test_an_item_refused_for_now_is_owed_again_and_the_others_are_not(bench):
    hand, (name,) = bench.hand(), await bench.users()
    bench.trouble(kind="partial", limit_name="ai_output_tokens")
    await bench.use(name)
    await bench.tick(hand)
    assert await bench.owed(name) == {
        "ai_requests": [0, 0, 0],
        "ai_input_tokens": [0, 0, 0],
        "ai_output_tokens": [7, 0, 0],
    }
    assert bench.calls() == 1, "not asked again in the same breath"
    bench.well()
    await bench.settled_down(hand)
    assert len(bench.keys_seen()) == 2, "it goes in a batch of its own"


async def test_an_item_refused_for_good_is_a_dead_letter_and_still_counts(bench):
    hand, (name, other) = bench.hand(), await bench.users(2)
    bench.trouble(kind="partial", permanent=True, external_id=name, limit_name="ai_output_tokens")
    await bench.use(name, other)
    await bench.tick(hand)
    (letter,) = await bench.queue.dead_letters()
    assert (letter.external_id, letter.limit_name, letter.amount) == (name, LimitName.OUTPUT_TOKENS, 7)
    assert letter.reason
    assert (await bench.owed(name))["ai_output_tokens"] == [0, 0, 7]
    assert (await bench.view(name)).limits[2].used == 7
    assert bench.booked(other) == dict(bench.settled[other])
    assert hand.metric("sentinel_usage_increments_total", result="refused") == 1
    assert await bench.unaccounted() == 0


async def test_a_user_whom_zion_does_not_know_is_a_dead_letter_per_limit(bench):
    hand, (stranger,) = bench.hand(), await bench.users(in_zion=False)
    await bench.use(stranger)
    await bench.tick(hand)
    assert {letter.amount for letter in await bench.queue.dead_letters()} == {1, 5, 7}
    assert await bench.waits() == (0, 0)


@pytest.mark.parametrize("name", FATE_UNKNOWN)
async def test_a_batch_of_unknown_fate_goes_again_under_its_key_after(bench, name):
    hand, users = bench.hand(), await bench.users(2)
    bench.trouble(times=2, **FATE_UNKNOWN[name])
    await bench.use(users[0])
    await bench.tick(hand)
    (batch_id,) = bench.batch_ids()
    assert (await bench.owed(users[0]))["ai_output_tokens"] == [0, 7, 0]
    await bench.use(*users)
    await bench.settled_down(hand)
    assert batch_id in bench.keys_seen()
    assert {entry["key"] for entry in bench.zion.state.books.entries if entry["externalId"] == users[0]} > {batch_id}
    assert bench.zion.state.books.keys.counts.conflicting == 0, "the same bytes under the same key"


async def test_429_is_asked_again_after_the_time_that_zion_names_and_so_is_everything_else(bench):
    hand, (first, second) = bench.hand(), await bench.users(2)
    bench.trouble(kind="status", status=429, retry_after=1, times=1)
    await bench.use(first)
    await bench.tick(hand)
    await bench.use(second)
    await bench.settled_down(hand)
    at = list(bench.zion.state.calls["batch"].at)
    assert len(at) == 3
    assert at[1] - at[0] >= 0.99


async def test_a_refused_connection_leaves_the_batch_free_to_go_another_way(bench):
    (name,) = await bench.users()
    await bench.use(name)
    await bench.tick(bench.hand(zion_url=f"http://127.0.0.1:{free_port()}"))
    (batch_id,) = bench.batch_ids()
    bench.lapse_leases()
    bench.trouble(kind="no_batch")
    await bench.settled_down(bench.hand())
    assert bench.keys_seen() == {f"{batch_id}:{index}" for index in range(3)}


@pytest.mark.parametrize("status", [400, 413])
async def test_a_batch_refused_as_a_whole_is_halved_by_users(bench, status):
    # Users of one shard go into one batch.
    hand, users = bench.hand(), await bench.users(40)
    bench.trouble(kind="status", status=status, times=16)
    await bench.use(*users)
    await bench.settled_down(hand)
    assert await bench.queue.dead_letters() == []
    assert hand.metric("sentinel_usage_flushes_total", result="rejected") == 16
    assert all(
        len({entry["key"] for entry in bench.zion.state.books.entries if entry["externalId"] == user}) <= 3
        for user in users
    )


@pytest.mark.parametrize("status", [400, 413])
async def test_an_item_that_is_refused_all_by_itself_is_a_dead_letter(bench, status):
    hand, (name,) = bench.hand(), await bench.users()
    bench.trouble(kind="status", status=status)
    bench.trouble(kind="status", status=status, route="increment", times=1)
    await bench.use(name)
    await bench.tick(hand)
    (letter,) = await bench.queue.dead_letters()
    assert str(status) in letter.reason
    booked = bench.booked(name)
    assert len(booked) == 2
    assert {**booked, letter.limit_name: letter.amount} == dict(bench.settled[name])
    assert all(key.rpartition(":")[2] in "012" for key in bench.keys_seen())
    assert await bench.unaccounted() == 0


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_opens_the_breaker_alerts_and_keeps_everything(bench, status):
    hand, (name,) = bench.hand(), await bench.users()
    bench.trouble(kind="status", status=status)
    await bench.use(name)
    await bench.tick(hand)
    assert hand.metric("sentinel_zion_key_refused_total") == 1
    await bench.use(name)
    for _ in range(5):
        await bench.tick(hand)
    assert bench.calls() == 1
    assert await bench.owed(name) == {
        "ai_requests": [1, 1, 0],
        "ai_input_tokens": [5, 5, 0],
        "ai_output_tokens": [7, 7, 0],
    }
    bench.well()
    bench.lapse_leases()
    bench.clock.ahead_s += 5
    await bench.settled_down(hand)


@pytest.mark.parametrize("status", [404, 405])
async def test_without_a_batch_route_items_go_one_by_one_and_the_route_is_looked_for_again(bench, status):
    hand, (name,) = bench.hand(), await bench.users()
    bench.trouble(kind="no_batch", status=status)
    await bench.use(name)
    await bench.settled_down(hand)
    await bench.use(name)
    await bench.settled_down(hand)
    assert (bench.calls("batch"), bench.calls("increment")) == (1, 6)
    bench.well()
    bench.clock.ahead_s += 601
    await bench.use(name)
    await bench.settled_down(hand)
    assert (bench.calls("batch"), bench.calls("increment")) == (2, 6)


async def test_a_batch_half_done_item_by_item_is_continued_by_whoever_leases_it(bench):
    users = await bench.users(2)
    bench.trouble(kind="no_batch")
    bench.trouble(kind="applied_then_silent", route="increment", times=1)
    await bench.use(users[0])
    await bench.tick(bench.hand())
    (batch_id,) = bench.batch_ids()
    bench.lapse_leases()
    bench.well()
    await bench.settled_down(bench.hand())
    assert bench.keys_seen() == {f"{batch_id}:{index}" for index in range(3)}
    assert bench.calls("increment") == 4, "what was known to be done was not sent again"
    assert bench.calls("batch") == 1, "nor by the other way, back on the route"


async def test_without_any_increment_route_usage_waits(bench):
    hand, (name,) = bench.hand(), await bench.users()
    bench.trouble(kind="no_batch")
    bench.trouble(kind="status", status=405, route="increment")
    await bench.use(name)
    await bench.tick(hand)
    assert await bench.queue.dead_letters() == []
    bench.well()
    await bench.settled_down(hand)


async def test_a_batch_that_may_have_been_applied_keeps_its_way(bench):
    hand, (name,) = bench.hand(), await bench.users()
    bench.trouble(kind="applied_then_silent", times=1)
    await bench.use(name)
    await bench.tick(hand)
    bench.trouble(kind="no_batch", times=1)
    bench.trouble(kind="status", status=400, times=1)
    await bench.settled_down(hand)
    assert bench.calls("increment") == 0
    assert bench.calls("batch") == 4


async def test_a_worker_that_comes_too_late_with_single_items_sends_none(bench):
    """It stood still while another one leased its batch, sent it and booked it."""
    slow, quick, (name,) = bench.hand(), bench.hand(), await bench.users()
    bench.trouble(kind="no_batch", times=1)
    note_singles = bench.queue.note_singles

    async def stand_still(batch):
        bench.lapse_leases()
        await bench.settled_down(quick)
        return await note_singles(batch)

    bench.queue.note_singles = stand_still
    await bench.use(name)
    await bench.tick(slow)
    assert bench.balanced()
    assert bench.calls("increment") == 0

from __future__ import annotations

import asyncio
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentinel_shared.breaker import BACKOFF_MAX_S, Breaker, BreakerState, ZionBudget
from tests.unit.shared.clocks import ManualClock


def breaker_of(clock: ManualClock, seed: int = 1) -> Breaker:
    return Breaker(clock, Random(seed))


def record(breaker: Breaker, *, failures: int = 0, successes: int = 0) -> None:
    for _ in range(successes):
        breaker.record(success=True)
    for _ in range(failures):
        breaker.record(success=False)


def opened(clock: ManualClock) -> Breaker:
    breaker = breaker_of(clock)
    record(breaker, failures=20)
    assert breaker.state is BreakerState.OPEN
    return breaker


def test_it_opens_when_half_of_twenty_calls_have_failed():
    breaker = breaker_of(ManualClock())
    record(breaker, successes=10, failures=9)
    assert breaker.allow()
    record(breaker, failures=1)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.allow()


def test_fewer_than_twenty_calls_never_open_it():
    breaker = breaker_of(ManualClock())
    record(breaker, failures=19)
    assert breaker.state is BreakerState.CLOSED


def test_less_than_half_never_opens_it():
    breaker = breaker_of(ManualClock())
    for _ in range(100):
        record(breaker, successes=2, failures=1)
    assert breaker.state is BreakerState.CLOSED


def test_failures_older_than_ten_seconds_are_forgotten():
    clock = ManualClock()
    breaker = breaker_of(clock)
    record(breaker, failures=19)
    clock.advance(10)
    record(breaker, failures=1, successes=1)
    assert breaker.state is BreakerState.CLOSED


def test_failures_spread_over_ten_seconds_count_together():
    clock = ManualClock()
    breaker = breaker_of(clock)
    for _ in range(20):
        record(breaker, failures=1)
        clock.advance(0.45)
    assert breaker.state is BreakerState.OPEN


def test_after_the_back_off_one_probe_goes_and_only_one():
    clock = ManualClock()
    breaker = opened(clock)
    assert 0.25 <= breaker.retry_after_s <= 0.5
    clock.advance(breaker.retry_after_s)
    assert breaker.allow()
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.allow()


def test_a_probe_that_succeeds_closes_it_with_a_clean_window():
    clock = ManualClock()
    breaker = opened(clock)
    clock.advance(1)
    breaker.allow()
    record(breaker, successes=1)
    assert breaker.state is BreakerState.CLOSED
    assert breaker.retry_after_s == 0
    record(breaker, failures=18)
    assert breaker.state is BreakerState.CLOSED


def test_each_probe_that_fails_doubles_the_back_off_up_to_its_bound():
    clock = ManualClock()
    breaker = opened(clock)
    bounds_s = [0.5, 1, 2, 4, 5, 5, 5]
    for bound_s in bounds_s:
        assert bound_s / 2 <= breaker.retry_after_s <= bound_s
        clock.advance(breaker.retry_after_s)
        assert breaker.allow()
        record(breaker, failures=1)


def test_the_back_off_starts_small_again_after_a_recovery():
    clock = ManualClock()
    breaker = opened(clock)
    for _ in range(5):
        clock.advance(5)
        breaker.allow()
        record(breaker, failures=1)
    clock.advance(5)
    breaker.allow()
    record(breaker, successes=1, failures=20)
    assert breaker.retry_after_s <= 0.5


def test_replicas_do_not_probe_in_step():
    waits = set()
    for seed in range(10):
        breaker = breaker_of(ManualClock(), seed)
        record(breaker, failures=20)
        waits.add(breaker.retry_after_s)
    assert len(waits) == 10


def test_a_probe_that_was_abandoned_lets_the_next_one_go():
    clock = ManualClock()
    breaker = opened(clock)
    clock.advance(1)
    assert breaker.allow()
    breaker.abandon()
    assert breaker.allow()


def test_abandoning_a_call_while_closed_changes_nothing():
    breaker = breaker_of(ManualClock())
    breaker.abandon()
    assert breaker.state is BreakerState.CLOSED


def test_stragglers_do_not_move_an_open_breaker():
    clock = ManualClock()
    breaker = opened(clock)
    before_s = breaker.retry_after_s
    record(breaker, successes=3, failures=3)
    assert breaker.state is BreakerState.OPEN
    assert breaker.retry_after_s == before_s


def test_tripped_it_is_open_at_once_for_the_longest_back_off():
    breaker = breaker_of(ManualClock())
    breaker.trip()
    assert breaker.state is BreakerState.OPEN
    assert breaker.retry_after_s >= BACKOFF_MAX_S / 2


@given(st.lists(st.sampled_from(["allow", "ok", "fail", "abandon", "trip", "wait"]), max_size=200), st.integers(0, 99))
def test_whatever_happens_it_lets_somebody_through_within_the_longest_back_off(steps, seed):
    clock = ManualClock()
    breaker = breaker_of(clock, seed)
    for step in steps:
        match step:
            case "allow":
                breaker.allow()
            case "ok" | "fail":
                breaker.record(success=step == "ok")
            case "abandon":
                breaker.abandon()
            case "trip":
                breaker.trip()
            case _:
                clock.advance(0.3)
    breaker.abandon()
    clock.advance(BACKOFF_MAX_S)
    assert breaker.allow()


async def test_background_calls_never_take_the_slots_that_are_kept():
    budget = ZionBudget(3, kept=1)
    release = asyncio.Event()
    running = 0

    async def refresh() -> None:
        nonlocal running
        async with budget.slot(background=True):
            running += 1
            await release.wait()

    refreshes = [asyncio.create_task(refresh()) for _ in range(10)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert running == 2
    async with asyncio.timeout(1), budget.slot():
        pass
    release.set()
    await asyncio.gather(*refreshes)
    assert running == 10


async def test_there_are_never_more_calls_than_slots_and_cancelled_ones_leak_none():
    budget = ZionBudget(4, kept=2)
    inside, most = 0, 0

    async def call(*, background: bool) -> None:
        nonlocal inside, most
        async with budget.slot(background=background):
            inside += 1
            most = max(most, inside)
            try:
                await asyncio.sleep(0)
            finally:
                inside -= 1

    calls = [asyncio.create_task(call(background=number % 2 == 0)) for number in range(200)]
    random = Random(3)
    for _ in range(20):
        await asyncio.sleep(0)
        random.choice(calls).cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert most == 4
    async with (
        asyncio.timeout(1),
        budget.slot(),
        budget.slot(),
        budget.slot(background=True),
        budget.slot(background=True),
    ):
        pass


def test_a_budget_without_room_for_the_background_is_refused():
    with pytest.raises(ValueError, match="background"):
        ZionBudget(2, kept=2)

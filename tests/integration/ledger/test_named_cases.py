"""Single rules of the ledger, each as its own sentence, over the real scripts."""

from __future__ import annotations

import asyncio
import itertools
import os
import time

import pytest

from sentinel_proxy.settings import Settings
from sentinel_shared import keys
from sentinel_shared.accounts import Accounts, Binding, CommitOutcome, Cost, Freshness, Settlement, SettleOutcome
from sentinel_shared.accounts import WindowPolicy as Window
from sentinel_shared.contracts import IncrementResult, LimitName, LimitSnapshot, ResetPeriod
from sentinel_shared.errors import RedisFull, RedisUnavailable, SettingsError
from sentinel_shared.usage_queue import UsageQueue
from tests.integration.ledger.conftest import ACCOUNT_SCRIPTS, QUEUE_SCRIPTS
from tests.support.system import eventually

NUMBERS = itertools.count()
FRESHNESS = Freshness(fresh_ms=60_000, stale_ms=60_000)
OFF = Window(0, 0, 0)


def unique(word):
    return f"{word}-{next(NUMBERS)}-{os.getpid()}-{time.time_ns()}"


def snapshot(name, limit, *, used=0, period=ResetPeriod.NEVER, start_s=None, end_s=None):
    return LimitSnapshot(LimitName(name), limit, used, period, start_s, end_s)


class Case:
    """One user; `run` drives the loop that the lane lives in."""

    def __init__(self, runner, lane, *, window=OFF, lease_s=60.0, user=None):
        self.run = runner.run
        self.lane = lane
        self.user = user or unique("user")
        self.accounts = Accounts(lane, ACCOUNT_SCRIPTS, window=window, lease_s=lease_s)
        self.queue = UsageQueue(lane, QUEUE_SCRIPTS)

    def commit(self, *limits, start=None):
        begun = start or self.run(self.accounts.refresh_begin(self.user))
        return self.run(
            self.accounts.refresh_commit(
                external_id=self.user,
                start=begun,
                limits=limits,
                freshness=FRESHNESS,
                next_refresh_s=50,
                now_s=time.time(),
            )
        )

    def admit(self, input_tokens=1, wanted=0, most=16_384, choices=1, rid=None):
        cost = Cost(input_tokens, wanted, most, choices)
        return self.run(self.accounts.admit(rid=rid or unique("r"), external_id=self.user, cost=cost))

    def settle(self, rid, requests=1, input_tokens=0, output_tokens=0, **more):
        return self.run(
            self.accounts.settle(Settlement(rid, self.user, requests, input_tokens, output_tokens, "", **more))
        )

    def view(self):
        return self.run(self.accounts.read(self.user))

    def dump(self):
        reply = self.run(self.lane.execute(keys.account(self.user), "HGETALL", keys.account(self.user)))
        return dict(zip(reply[::2], reply[1::2], strict=True))


@pytest.fixture
def case(runner, lane):
    return lambda **options: Case(runner, lane, **options)


def test_an_account_never_seen_is_a_miss(case):
    assert case().admit() is None


@pytest.mark.parametrize("limits", [(), (("ai_requests", None),), (("ai_requests", 5),)])
def test_absent_and_unlimited_limits_bind_nobody(case, limits):
    one = case()
    one.commit(*(snapshot(name, limit) for name, limit in limits))
    decision = one.admit(input_tokens=10**9, wanted=-1)
    assert decision.admitted
    assert decision.granted_output_tokens == -1


def test_a_limit_of_0_denies(case):
    one = case()
    one.commit(snapshot("ai_requests", 0))
    decision = one.admit()
    assert not decision.admitted
    assert decision.binding is Binding.REQUESTS


def test_the_first_call_under_a_small_limit_is_admitted_without_max_tokens(case):
    one = case()
    one.commit(snapshot("ai_output_tokens", 100))
    decision = one.admit(wanted=-1, most=16_384)
    assert decision.admitted
    assert decision.granted_output_tokens == 100


@pytest.mark.parametrize(
    ("limit", "wanted", "most", "choices", "granted"),
    [
        (100_000, -1, 16_384, 1, 16_384),
        (10_000, -1, 16_384, 1, 5_000),
        (400, -1, 16_384, 1, 256),
        (100_000, 700, 16_384, 1, 700),
        (500, 700, 16_384, 1, 500),
        (1_000, 3 * 400, 16_384, 3, 999),
        (3, -1, 3 * 16_384, 3, 3),
    ],
)
def test_what_is_granted(case, limit, wanted, most, choices, granted):  # noqa: PLR0917
    one = case()
    one.commit(snapshot("ai_output_tokens", limit))
    assert one.admit(wanted=wanted, most=most, choices=choices).granted_output_tokens == granted


def test_what_is_only_promised_to_others_is_busy_not_used_up(case):
    one = case()
    one.commit(snapshot("ai_output_tokens", 100))
    assert one.admit(wanted=100).admitted
    decision = one.admit(wanted=10)
    assert decision.binding is Binding.BUSY_OUTPUT_TOKENS
    assert 0 < decision.wait_ms <= 5_000


def test_a_denied_request_changes_nothing(case):
    one = case(window=Window(60_000, 1, 0))
    one.commit(snapshot("ai_requests", 100), snapshot("ai_output_tokens", 0))
    before = one.dump()
    assert not one.admit(wanted=10).admitted
    assert one.dump() == before
    assert one.admit(wanted=0).admitted
    before = one.dump()
    assert one.admit(wanted=0).binding is Binding.WINDOW_REQUESTS
    assert one.dump() == before


def test_the_same_request_again_gets_the_same_grant_and_reserves_once(case):
    one = case()
    one.commit(snapshot("ai_output_tokens", 1_000))
    first, second = (one.admit(wanted=300, rid="same" + one.user) for _ in range(2))
    assert first.granted_output_tokens == second.granted_output_tokens == 300
    assert one.view().limits[0].reserved == 300


def test_a_refund_charges_nothing_and_gives_the_window_its_request_back(case):
    one = case(window=Window(60_000, 1, 0))
    one.commit(snapshot("ai_requests", 1))
    rid = unique("r")
    assert one.admit(rid=rid).admitted
    assert not one.admit().admitted
    one.settle(rid, requests=0, window_requests_back=1)
    assert one.admit().admitted


def test_a_settlement_after_a_reap_may_take_pending_below_what_was_claimed(case):
    one = case(lease_s=0.001)
    one.commit(snapshot("ai_input_tokens", 10_000))
    rid = unique("r")
    assert one.admit(input_tokens=500, rid=rid).admitted
    time.sleep(0.005)
    shard = keys.shard_of(one.user)
    while one.run(one.queue.reap(shard, at_most=100)):
        pass
    batch = one.run(
        one.queue.claim(shard, batch_id=unique("b"), users=100, items=1000, lease_s=9, gather_s=0, enough_users=1)
    )
    assert batch is not None
    assert one.settle(rid, input_tokens=20) is SettleOutcome.CORRECTED
    view = one.view()
    assert view.ledger[0] == (0, -480, 500, 0)
    assert view.limits[0].used == 20


def test_a_user_has_one_batch_in_flight_at_most_and_is_put_back_by_its_ack(case):
    one = case()
    one.commit(snapshot("ai_requests", 100))
    shard = keys.shard_of(one.user)

    def claim():
        return one.run(
            one.queue.claim(shard, batch_id=unique("b"), users=100, items=1000, lease_s=9, gather_s=0, enough_users=1)
        )

    def use():
        rid = unique("r")
        assert one.admit(rid=rid).admitted
        one.settle(rid)

    while claim():
        pass  # what other cases have left in this shard
    use()
    first = claim()
    assert first is not None
    use()
    assert claim() is None
    assert one.view().ledger[0] == (0, 1, 1, 0)
    applied = IncrementResult(applied=True, permanent=False, new_value=1, error=None)
    assert one.run(one.queue.ack(first, [applied] * len(first.increments())))
    second = claim()
    assert second is not None
    assert [item.amount for item in second.increments() if item.external_id == one.user] == [1]


def test_halves_of_a_batch_stand_for_their_users(case):
    one, two = case(user=unique("half")), case()
    shard = keys.shard_of(one.user)
    while keys.shard_of(two.user) != shard:
        two = case()

    def use():
        for each in (one, two):
            rid = unique("r")
            assert each.admit(rid=rid).admitted
            each.settle(rid)

    def claim():
        return one.run(
            one.queue.claim(shard, batch_id=unique("b"), users=100, items=1000, lease_s=9, gather_s=0, enough_users=1)
        )

    while claim():
        pass  # what other cases have left in this shard
    for each in (one, two):
        each.commit(snapshot("ai_requests", 100))
    use()
    assert one.run(one.queue.split(claim(), first_id=unique("b"), second_id=unique("b")))
    use()
    assert claim() is None, "a user has one batch in flight at most"


def test_a_batch_that_too_few_replicas_have_is_kept_and_not_sent(case):
    one = case()
    one.commit(snapshot("ai_requests", 100))
    rid = unique("r")
    assert one.admit(rid=rid).admitted
    one.settle(rid)
    careful = UsageQueue(one.lane, QUEUE_SCRIPTS, wait_replicas=1)
    shard = keys.shard_of(one.user)
    with pytest.raises(RedisUnavailable, match="0 of 1 replicas"):
        one.run(
            careful.claim(shard, batch_id=unique("b"), users=100, items=1000, lease_s=0, gather_s=0, enough_users=1)
        )

    def is_kept():  # among what other cases have left in this shard
        batch = one.run(one.queue.lease(shard, lease_s=9))
        return batch is not None and one.user in {item.external_id for item in batch.increments()}

    eventually(is_kept, within_s=5)


@pytest.mark.parametrize("charged", [1, 0])
@pytest.mark.parametrize("age_ms", [1, 0])
def test_an_admission_that_comes_after_its_settlement_is_charged_nothing_more(case, charged, age_ms):
    """Given up for lost, it waited in another connection's buffer; so may have the settlement's own first attempt."""
    one = case(lease_s=0.001)
    one.commit(snapshot("ai_requests", 10), snapshot("ai_input_tokens", 100))
    rid, other = unique("r"), unique("r")
    for each in (rid, other):
        one.settle(each, requests=charged, input_tokens=7 * charged)
        assert one.admit(input_tokens=5, rid=each).admitted
    again = one.settle(rid, requests=charged, input_tokens=7 * charged, attempt_age_ms=age_ms)
    assert again is SettleOutcome.KNOWN_BEFORE
    assert [(state.used, state.reserved) for state in one.view().limits] == [(2 * charged, 1), (14 * charged, 5)]
    time.sleep(0.005)
    one.run(one.queue.reap(keys.shard_of(one.user), at_most=100))
    assert [(state.used, state.reserved) for state in one.view().limits] == [(2 * charged, 0), (14 * charged, 0)]
    again = one.settle(other, requests=charged, input_tokens=7 * charged, attempt_age_ms=age_ms)
    assert again is SettleOutcome.KNOWN_BEFORE
    assert [state.used for state in one.view().limits] == [2 * charged, 14 * charged]


def test_a_settlement_without_its_reservation_is_remembered_longer_than_any_lease(case):
    one = case()
    one.commit(snapshot("ai_requests", 10))
    rid = unique("r")
    assert one.settle(rid) is SettleOutcome.RESERVATION_LOST
    marker = keys.settled_prefix(keys.shard_of(one.user)) + rid
    life_s = one.run(one.lane.execute(marker, "TTL", marker))
    needed = {"ZION_API_URL": "http://z", "ZION_API_KEY": "k", "VERCEL_AI_GATEWAY_API_KEY": "k"}
    with pytest.raises(SettingsError):
        Settings.from_env({**needed, "RESERVATION_LEASE_SECONDS": str(life_s - keys.SETTLED_TTL_S + 2)})


def test_an_account_that_was_lost_keeps_what_is_settled_and_asks_zion_again(case):
    one = case()
    one.commit(snapshot("ai_requests", 10), snapshot("ai_input_tokens", 100), snapshot("ai_output_tokens", 100))
    rid = unique("r")
    assert one.admit(input_tokens=5, wanted=7, rid=rid).admitted
    one.run(one.lane.execute(keys.account(one.user), "DEL", keys.account(one.user)))
    assert one.settle(rid, input_tokens=5, output_tokens=7) is SettleOutcome.RESERVATION_LOST
    assert one.admit() is None
    one.commit(snapshot("ai_requests", 10), snapshot("ai_input_tokens", 100), snapshot("ai_output_tokens", 100))
    assert [state.used for state in one.view().limits] == [1, 5, 7]


def test_a_settlement_too_old_to_be_told_apart_is_taken_for_settled(case):
    one = case()
    one.commit(snapshot("ai_requests", 10))
    too_old_ms = keys.SETTLED_TTL_S * 1000
    assert one.settle(unique("r"), attempt_age_ms=too_old_ms) is SettleOutcome.KNOWN_BEFORE
    assert one.settle(unique("r"), attempt_age_ms=too_old_ms - 1) is SettleOutcome.RESERVATION_LOST
    assert one.view().limits[0].used == 1


def test_a_late_answer_does_not_bring_old_limits_back(case):
    one = case()
    one.commit(snapshot("ai_requests", 10))
    late = one.run(one.accounts.refresh_begin(one.user))
    assert one.commit(snapshot("ai_requests", 3)) is CommitOutcome.COMMITTED
    assert one.commit(snapshot("ai_requests", 10), start=late) is CommitOutcome.OVERTAKEN
    assert one.view().limits[0].limit == 3


def test_an_account_at_rest_outlives_its_limits_by_the_longest_window(case):
    one = case(window=Window(86_400_000, 3, 0))
    one.commit(snapshot("ai_requests", 10))
    rid = unique("r")
    assert one.admit(rid=rid).admitted
    assert one.run(one.lane.execute(keys.account(one.user), "TTL", keys.account(one.user))) == -1
    one.settle(rid, requests=0)
    assert one.run(one.lane.execute(keys.account(one.user), "TTL", keys.account(one.user))) > 86_000
    assert one.view().window_requests == 1


def test_a_mark_that_comes_before_an_older_answer_is_committed_stays_due(case):
    one = case()
    one.commit(snapshot("ai_requests", 10))
    due = keys.due(keys.shard_of(one.user))

    def due_in_s():
        return float(one.run(one.lane.execute(due, "ZSCORE", due, one.user))) / 1000 - time.time()

    assert due_in_s() > 40
    start = one.run(one.accounts.refresh_begin(one.user))
    one.run(one.accounts.mark_due(one.user, now_s=time.time()))
    one.commit(snapshot("ai_requests", 11), start=start)
    assert due_in_s() <= 0
    one.run(one.accounts.mark_due(one.user, now_s=time.time() + 5))
    one.commit(snapshot("ai_requests", 12))
    assert due_in_s() > 40


def test_a_period_rolls_over_by_itself_and_what_is_owed_stays_counted(case):
    one = case()
    end_s = int(time.time()) + 2
    one.commit(snapshot("ai_requests", 10, used=9, period=ResetPeriod.DAILY, start_s=end_s - 9, end_s=end_s))
    rid = unique("r")
    assert one.admit(rid=rid).admitted
    one.settle(rid)
    assert not one.admit().admitted
    while time.time() < end_s + 0.05:
        time.sleep(0.02)
    decision = one.admit()
    assert decision.admitted
    assert decision.refresh_due
    assert one.view().limits[0].used == 1


def test_an_answer_about_a_period_that_is_over_does_not_count_as_this_periods(case):
    one = case()
    over_s = int(time.time()) - 1
    outcome = one.commit(
        snapshot("ai_requests", 10, used=9, period=ResetPeriod.DAILY, start_s=over_s - 9, end_s=over_s)
    )
    assert outcome is CommitOutcome.PERIOD_OVER
    view = one.view()
    assert (view.limits[0].limit, view.limits[0].used) == (10, 0)


@pytest.mark.parametrize("period", list(ResetPeriod))
def test_a_period_without_dates_gets_the_calendars(case, period):
    one = case()
    one.commit(snapshot("ai_requests", 10, period=period))
    end_s = one.view().limits[0].period_end_s
    if period is ResetPeriod.NEVER:
        assert end_s is None
    else:
        assert 0 < end_s - time.time() <= 31 * 86_400
        assert end_s % 86_400 == 0


def test_any_true_window_holds_at_most_the_limit_and_waiting_as_told_helps(case):
    window_ms, most = 1_200, 5
    one = case(window=Window(window_ms, most, 0))
    one.commit()
    admitted_ms = []
    until = time.monotonic() + 4
    while time.monotonic() < until:
        decision = one.admit()
        if decision.admitted:
            admitted_ms.append(decision.now_ms)
        else:
            assert 1 <= decision.wait_ms <= window_ms + window_ms // 12 + 1
            time.sleep((decision.wait_ms + 2) / 1000)
            assert one.admit(rid=unique("told")).admitted
            admitted_ms.append(one.view().now_ms)
    for first, beyond in zip(admitted_ms, admitted_ms[most:], strict=False):
        assert beyond - first >= window_ms - 2
    assert len(admitted_ms) >= 2 * most


def test_the_token_window_is_corrected_by_what_was_really_used(case):
    one = case(window=Window(60_000, 0, 1_000))
    one.commit()
    rid = unique("r")
    assert one.admit(input_tokens=100, wanted=900, rid=rid).granted_output_tokens == 900
    assert one.admit(input_tokens=1).binding is Binding.WINDOW_TOKENS
    one.settle(rid, input_tokens=100, output_tokens=50)
    assert one.view().window_tokens == 150
    assert one.admit(input_tokens=1, wanted=10_000).granted_output_tokens == 849


@pytest.mark.parametrize("user", ['quote " and \\', "new\nline", "snow ☃ man", "{braces}", "x" * 1_000, "a b  c"])
def test_an_external_id_may_be_anything(case, user):
    one = case(lease_s=0.001, user=user + unique(""))
    one.commit(snapshot("ai_requests", 10))
    assert one.admit().admitted
    time.sleep(0.005)
    shard = keys.shard_of(one.user)
    while one.run(one.queue.reap(shard, at_most=100)):
        pass
    assert one.view().limits[0].reserved == 0
    batches = []
    while batch := one.run(
        one.queue.claim(shard, batch_id=unique("b"), users=100, items=1000, lease_s=9, gather_s=0, enough_users=1)
    ):
        batches.append(batch)
    assert one.user in {item.external_id for batch in batches for item in batch.increments()}


def test_integers_up_to_2_to_the_53_stay_exact(case):
    one = case()
    one.commit(snapshot("ai_input_tokens", 2**53 - 1, used=2**53 - 3))
    assert one.admit(input_tokens=2).admitted
    assert one.view().limits[0].reserved == 2
    assert not one.admit(input_tokens=1).admitted


def test_no_key_is_left_without_a_bound(case):
    one = case()
    one.commit(snapshot("ai_requests", 10))
    rid = unique("r")
    assert one.admit(rid=rid).admitted
    one.settle(rid)

    async def unbounded():
        bounded = ("queue", "leases", "due", "audit", "batches", "dead_letters", "tallies")
        found = []
        for name in await one.lane.call_on_each("KEYS", "sentinel:*")[0]:
            life = await one.lane.execute(name, "TTL", name)
            kind = name.decode().split("}:")[-1].split(":")[0]
            owed = kind in {"account", "batch"}  # with anything owed they live until it is acknowledged
            if life < 0 and kind not in bounded and not owed:
                found.append(name)
        return found

    assert one.run(unbounded()) == []


def test_when_redis_is_full_nothing_is_admitted_but_debts_are_settled(case):
    one = case()
    one.commit(snapshot("ai_requests", 10))
    rid = unique("r")
    assert one.admit(rid=rid).admitted
    one.run(asyncio.wait_for(one.lane.call_on_each("CONFIG", "SET", "maxmemory", "1")[0], 5))
    try:
        with pytest.raises(RedisFull):
            one.admit()
        assert one.settle(rid) is SettleOutcome.SETTLED
    finally:
        one.run(asyncio.wait_for(one.lane.call_on_each("CONFIG", "SET", "maxmemory", "0")[0], 5))

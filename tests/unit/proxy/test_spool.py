"""Settlements that wait on disk are settled once Redis is back, whoever is still alive to do it."""

from __future__ import annotations

import os

import pytest

from sentinel_proxy.spool import Spool, SpoolUnusable, ledger_name
from sentinel_shared.accounts import Settlement
from sentinel_shared.errors import RedisOutcomeUnknown, RedisRefused, RedisUnavailable


def a_settlement(rid="r1"):
    return Settlement(rid, 'ali "ce"\n', 1, 20, 30, "event")


class Redis:
    """Takes settlements, or is away."""

    def __init__(self, *, away=False, silent=False):
        self.away = away
        self.silent = silent
        self.settled = []
        self.asked = 0
        self.refuses = set()

    async def reach(self):
        if self.away:
            raise RedisUnavailable("away")

    async def settle(self, settlement):
        self.asked += 1
        if self.away or self.silent:
            raise RedisOutcomeUnknown("no reply")
        if settlement.rid in self.refuses:
            raise RedisRefused("WRONGTYPE")
        self.settled.append(settlement)


async def test_what_waits_is_settled_and_the_file_is_gone(tmp_path):
    spool, redis = Spool(tmp_path), Redis()
    spool.put(a_settlement("a"), attempted_s=None)
    spool.put(a_settlement("b"), attempted_s=None)
    assert await spool.replay(redis.settle, redis.reach, now_s=100) == 2
    assert [settlement.rid for settlement in redis.settled] == ["a", "b"]
    assert redis.settled[0] == a_settlement("a")
    assert spool.waiting == 0
    assert list(tmp_path.iterdir()) == []


async def test_a_failed_replay_keeps_everything(tmp_path):
    spool, redis = Spool(tmp_path), Redis(away=True)
    spool.put(a_settlement(), attempted_s=None)
    with pytest.raises(RedisUnavailable):
        await spool.replay(redis.settle, redis.reach, now_s=100)
    redis.away = False
    assert await spool.replay(redis.settle, redis.reach, now_s=101) == 1


async def test_the_age_of_the_first_attempt_is_told(tmp_path):
    spool, redis = Spool(tmp_path), Redis()
    spool.put(a_settlement("asked"), attempted_s=90)
    spool.put(a_settlement("never asked"), attempted_s=None)
    await spool.replay(redis.settle, redis.reach, now_s=100)
    assert [settlement.attempt_age_ms for settlement in redis.settled] == [10_000, 0]


async def test_a_replay_that_failed_counts_as_an_attempt(tmp_path):
    spool, redis = Spool(tmp_path), Redis(silent=True)
    spool.put(a_settlement(), attempted_s=None)
    with pytest.raises(RedisUnavailable):
        await spool.replay(redis.settle, redis.reach, now_s=100)
    with pytest.raises(RedisUnavailable):
        await spool.replay(redis.settle, redis.reach, now_s=130)
    redis.silent = False
    await spool.replay(redis.settle, redis.reach, now_s=160)
    assert redis.settled[0].attempt_age_ms == 60_000, "the first attempt is the one that may have been applied"


async def test_what_redis_never_saw_does_not_age_however_long_redis_is_away(tmp_path):
    spool, redis = Spool(tmp_path), Redis(away=True)
    spool.put(a_settlement(), attempted_s=None)
    for now_s in range(0, 3_600, 60):
        with pytest.raises(RedisUnavailable):
            await spool.replay(redis.settle, redis.reach, now_s=now_s)
    redis.away = False
    await spool.replay(redis.settle, redis.reach, now_s=3_600)
    assert redis.settled == [a_settlement()], "one with an age of 15 minutes is taken for settled"


async def test_a_dead_process_s_file_is_adopted_and_a_living_one_s_is_not(tmp_path):
    dead, living, heir, redis = Spool(tmp_path), Spool(tmp_path), Spool(tmp_path), Redis()
    dead.put(a_settlement("of the dead"), attempted_s=None)
    living.put(a_settlement("of the living"), attempted_s=None)
    dead.close()
    assert await heir.replay(redis.settle, redis.reach, now_s=100) == 1
    assert [settlement.rid for settlement in redis.settled] == ["of the dead"]
    assert len(list(tmp_path.iterdir())) == 1


async def test_settlements_of_another_redis_are_left_alone(tmp_path):
    dead, heir, redis = Spool(tmp_path, ledger=ledger_name("redis://a:1")), Spool(tmp_path, ledger="other"), Redis()
    dead.put(a_settlement(), attempted_s=None)
    dead.close()
    assert await heir.replay(redis.settle, redis.reach, now_s=100) == 0
    assert ledger_name("redis://user:secret@a:1") == ledger_name("redis://a:1") != ledger_name("redis://b:1")


async def test_a_line_torn_by_a_crash_does_not_hide_the_others(tmp_path):
    dead, heir, redis = Spool(tmp_path), Spool(tmp_path), Redis()
    dead.put(a_settlement("whole"), attempted_s=None)
    dead.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + b'\n{"settlement":{"rid":"to')
    assert await heir.replay(redis.settle, redis.reach, now_s=100) == 1


async def test_an_adoption_that_failed_can_be_repeated(tmp_path):
    dead, heir, redis = Spool(tmp_path), Spool(tmp_path), Redis(silent=True)
    dead.put(a_settlement(), attempted_s=None)
    dead.close()
    with pytest.raises(RedisUnavailable):
        await heir.replay(redis.settle, redis.reach, now_s=100)
    redis.silent = False
    assert await heir.replay(redis.settle, redis.reach, now_s=130) == 1
    assert redis.settled[0].attempt_age_ms == 30_000


async def test_a_long_outage_costs_no_more_to_look_at_than_a_short_one(tmp_path):
    spool, redis = Spool(tmp_path), Redis(silent=True)
    for number in range(3_500):
        spool.put(a_settlement(f"r{number}"), attempted_s=None)
        if number % 500 == 499:
            await spool.sync()
    assert spool.waiting == 3_500
    with pytest.raises(RedisUnavailable):
        await spool.replay(redis.settle, redis.reach, now_s=100)
    assert redis.asked < 100
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 300_000
    redis.silent = False
    assert await spool.replay(redis.settle, redis.reach, now_s=101) == 3_500
    assert len({settlement.rid for settlement in redis.settled}) == 3_500
    assert (spool.waiting, list(tmp_path.iterdir())) == (0, [])


async def test_what_comes_during_a_replay_waits_for_the_next(tmp_path):
    spool, redis = Spool(tmp_path), Redis()
    spool.put(a_settlement("first"), attempted_s=None)

    async def settle(settlement):
        spool.put(a_settlement("second"), attempted_s=None)
        await redis.settle(settlement)

    assert await spool.replay(settle, redis.reach, now_s=100) == 1
    assert spool.waiting == 1
    assert await spool.replay(redis.settle, redis.reach, now_s=101) == 1
    assert [settlement.rid for settlement in redis.settled] == ["first", "second"]


async def test_what_redis_refuses_stays_and_does_not_hold_up_the_others(tmp_path):
    spool, dead, redis = Spool(tmp_path), Spool(tmp_path), Redis()
    dead.put(a_settlement("refused"), attempted_s=None)
    dead.put(a_settlement("beside it"), attempted_s=None)
    dead.close()
    spool.put(a_settlement("elsewhere"), attempted_s=None)
    redis.refuses = {"refused"}
    with pytest.raises(RedisRefused):
        await spool.replay(redis.settle, redis.reach, now_s=100)
    assert [settlement.rid for settlement in redis.settled] == ["beside it", "elsewhere"]
    redis.refuses = set()
    await spool.replay(redis.settle, redis.reach, now_s=101)
    assert redis.settled[-1].rid == "beside it"
    assert "refused" in {settlement.rid for settlement in redis.settled}


async def test_a_line_cut_by_a_full_disk_is_told_and_takes_no_other_with_it(tmp_path, monkeypatch):
    spool, redis = Spool(tmp_path), Redis()
    spool.put(a_settlement("before"), attempted_s=None)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, text: write(fd, text[:20]))
    with pytest.raises(OSError, match="No space"):
        spool.put(a_settlement("cut"), attempted_s=None)
    monkeypatch.undo()
    spool.put(a_settlement("after"), attempted_s=None)
    await spool.replay(redis.settle, redis.reach, now_s=100)
    assert [settlement.rid for settlement in redis.settled] == ["before", "after"]


def test_a_folder_that_cannot_be_written_names_the_variable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SpoolUnusable, match="SPOOL_DIR"):
        Spool(tmp_path / "file" / "spool")

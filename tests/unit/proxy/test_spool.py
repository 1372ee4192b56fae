"""Settlements that wait on disk are settled once Redis is back, whoever is still alive to do it."""

from __future__ import annotations

import pytest

from sentinel_proxy.spool import Spool, SpoolUnusable, ledger_name
from sentinel_shared.accounts import Settlement
from sentinel_shared.errors import RedisUnavailable


def a_settlement(rid="r1"):
    return Settlement(rid, 'ali "ce"\n', 1, 20, 30, "event")


class Redis:
    """Takes settlements, or is away."""

    def __init__(self, *, away=False):
        self.away = away
        self.settled = []

    async def settle(self, settlement):
        if self.away:
            raise RedisUnavailable("away")
        self.settled.append(settlement)


async def test_what_waits_is_settled_and_the_file_is_gone(tmp_path):
    spool, redis = Spool(tmp_path), Redis()
    spool.put(a_settlement("a"), attempted_s=None)
    spool.put(a_settlement("b"), attempted_s=None)
    assert await spool.replay(redis.settle, now_s=100) == 2
    assert [settlement.rid for settlement in redis.settled] == ["a", "b"]
    assert redis.settled[0] == a_settlement("a")
    assert spool.waiting == 0
    assert list(tmp_path.iterdir()) == []


async def test_a_failed_replay_keeps_everything(tmp_path):
    spool, redis = Spool(tmp_path), Redis(away=True)
    spool.put(a_settlement(), attempted_s=None)
    with pytest.raises(RedisUnavailable):
        await spool.replay(redis.settle, now_s=100)
    redis.away = False
    assert await spool.replay(redis.settle, now_s=101) == 1


async def test_the_age_of_the_first_attempt_is_told(tmp_path):
    spool, redis = Spool(tmp_path), Redis()
    spool.put(a_settlement("asked"), attempted_s=90)
    spool.put(a_settlement("never asked"), attempted_s=None)
    await spool.replay(redis.settle, now_s=100)
    assert [settlement.attempt_age_ms for settlement in redis.settled] == [10_000, 0]


async def test_a_replay_that_failed_counts_as_an_attempt(tmp_path):
    spool, redis = Spool(tmp_path), Redis(away=True)
    spool.put(a_settlement(), attempted_s=None)
    with pytest.raises(RedisUnavailable):
        await spool.replay(redis.settle, now_s=100)
    redis.away = False
    await spool.replay(redis.settle, now_s=160)
    assert redis.settled[0].attempt_age_ms == 60_000


async def test_a_dead_process_s_file_is_adopted_and_a_living_one_s_is_not(tmp_path):
    dead, living, heir, redis = Spool(tmp_path), Spool(tmp_path), Spool(tmp_path), Redis()
    dead.put(a_settlement("of the dead"), attempted_s=None)
    living.put(a_settlement("of the living"), attempted_s=None)
    dead.close()
    assert await heir.replay(redis.settle, now_s=100) == 1
    assert [settlement.rid for settlement in redis.settled] == ["of the dead"]
    assert len(list(tmp_path.iterdir())) == 1


async def test_settlements_of_another_redis_are_left_alone(tmp_path):
    dead, heir, redis = Spool(tmp_path, ledger=ledger_name("redis://a:1")), Spool(tmp_path, ledger="other"), Redis()
    dead.put(a_settlement(), attempted_s=None)
    dead.close()
    assert await heir.replay(redis.settle, now_s=100) == 0
    assert ledger_name("redis://user:secret@a:1") == ledger_name("redis://a:1") != ledger_name("redis://b:1")


async def test_a_line_torn_by_a_crash_does_not_hide_the_others(tmp_path):
    dead, heir, redis = Spool(tmp_path), Spool(tmp_path), Redis()
    dead.put(a_settlement("whole"), attempted_s=None)
    dead.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + b'{"settlement":{"rid":"to')
    assert await heir.replay(redis.settle, now_s=100) == 1


async def test_an_adoption_that_failed_can_be_repeated(tmp_path):
    dead, heir, redis = Spool(tmp_path), Spool(tmp_path), Redis(away=True)
    dead.put(a_settlement(), attempted_s=None)
    dead.close()
    with pytest.raises(RedisUnavailable):
        await heir.replay(redis.settle, now_s=100)
    redis.away = False
    assert await heir.replay(redis.settle, now_s=130) == 1
    assert redis.settled[0].attempt_age_ms == 30_000


def test_a_folder_that_cannot_be_written_names_the_variable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SpoolUnusable, match="SPOOL_DIR"):
        Spool(tmp_path / "file" / "spool")

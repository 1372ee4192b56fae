"""What replicas are taken to have: never more than the connection that wrote it was told."""

from __future__ import annotations

import asyncio

import pytest

from sentinel_shared.errors import RedisOutcomeUnknown, RedisUnavailable
from sentinel_shared.replication import Replication


class Lane:
    """One server; the test answers its WAITs."""

    def __init__(self):
        self.link = object()
        self.asked = []

    def link_to(self, _key):
        return self.link

    def submit(self, *_command):
        return answered(b"OK")

    def wait(self, _key, _replicas, _timeout_ms):
        self.asked.append(asyncio.get_running_loop().create_future())
        return self.asked[-1]


def a_lane():
    return Lane()


def answered(reply):
    future = asyncio.get_running_loop().create_future()
    future.set_result(reply)
    return future


async def until_asked(lane, times):
    async with asyncio.timeout(5):
        while len(lane.asked) < times:
            await asyncio.sleep(0)


async def test_what_is_written_while_a_question_is_open_is_asked_about_at_once_by_the_next():
    lane = a_lane()
    replication = Replication(lane, 1)
    first = asyncio.create_task(replication.of(3, answered(1)))
    await until_asked(lane, 1)
    others = [asyncio.create_task(replication.of(3, answered(number))) for number in range(20)]
    await asyncio.sleep(0)
    lane.asked[0].set_result(1)
    assert await first == (1, 1)
    await until_asked(lane, 2)
    lane.asked[1].set_result(2)
    assert await asyncio.gather(*others) == [(number, 2) for number in range(20)]
    assert len(lane.asked) == 2


async def test_only_what_was_written_before_the_question_counts():
    lane = a_lane()
    late = asyncio.get_running_loop().create_future()
    asking = asyncio.create_task(Replication(lane, 1).of(3, late))
    await asyncio.sleep(0.01)
    assert lane.asked == [], "Redis may have asked for the script first, and run it after a question of this tick"
    late.set_result(1)
    await until_asked(lane, 1)
    lane.asked[0].set_result(1)
    assert await asking == (1, 1)


async def test_another_connection_cannot_speak_for_what_was_written_on_a_lost_one():
    lane = a_lane()
    writing = asyncio.get_running_loop().create_future()
    asking = asyncio.create_task(Replication(lane, 1).of(3, writing))
    await asyncio.sleep(0)
    lane.link = object()
    writing.set_result(1)
    async with asyncio.timeout(5):
        assert await asking == (1, 0)
    assert lane.asked == []


async def test_a_question_without_an_answer_leaves_the_write_applied():
    lane = a_lane()
    asking = asyncio.create_task(Replication(lane, 1).of(3, answered(1)))
    await until_asked(lane, 1)
    lane.asked[0].set_exception(RedisUnavailable("nothing was applied, of the question"))
    assert await asking == (1, 0)


async def test_a_write_that_failed_is_not_asked_about():
    lane = a_lane()
    failed = asyncio.get_running_loop().create_future()
    failed.set_exception(RedisOutcomeUnknown("perhaps"))
    with pytest.raises(RedisOutcomeUnknown):
        await Replication(lane, 1).of(3, failed)
    assert lane.asked == []


async def test_where_nothing_was_written_nothing_is_asked():
    lane = a_lane()
    assert await Replication(lane, 1).of(3, answered(None), wrote=bool) == (None, 0)
    assert lane.asked == []


async def test_one_caller_who_gives_up_leaves_the_others_their_answer():
    lane = a_lane()
    replication = Replication(lane, 1)
    leaver, stayer = (asyncio.create_task(replication.of(3, answered(1))) for _ in range(2))
    await until_asked(lane, 1)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    lane.asked[0].set_result(1)
    assert await stayer == (1, 1)

"""How many replicas have what was written: a fail-over must not forget what somebody was told, or is about to be."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

from sentinel_shared import keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel_shared.redis_lane import RedisLane, Reply

_WAIT_MS: Final = 500


class Replication:
    """Redis answers nothing else on a connection that waits: the `lane` is to be one on which nobody is in a hurry.

    What is written while one question is open is asked about by the next one, all of it at once.
    """

    def __init__(self, lane: RedisLane, replicas: int) -> None:
        self.replicas = replicas
        """How many must have it; 0: none, and nothing is asked."""
        self._lane = lane
        self._open: set[object] = set()
        self._next: dict[object, asyncio.Future[int]] = {}

    async def of(
        self, shard: int, writing: asyncio.Future[Reply], *, wrote: Callable[[Reply], bool] = lambda _: True
    ) -> tuple[Reply, int]:
        """The reply to a write to a shard that has just been sent, and how many replicas have it 0.5 to 1 s later.

        0 also where that cannot be told, and where by `wrote` of the reply there is nothing to ask about. Raises as the
        lane does, about the write alone.
        """
        if not self.replicas:
            return await writing, 0
        key = keys.replication(shard)
        link = self._lane.link_to(key)
        reply = await writing
        if not wrote(reply):
            return reply, 0
        return reply, await asyncio.shield(self._answer(link, key))

    def _answer(self, link: object, key: str) -> asyncio.Future[int]:
        answer = self._next.get(link)
        if answer is None:
            loop = asyncio.get_running_loop()
            answer = self._next[link] = loop.create_future()
            if link not in self._open:
                self._open.add(link)
                loop.call_soon(self._ask, link, key)
        return answer

    def _ask(self, link: object, key: str) -> None:
        answer = self._next.pop(link)

        def answered(waiting: asyncio.Future[Reply]) -> None:
            known = not waiting.cancelled() and waiting.exception() is None
            answer.set_result(cast("int", waiting.result()) if known else 0)
            if link in self._next:
                self._ask(link, key)
            else:
                self._open.discard(link)

        if self._lane.link_to(key) is not link:
            # Another connection may be one to another master, which knows nothing of what the old one was told.
            self._open.discard(link)
            answer.set_result(0)
            return
        # WAIT speaks of what its own connection has written: a write right before it stands for all before that.
        marking = self._lane.submit(key, "SET", key, 1, "EX", keys.REPLICATION_TTL_S)
        marking.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._lane.wait(key, self.replicas, _WAIT_MS).add_done_callback(answered)

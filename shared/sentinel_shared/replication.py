"""How many replicas have what was written: a fail-over must not forget what somebody was told, or is about to be."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

from sentinel_shared import keys

if TYPE_CHECKING:
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
        self._open: set[str] = set()
        self._next: dict[str, asyncio.Future[int]] = {}

    async def of(self, shard: int, writing: asyncio.Future[Reply]) -> tuple[Reply, int]:
        """The reply to a write to a shard that has just been sent, and how many replicas have it after 0.5 to 1 s.

        Raises as the lane does.
        """
        if not self.replicas:
            return await writing, 0
        reply, replicas = await asyncio.gather(writing, self._answer(shard))
        return reply, replicas

    def _answer(self, shard: int) -> asyncio.Future[int]:
        node = self._lane.node_of(keys.replication(shard))
        answer = self._next.get(node)
        if answer is None:
            loop = asyncio.get_running_loop()
            answer = self._next[node] = loop.create_future()
            if node not in self._open:
                self._open.add(node)
                loop.call_soon(self._ask, node, shard)
        return answer

    def _ask(self, node: str, shard: int) -> None:
        answer = self._next.pop(node)
        key = keys.replication(shard)

        def answered(waiting: asyncio.Future[Reply]) -> None:
            error = asyncio.CancelledError() if waiting.cancelled() else waiting.exception()
            if not answer.done():
                if error is None:
                    answer.set_result(cast("int", waiting.result()))
                else:
                    answer.set_exception(error)
            if node in self._next:
                self._ask(node, shard)
            else:
                self._open.discard(node)

        # WAIT speaks of what its own connection has written: a write right before it stands for all before that.
        marking = self._lane.submit(key, "SET", key, 1, "EX", keys.REPLICATION_TTL_S)
        marking.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._lane.wait(key, self.replicas, _WAIT_MS).add_done_callback(answered)

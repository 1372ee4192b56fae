"""A single master: at a fixed address, or wherever Sentinel says it is now."""

from __future__ import annotations

from collections.abc import Callable

from hiredis import ReplyError

from sentinel_shared.errors import RedisRefused, RedisUnavailable
from sentinel_shared.redis_lane.connection import Command, Connection
from sentinel_shared.redis_lane.dialer import Dialer
from sentinel_shared.redis_lane.node import Node
from sentinel_shared.redis_lane.replies import translate
from sentinel_shared.redis_lane.url import Address


class Single:
    """All keys go to one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def start(self) -> None:
        await self._node.start()

    async def close(self) -> None:
        await self._node.close()

    def node_for(self, key: bytes | str) -> Node:  # noqa: ARG002 -- where a cluster looks at it
        return self._node

    def nodes(self) -> list[Node]:
        return [self._node]

    def redirect(self, command: Command, error: ReplyError) -> None:
        command.fail(translate(error))


class MasterFinder:
    """Asks the Sentinels in turn, the one that answered last time first."""

    def __init__(
        self,
        dialer: Dialer,
        make: Callable[[], Connection],
    ) -> None:
        self._dialer = dialer
        self._make = make
        self._sentinels = list(dialer.url.addresses)
        self._service = dialer.url.service or ""

    async def find(self) -> Address:
        """Where the master is. Raises RedisUnavailable when no Sentinel can tell."""
        reason = f"no Sentinel knows a master named {self._service}"
        for sentinel in list(self._sentinels):
            try:
                master = await self._ask(sentinel)
            except (RedisUnavailable, RedisRefused) as error:
                reason = f"no Sentinel tells where {self._service} is: {error}"
                continue
            if master is not None:
                self._sentinels.remove(sentinel)
                self._sentinels.insert(0, sentinel)
                return master
        raise RedisUnavailable(reason)

    async def _ask(self, sentinel: Address) -> Address | None:
        question = (b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._service)
        try:
            answer = await self._dialer.ask(self._make(), sentinel, *question, sign_in=False)
        except RedisRefused as error:
            if not str(error).startswith("NOAUTH"):
                raise
            answer = await self._dialer.ask(self._make(), sentinel, *question, sign_in=True)
        match answer:
            case [bytes(host), bytes(port)]:
                return Address(host.decode(), int(port))
            case _:
                return None

"""The connections to the upstream: bounded in number, kept alive between requests, watched for silence."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from sentinel_proxy.upstream.connection import Connection
from sentinel_proxy.upstream.failures import UpstreamUnreachable

if TYPE_CHECKING:
    from sentinel_proxy.upstream.dialer import Dialer

_LOOK_AT_LEAST_EVERY_S: Final = 1.0


class Pool:
    """Every connection, being dialled, busy or free, holds one of `max_connections` places until it is lost."""

    def __init__(self, dialer: Dialer, *, max_connections: int, wait_s: float, idle_timeout_s: float) -> None:
        self._dialer = dialer
        self._wait_s = wait_s
        self._idle_timeout_s = idle_timeout_s
        self._look_every_s = min(_LOOK_AT_LEAST_EVERY_S, idle_timeout_s / 4)
        self._places = max_connections
        """Not taken."""
        self._held: set[Connection] = set()
        self._free: list[Connection] = []
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._looking: asyncio.TimerHandle | None = None
        self._closed = False

    async def take(self) -> Connection:
        """A connection for one request, of those that are free the one used last.

        Raises UpstreamUnreachable, also when no place becomes free in time, and UpstreamTimeout.
        """
        free = self._free
        while True:
            while free:
                connection = free.pop()
                if connection.still_usable():
                    return connection
            if self._places:
                self._places -= 1
                return await self._dialled()
            handed = await self._wait()
            if handed is None:
                return await self._dialled()
            if handed.still_usable():
                return handed

    def give_back(self, connection: Connection) -> None:
        """When its answer is over. One that was not read to its end ends with its connection."""
        if connection.reusable:
            connection.rest()
            self._hand_on(connection)
        else:
            connection.abort()

    def close(self) -> None:
        """Ends all connections, and makes no more."""
        self._closed = True
        for connection in list(self._held):
            connection.abort()

    async def _dialled(self) -> Connection:
        if self._closed:
            self._hand_on(None)
            raise UpstreamUnreachable("no connection to the upstream is made any more", reached=False)
        connection = Connection(asyncio.get_running_loop(), self._lost)
        self._held.add(connection)
        if self._looking is None:
            self._look()
        try:
            await self._dialer.dial(connection)
        except BaseException:
            connection.abort()
            self._lost(connection)
            raise
        return connection

    async def _wait(self) -> Connection | None:
        """A connection that somebody gave back; None: a place."""
        handed: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(handed)
        try:
            async with asyncio.timeout(self._wait_s):
                return await handed
        except BaseException as error:
            if handed.done() and not handed.cancelled():
                self._hand_on(handed.result())  # it came when nobody waited any more
            elif handed in self._waiting:
                self._waiting.remove(handed)
            if isinstance(error, TimeoutError):
                raise UpstreamUnreachable("no free connection to the upstream", reached=False) from None
            raise

    def _hand_on(self, connection: Connection | None) -> None:
        while self._waiting:
            handed = self._waiting.popleft()
            if not handed.done():
                handed.set_result(connection)
                return
        if connection is not None:
            self._free.append(connection)
        else:
            self._places += 1

    def _lost(self, connection: Connection) -> None:
        if connection in self._held:
            self._held.remove(connection)
            if connection in self._free:
                self._free.remove(connection)
            self._hand_on(None)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for connection in list(self._held):
            connection.check_silence(now_s, idle_timeout_s=self._idle_timeout_s)
        self._looking = loop.call_later(self._look_every_s, self._look) if self._held else None

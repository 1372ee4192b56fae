"""One Redis server that is kept connected: lost connections are replaced in the background."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from sentinel_shared.errors import SentinelError
from sentinel_shared.redis_lane.connection import Connection, LaneStats

_BACKOFF_FIRST_S: Final = 0.05
_BACKOFF_MOST_S: Final = 1.0
_STABLE_S: Final = 1.0
_LOG_INTERVAL_S: Final = 1.0

_log = logging.getLogger(__name__)


class StateLog:
    """Says when Redis was lost and when it is back, with one line a second at most; the newest state wins."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._quiet_until = 0.0
        self._held_back: tuple[int, str] | None = None

    def say(self, level: int, line: str) -> None:
        now = self._loop.time()
        if now >= self._quiet_until:
            self._quiet_until = now + _LOG_INTERVAL_S
            _log.log(level, line)
            return
        if self._held_back is None:
            self._loop.call_at(self._quiet_until, self._say_held_back)
        self._held_back = (level, line)

    def _say_held_back(self) -> None:
        if self._held_back is not None:
            level, line = self._held_back
            self._held_back = None
            self._quiet_until = self._loop.time() + _LOG_INTERVAL_S
            _log.log(level, line)


class Node:
    """`connection` is always there to send to; while it is lost, commands fail at once.

    The first attempt after a loss starts at once, and commands of that time wait for it within their deadline. Later
    attempts follow with exponential back-off and full jitter, and nobody waits for them.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[Callable[[str], None]], Connection],
        dial: Callable[[Connection], Awaitable[None]],
        *,
        on_lost: Callable[[], None],
        log: StateLog,
        stats: LaneStats,
        jitter: Callable[[], float],
    ) -> None:
        self.name = name
        self._make = make
        self._dial = dial
        self._tell_lost = on_lost
        self._log = log
        self._stats = stats
        self._jitter = jitter
        self._loop = asyncio.get_running_loop()
        self._opening: asyncio.Task[None] | None = None
        self._opened_at = 0.0
        self._closed = False
        self.connection = make(self._on_lost)

    async def start(self) -> None:
        """The first connection, in one attempt; raises RedisUnavailable or RedisRefused."""
        await self._dial(self.connection)
        self._opened_at = self._loop.time()

    def start_soon(self) -> None:
        """The first connection, in the background, as often as it takes."""
        self._opening = self._loop.create_task(self._open(first_delay_s=0.0))

    async def close(self) -> None:
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        await self.connection.close("the lane is closed")

    def _on_lost(self, reason: str) -> None:
        if self._closed:
            return
        self._log.say(logging.WARNING, f"Redis {self.name} lost: {reason}")
        # A server that drops us again and again is not asked in a tight loop.
        stable = self._loop.time() - self._opened_at >= _STABLE_S
        if stable:
            self.connection = self._make(self._on_lost)
        self._opening = self._loop.create_task(self._open(first_delay_s=0.0 if stable else self._backoff_s(attempt=2)))
        self._tell_lost()

    async def _open(self, first_delay_s: float) -> None:
        lost_at = self._loop.time()
        connection = self.connection
        if first_delay_s:
            await asyncio.sleep(first_delay_s)
            connection = self._make(self._on_lost)
        attempt = 0
        trouble: str | None = None
        while (still := await self._trouble_with_opening(connection)) is not None:
            if still != trouble:
                self._log.say(logging.WARNING, f"Redis {self.name} still away: {still}")
                trouble = still
            await asyncio.sleep(self._backoff_s(attempt))
            attempt += 1
            connection = self._make(self._on_lost)
        self.connection = connection
        self._opened_at = self._loop.time()
        self._stats.reconnects += 1
        self._log.say(logging.INFO, f"Redis {self.name} connected after {self._opened_at - lost_at:.2f} s")

    async def _trouble_with_opening(self, connection: Connection) -> str | None:
        try:
            await self._dial(connection)
        except SentinelError as error:
            return str(error)
        return None

    def _backoff_s(self, attempt: int) -> float:
        return self._jitter() * min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2.0 ** min(attempt, 10))

"""Rounds over the refresh lists: lease who is due, ask Zion, commit. No leader: leases keep replicas apart."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Final

from sentinel_shared.accounts import CommitOutcome
from sentinel_shared.breaker import BreakerState
from sentinel_shared.errors import (
    MalformedLimits,
    RedisUnavailable,
    SentinelError,
    UnknownUser,
    ZionRefusedKey,
    ZionUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from sentinel_limits_sync.metrics import SyncMetrics
    from sentinel_shared.accounts import Accounts
    from sentinel_shared.breaker import Breaker
    from sentinel_shared.clock import Clock
    from sentinel_shared.logging import StormGuard
    from sentinel_shared.refresh import LimitsRefresher

SHARDS: Final = 16
ROUND_S: Final = 0.2
PAUSE_FIRST_S: Final = 2.0
_RETRY_AFTER_MAX_S: Final = 60.0
_STRIKES_KEPT: Final = 10_000
_AT_ONCE_PER_SHARD: Final = 10
"""And round. Users who are due all at once (after an outage, above all) spread, and stay spread: 800 a second."""
_RESULTS: Final = {
    CommitOutcome.COMMITTED: "committed",
    CommitOutcome.OVERTAKEN: "overtaken",
    CommitOutcome.PERIOD_OVER: "period_over",
}

_log: Final = logging.getLogger(__name__)


class Rounds:
    """One per process. `run` goes round until cancelled; `drain` leases nothing more and waits for what is under way.

    A shard's users are always asked about through the same one of `refreshers`.
    """

    def __init__(
        self,
        accounts: Accounts,
        refreshers: Sequence[LimitsRefresher],
        breaker: Breaker,
        *,
        most_at_once: int,
        fresh_s: float,
        clock: Clock,
        metrics: SyncMetrics,
        storm: StormGuard,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._accounts = accounts
        self._refreshers = refreshers
        self._breaker = breaker
        self._most_at_once = most_at_once
        self._fresh_s = fresh_s
        self._lease_s = lease_s(fresh_s)
        self._clock = clock
        self._metrics = metrics
        self._storm = storm
        self._uniform = uniform
        self._draining = False
        self._first_shard = 0
        self._renewed_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[str, bool] = {}
        """Users that are being refreshed; True: due again meanwhile."""
        self._strikes: dict[str, int] = {}
        """How often in a row a user's limits could not be had, though Zion is being asked."""

    async def run(self) -> None:
        """A round every 200 ms, so that what a webhook marks as due is refreshed well within a second."""
        while True:
            await self._round()
            await self._clock.sleep(ROUND_S)

    async def drain(self) -> None:
        """Lease nothing more; returns when no refresh is under way. `run` has to go on, it renews their leases.

        Cancelled, it gives up what is under way: those leases lapse.
        """
        self._draining = True
        try:
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()

    async def _round(self) -> None:
        room = self._room()
        shards = [(self._first_shard + step) % SHARDS for step in range(min(room, SHARDS))]
        each = min(_AT_ONCE_PER_SHARD, room // len(shards)) if shards else 0
        self._first_shard = (self._first_shard + len(shards)) % SHARDS
        # Renewals go out behind the leases, in the same write: a webhook's mark is seen before it is pushed away.
        await asyncio.gather(*(self._lease(shard, each) for shard in shards), *self._renewals())
        self._metrics.running.set(len(self._tasks))

    def _room(self) -> int:
        """How many users to lease now. While Zion is not asked, what is due stays due, and accounts serve stale."""
        if self._draining or self._breaker.retry_after_s > 0 or self._breaker.state is BreakerState.HALF_OPEN:
            return 0
        room = max(0, self._most_at_once - len(self._tasks))
        # One call will be the probe; of the others a few may be refused by the breaker.
        return room if self._breaker.state is BreakerState.CLOSED else min(room, SHARDS)

    async def _lease(self, shard: int, at_most: int) -> None:
        try:
            users = await self._accounts.lease_due(
                shard, at_most=at_most, lease_s=self._lease_s, idle_s=2 * self._fresh_s
            )
        except SentinelError as error:
            self._storm.log_once_per_s(logging.WARNING, "redis", f"the refresh lists cannot be read: {error}")
            return
        for external_id in users:
            if external_id in self._running:
                # A running refresh may have been answered before whatever made its user due again.
                self._running[external_id] = True
                continue
            self._running[external_id] = False
            task = asyncio.create_task(self._refresh(external_id, self._refreshers[shard % len(self._refreshers)]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _renewals(self) -> list[Coroutine[None, None, None]]:
        now_s = self._clock.monotonic_s()
        if now_s - self._renewed_s < self._lease_s / 4:
            return []
        self._renewed_s = now_s
        return [self._mark(user, in_s=self._lease_s) for user in self._running]

    async def _refresh(self, external_id: str, refresher: LimitsRefresher) -> None:
        pause_s: float | None = None
        try:
            again = True
            while again:
                self._running[external_id] = False
                pause_s = await self._ask(external_id, refresher)
                again = self._running[external_id] and pause_s is None
        finally:
            del self._running[external_id]  # before the pause is written, which a renewal would undo
        if pause_s is not None:
            await self._mark(external_id, in_s=pause_s)

    async def _ask(self, external_id: str, refresher: LimitsRefresher) -> float | None:
        """One refresh. Returns after how long to try again when it failed, None when its user's due time is right."""
        began_s = self._clock.monotonic_s()
        result = "failed"
        try:
            result = _RESULTS[await refresher.refresh(external_id, background=True)]
        except UnknownUser:
            result = "unknown_user"
            await self._forget(external_id)
        except ZionRefusedKey as error:
            # No other user's limits will be had before an operator has acted.
            self._breaker.trip()
            self._storm.log_once_per_s(logging.ERROR, "key", f"limits go stale: {error}")
            return PAUSE_FIRST_S
        except MalformedLimits as error:
            result = "malformed"
            self._metrics.malformed.inc()
            self._storm.log_once_per_s(
                logging.ERROR,
                "malformed",
                f"Zion's limits make no sense, the last good ones stay: {error}",
                external_id=external_id,
            )
            return self._pause_s(external_id)
        except ZionUnavailable as error:
            self._storm.log_once_per_s(logging.WARNING, "zion", f"limits go stale: {error}")
            asked_for_s = min(error.retry_after_s or 0.0, _RETRY_AFTER_MAX_S)
            return max(self._pause_s(external_id), asked_for_s)
        except RedisUnavailable as error:
            self._storm.log_once_per_s(logging.WARNING, "redis", f"limits could not be written: {error}")
            return PAUSE_FIRST_S
        except SentinelError as error:
            self._storm.log_once_per_s(logging.ERROR, "refresh", f"limits could not be refreshed: {error}")
            return self._pause_s(external_id)
        finally:
            self._metrics.refreshes.labels(result).inc()
            self._metrics.refresh_seconds.observe(self._clock.monotonic_s() - began_s)
        self._strikes.pop(external_id, None)
        return None

    def _pause_s(self, external_id: str) -> float:
        # With the breaker open nobody is asked about: that is no user's fault, and all are to be fresh soon afterwards.
        if self._breaker.state is not BreakerState.CLOSED:
            return PAUSE_FIRST_S
        if len(self._strikes) >= _STRIKES_KEPT:
            self._strikes.clear()
        strikes = self._strikes[external_id] = self._strikes.get(external_id, 0) + 1
        return pause_s(strikes, fresh_s=self._fresh_s, uniform=self._uniform())

    async def _mark(self, external_id: str, *, in_s: float) -> None:
        try:
            await self._accounts.mark_due(external_id, now_s=self._clock.unix_s() + in_s)
        except SentinelError:
            return  # its lease lapses

    async def _forget(self, external_id: str) -> None:
        try:
            await self._accounts.unmark_due(external_id)
        except SentinelError:
            return  # asked about again when its lease lapses


def lease_s(fresh_s: float) -> float:
    """How long a user who is being refreshed is kept from other replicas; renewed while that lasts.

    A replica that dies gives its users back after this: soon enough for limits that are refreshed a fifth of their
    life ahead, late enough that one that stands still for a moment loses nobody.
    """
    return min(5.0, max(1.0, fresh_s / 10))


def pause_s(strikes: int, *, fresh_s: float, uniform: float) -> float:
    """How long to leave a user alone whose limits could not be had `strikes` times in a row: 2 s, then ever longer.

    Never longer than limits are fresh (`fresh_s`): a user in trouble costs Zion what any other does. Jittered to
    75-100 %, by `uniform` in [0, 1).
    """
    longest_s = max(PAUSE_FIRST_S, fresh_s)
    return min(PAUSE_FIRST_S * 2.0 ** min(strikes - 1, 20), longest_s) * (0.75 + 0.25 * uniform)

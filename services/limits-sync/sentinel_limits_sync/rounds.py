"""Rounds over the refresh lists: lease who is due, ask Zion, commit. No leader: leases keep replicas apart."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from sentinel_shared.accounts import CommitOutcome
from sentinel_shared.errors import MalformedLimits, SentinelError, UnknownUser, ZionUnavailable

if TYPE_CHECKING:
    from sentinel_limits_sync.metrics import SyncMetrics
    from sentinel_shared.accounts import Accounts
    from sentinel_shared.breaker import Breaker
    from sentinel_shared.clock import Clock
    from sentinel_shared.logging import StormGuard
    from sentinel_shared.refresh import LimitsRefresher

SHARDS: Final = 16
ROUND_S: Final = 0.2
LEASE_S: Final = 2.0
"""Of a user that is being refreshed; renewed while that lasts. A replica that dies gives its users back after this."""
_RENEW_S: Final = LEASE_S / 3
_FAILED_PAUSE_S: Final = 2.0
_AT_ONCE_PER_SHARD: Final = 64
_RESULTS: Final = {
    CommitOutcome.COMMITTED: "committed",
    CommitOutcome.OVERTAKEN: "overtaken",
    CommitOutcome.PERIOD_OVER: "period_over",
}

_log: Final = logging.getLogger(__name__)


class Rounds:
    """One per process. `run` goes round until cancelled; `drain` waits for what is under way."""

    def __init__(
        self,
        accounts: Accounts,
        refresher: LimitsRefresher,
        breaker: Breaker,
        *,
        most_at_once: int,
        idle_s: float,
        clock: Clock,
        metrics: SyncMetrics,
        storm: StormGuard,
    ) -> None:
        self._accounts = accounts
        self._refresher = refresher
        self._breaker = breaker
        self._most_at_once = most_at_once
        self._idle_s = idle_s
        self._clock = clock
        self._metrics = metrics
        self._storm = storm
        self._running: dict[str, asyncio.Task[None]] = {}
        self._renewed_s = 0.0

    async def run(self) -> None:
        """A round every 200 ms, so that what a webhook marks as due is refreshed well within a second."""
        while True:
            try:
                await self._round()
            except SentinelError as error:
                self._storm.log_once_per_s(logging.WARNING, "redis", f"the refresh lists cannot be read: {error}")
            await self._clock.sleep(ROUND_S)

    async def drain(self) -> None:
        """Until no refresh is under way."""
        if self._running:
            await asyncio.wait(self._running.values())

    async def _round(self) -> None:
        await self._renew()
        room = self._most_at_once - len(self._running)
        # While Zion is not asked, what is due stays due; the accounts serve stale meanwhile.
        if room <= 0 or self._breaker.retry_after_s > 0:
            return
        each = max(1, min(_AT_ONCE_PER_SHARD, room // SHARDS))
        leased = await asyncio.gather(
            *(
                self._accounts.lease_due(shard, at_most=each, lease_s=LEASE_S, idle_s=self._idle_s)
                for shard in range(SHARDS)
            )
        )
        for external_id in (user for users in leased for user in users):
            if external_id not in self._running:
                task = asyncio.create_task(self._refresh(external_id))
                self._running[external_id] = task
        self._metrics.running.set(len(self._running))

    async def _renew(self) -> None:
        now_s = self._clock.monotonic_s()
        if self._running and now_s - self._renewed_s >= _RENEW_S:
            self._renewed_s = now_s
            until_s = self._clock.unix_s() + LEASE_S
            await asyncio.gather(*(self._accounts.mark_due(user, now_s=until_s) for user in list(self._running)))

    async def _refresh(self, external_id: str) -> None:
        began_s = self._clock.monotonic_s()
        result = "failed"
        try:
            outcome = await self._refresher.refresh(external_id, background=True)
            result = _RESULTS[outcome]
        except UnknownUser:
            result = "unknown_user"
            await self._quietly_forget(external_id)
        except MalformedLimits as error:
            result = "malformed"
            self._metrics.malformed.inc()
            self._storm.log_once_per_s(
                logging.ERROR,
                "malformed",
                f"Zion's limits make no sense, the last good ones stay: {error}",
                external_id=external_id,
            )
            await self._later(external_id)
        except ZionUnavailable as error:
            self._storm.log_once_per_s(logging.WARNING, "zion", f"limits go stale: {error}")
            await self._later(external_id)
        except SentinelError as error:
            self._storm.log_once_per_s(logging.ERROR, "refresh", f"limits could not be refreshed: {error}")
            await self._later(external_id)
        finally:
            del self._running[external_id]
            self._metrics.refreshes.labels(result).inc()
            self._metrics.refresh_seconds.observe(self._clock.monotonic_s() - began_s)

    async def _later(self, external_id: str) -> None:
        """After a pause; the breaker sees to it that a Zion in trouble is not flooded."""
        try:
            await self._accounts.mark_due(external_id, now_s=self._clock.unix_s() + _FAILED_PAUSE_S)
        except SentinelError:
            return  # its lease lapses

    async def _quietly_forget(self, external_id: str) -> None:
        try:
            await self._accounts.unmark_due(external_id)
        except SentinelError:
            return  # asked again when its lease lapses

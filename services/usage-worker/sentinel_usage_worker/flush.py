"""From the queue to Zion: each unit ends in Zion's books, in the queue again, or as a dead letter."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from sentinel_shared.contracts import IncrementResult
from sentinel_shared.errors import (
    SentinelError,
    UnknownUser,
    ZionRefusedKey,
    ZionRejected,
    ZionRouteMissing,
    ZionUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel_shared.accounts import Accounts, AccountView
    from sentinel_shared.breaker import Breaker
    from sentinel_shared.clock import Clock
    from sentinel_shared.contracts import Increment
    from sentinel_shared.logging import StormGuard
    from sentinel_shared.usage_queue import Batch, UsageQueue
    from sentinel_shared.zion_client import ZionClient
    from sentinel_usage_worker.metrics import WorkerMetrics

SHARDS: Final = 16
USERS_PER_BATCH: Final = 100
LEASE_S: Final = 20.0
_SHARDS_AT_ONCE: Final = 4
_SINGLES_AT_ONCE: Final = 8
_BACKOFF_FIRST_S: Final = 0.5
_BACKOFF_MOST_S: Final = 4.0
_BATCH_ROUTE_PROBE_S: Final = 600.0
_REAP_AT_ONCE: Final = 100

_log: Final = logging.getLogger(__name__)


class Flusher:
    """One per process. Losing it between any two steps loses nothing: see `sentinel_shared.usage_queue`."""

    def __init__(  # its collaborators
        self,
        queue: UsageQueue,
        zion: ZionClient,
        breaker: Breaker,
        accounts: Accounts,
        *,
        gather_s: float,
        items: int,
        idempotent: bool,
        clock: Clock,
        metrics: WorkerMetrics,
        storm: StormGuard,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._queue = queue
        self._zion = zion
        self._breaker = breaker
        self._accounts = accounts
        self._gather_s = gather_s
        self._items = items
        self._idempotent = idempotent
        self._clock = clock
        self._metrics = metrics
        self._storm = storm
        self._uniform = uniform
        self._no_batch_until_s = 0.0
        self._busy: set[int] = set()
        self.stopping = False

    async def flush(self) -> None:
        """Send what is due in every shard; one that another call of this process works on is left to it."""
        slots = asyncio.Semaphore(_SHARDS_AT_ONCE)

        async def one(shard: int) -> None:
            async with slots:
                await self._flush_shard(shard)

        await asyncio.gather(*(one(shard) for shard in range(SHARDS) if shard not in self._busy))

    async def reap(self) -> None:
        """Charge requests whose proxy died."""
        for shard in range(SHARDS):
            while (count := await self._queue.reap(shard, at_most=_REAP_AT_ONCE)) > 0:
                self._metrics.reaped.inc(count)
                _log.info("reaped %d reservations of proxies that died", count)
                if count < _REAP_AT_ONCE:
                    break

    async def _flush_shard(self, shard: int) -> None:
        self._busy.add(shard)
        try:
            while not self.stopping and (batch := await self._next(shard)) is not None:
                if not await self._deliver(batch):
                    return
        except SentinelError as error:
            self._storm.log_once_per_s(logging.WARNING, "flush", f"usage could not be flushed: {error}")
        finally:
            self._busy.discard(shard)

    async def _next(self, shard: int) -> Batch | None:
        """A batch left over comes first. While Zion is not asked nothing is claimed: usage coalesces where it is."""
        if self._breaker.retry_after_s > 0:
            return None
        left_over = await self._queue.lease(shard, lease_s=LEASE_S)
        if left_over is not None:
            return left_over
        return await self._queue.claim(
            shard,
            batch_id=uuid4().hex,
            users=USERS_PER_BATCH,
            items=self._items,
            lease_s=LEASE_S,
            gather_s=self._gather_s,
            enough_users=USERS_PER_BATCH,
        )

    async def _deliver(self, batch: Batch) -> bool:
        """Send a batch and book what became of it; False when Zion is not to be asked again just now."""
        increments = batch.increments()
        began_s = time.perf_counter()
        try:
            results = await self._results(batch, increments)
        except ZionRefusedKey as error:
            self._metrics.key_refused.inc()
            self._storm.log_once_per_s(logging.ERROR, "key", f"{error}: usage waits until an operator acts")
            await self._postpone(batch, _BACKOFF_MOST_S)
            return False
        except ZionUnavailable as error:
            if not error.outcome_unknown and not batch.singles:
                await self._queue.note_not_applied(batch)
            self._metrics.flushes.labels("unknown").inc()
            self._storm.log_once_per_s(logging.WARNING, "zion", f"usage waits: {error}")
            await self._postpone(batch, max(self._backoff_s(batch.attempts), error.retry_after_s or 0.0))
            return False
        finally:
            self._metrics.flush_seconds.observe(time.perf_counter() - began_s)
        if results is None:
            return True
        await self._queue.ack(batch, results)
        self._metrics.flushes.labels("acked").inc()
        self._metrics.batch_items.observe(len(results))
        for result in results:
            word = "applied" if result.applied else "refused" if result.permanent else "later"
            self._metrics.increments.labels(word).inc()
        # Items that may work later are not asked for again in the same breath.
        return not any(not result.applied and not result.permanent for result in results)

    async def _results(self, batch: Batch, increments: list[Increment]) -> list[IncrementResult] | None:
        """Zion's word on each item; None when the batch was split instead."""
        if batch.maybe_applied and not self._idempotent and not batch.singles:
            known = await self._already_applied(increments)
            if known is not None:
                return known
        no_batch_route = self._clock.monotonic_s() < self._no_batch_until_s
        if batch.singles or (no_batch_route and self._free_to_choose(batch)):
            return await self._one_by_one(batch, increments)
        try:
            return await self._zion.increment_batch(batch.body, batch.batch_id, len(increments))
        except ZionRouteMissing:
            self._no_batch_until_s = self._clock.monotonic_s() + _BATCH_ROUTE_PROBE_S
            self._expect_free_to_choose(batch)
            return await self._one_by_one(batch, increments)
        except ZionRejected as error:
            self._metrics.flushes.labels("rejected").inc()
            _log.warning("Zion rejected a batch as a whole: %s", error)
            self._expect_free_to_choose(batch)
            if await self._queue.split(batch, first_id=uuid4().hex, second_id=uuid4().hex):
                return None
            return await self._one_by_one(batch, increments)

    def _free_to_choose(self, batch: Batch) -> bool:
        """Whether the batch may go under other keys: an earlier attempt that was perhaps applied would be doubled.

        After ten minutes in which Zion never recognised its key the risk is taken, so that usage is not stuck.
        """
        age_s = self._clock.unix_s() - batch.claimed_ms / 1000
        return not batch.maybe_applied or age_s > _BATCH_ROUTE_PROBE_S

    def _expect_free_to_choose(self, batch: Batch) -> None:
        if not self._free_to_choose(batch):
            raise ZionUnavailable("Zion refused a batch that it may have applied before; its key is tried again")

    async def _one_by_one(self, batch: Batch, increments: list[Increment]) -> list[IncrementResult]:
        """Each under its own key; what is known is remembered, so that another worker can go on from there."""
        slots = asyncio.Semaphore(_SINGLES_AT_ONCE)

        async def one(index: int, increment: Increment) -> IncrementResult:
            if index in batch.done:
                return batch.done[index]
            async with slots:
                result = await self._single(batch, index, increment)
            await self._queue.note_done(batch, index, result)
            return result

        await self._queue.note_singles(batch)
        keeping = asyncio.create_task(self._keep_lease(batch))
        try:
            outcomes = await asyncio.gather(
                *(one(index, increment) for index, increment in enumerate(increments)), return_exceptions=True
            )
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, IncrementResult)]

    async def _single(self, batch: Batch, index: int, increment: Increment) -> IncrementResult:
        try:
            return await self._zion.increment(increment, f"{batch.batch_id}:{index}")
        except (ZionRejected, UnknownUser) as error:
            self._expect_free_to_choose(batch)
            return IncrementResult(applied=False, permanent=True, new_value=None, error=str(error))
        except ZionRouteMissing as error:
            raise ZionUnavailable("Zion has no increment endpoint at all", outcome_unknown=False) from error

    async def _already_applied(self, increments: list[Increment]) -> list[IncrementResult] | None:
        """For a Zion that does not honour keys: whether its `used` says that the batch of unknown fate was applied.

        All or nothing: only when every item is seen to be in, nothing is sent again. Other writers can mislead it.
        """
        results = []
        for increment in increments:
            limits = {snapshot.name: snapshot for snapshot in await self._zion.limits(increment.external_id)}
            base = _base_of(await self._accounts.read(increment.external_id), increment)
            snapshot = limits.get(increment.limit_name)
            if snapshot is None or base is None or snapshot.used < base + increment.amount:
                return None
            results.append(IncrementResult(applied=True, permanent=False, new_value=snapshot.used, error=None))
        return results

    async def _keep_lease(self, batch: Batch) -> None:
        while True:
            await self._clock.sleep(LEASE_S / 3)
            await self._postpone(batch, LEASE_S)

    async def _postpone(self, batch: Batch, delay_s: float) -> None:
        await self._queue.postpone(batch, until_ms=int((self._clock.unix_s() + delay_s) * 1000))

    def _backoff_s(self, attempts: int) -> float:
        return self._uniform(0.1, min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2 ** min(attempts, 6)))

    async def idle(self) -> None:
        """Until no batch of this process is under way."""
        while self._busy:
            await self._clock.sleep(0.05)


def _base_of(view: AccountView | None, increment: Increment) -> int | None:
    if view is None:
        return None
    for state, (base, _, _, _) in zip(view.limits, view.ledger, strict=True):
        if state.name == increment.limit_name:
            return base
    return None

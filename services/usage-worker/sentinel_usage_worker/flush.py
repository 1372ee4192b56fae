"""From the queue to Zion: each unit ends in Zion's books, in the queue again, or as a dead letter."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from sentinel_shared.breaker import BreakerState
from sentinel_shared.errors import RedisUnavailable, SentinelError, ZionRefusedKey, ZionUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sentinel_shared.breaker import Breaker
    from sentinel_shared.clock import Clock
    from sentinel_shared.contracts import IncrementResult
    from sentinel_shared.logging import StormGuard
    from sentinel_shared.usage_queue import Batch, UsageQueue
    from sentinel_usage_worker.delivery import Delivery
    from sentinel_usage_worker.metrics import WorkerMetrics

SHARDS: Final = 16
USERS_PER_BATCH: Final = 100
LEASE_S: Final = 20.0
"""Of a batch that is being sent, renewed while that lasts; well above what one POST may take."""
_SHARDS_AT_ONCE: Final = 4
_BACKOFF_FIRST_S: Final = 0.5
# With the breaker's 5 s and a tick's 1 s below what draining may take after Zion's return.
_BACKOFF_MOST_S: Final = 4.0
_BOOKING_WITHIN_S: Final = LEASE_S / 2
_REAP_AT_ONCE: Final = 100
_PROBE: Final = -1

_log: Final = logging.getLogger(__name__)


class Flusher:
    """One per process. Losing it between any two steps loses nothing: see `sentinel_shared.usage_queue`."""

    def __init__(
        self,
        queue: UsageQueue,
        delivery: Delivery,
        breaker: Breaker,
        *,
        gather_s: float,
        items: int,
        clock: Clock,
        metrics: WorkerMetrics,
        storm: StormGuard,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._queue = queue
        self._delivery = delivery
        self._breaker = breaker
        self._gather_s = gather_s
        self._items = items
        self._clock = clock
        self._metrics = metrics
        self._storm = storm
        self._uniform = uniform
        self._stopping = False
        self._slots = asyncio.Semaphore(_SHARDS_AT_ONCE)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._ask_again_at_s = 0.0
        self._backing_off: dict[str, tuple[Batch, float]] = {}
        """Batches that this process put off, until when (Unix s)."""

    def flush(self) -> None:
        """Start on all that is due, and return; shards on which this process works already are left to that.

        While Zion's breaker is not closed one batch probes, and nothing else is sent or claimed.
        """
        if self._stopping or self._clock.monotonic_s() < self._ask_again_at_s:
            return
        if self._breaker.state is BreakerState.CLOSED:
            for shard in range(SHARDS):
                self._start(shard, self._flush_shard)
        elif not self._running and self._breaker.retry_after_s <= 0:
            self._start(_PROBE, self._probe)

    async def stop(self, *, within_s: float) -> None:
        """Claim nothing more; what is under way is finished and booked, or given up after `within_s`: leases lapse."""
        self._stopping = self._delivery.stopping = True
        if self._running:
            _, late = await asyncio.wait(self._running.values(), timeout=within_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def reap(self) -> None:
        """Charge requests whose proxy died. Raises RedisUnavailable."""
        for shard in range(SHARDS):
            count = _REAP_AT_ONCE
            while count == _REAP_AT_ONCE and not self._stopping:
                count = await self._queue.reap(shard, at_most=_REAP_AT_ONCE)
                if count:
                    self._metrics.reaped.inc(count)
                    _log.info("reaped %d reservations of proxies that died", count)

    # --- which batch, and when ---

    def _start(self, number: int, work: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        if number not in self._running:
            task = self._running[number] = asyncio.create_task(work(number))
            task.add_done_callback(partial(self._ended, number))

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self._running[number]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, SentinelError):
            self._storm.log_once_per_s(logging.WARNING, "flush", f"usage could not be flushed: {error}")
        elif error is not None:
            self._storm.log_once_per_s(logging.ERROR, "broken", "flushing broke in an unforeseen way", exc_info=error)

    async def _flush_shard(self, shard: int) -> None:
        async with self._slots:
            while not self._stopping and self._breaker.state is BreakerState.CLOSED:
                batch = await self._next(shard)
                if batch is None or not await self._deliver(batch):
                    return

    async def _probe(self, _number: int) -> None:
        """One batch, of whichever shard has one; when Zion took it, all that backs off is due at once."""
        first = int(self._uniform(0, SHARDS))
        for shard in (*range(first, SHARDS), *range(first)):
            batch = await self._next(shard)
            if batch is not None:
                await self._deliver(batch)
                break
        if self._breaker.state is BreakerState.CLOSED:
            now_s = self._clock.unix_s()
            waiting = [batch for batch, until_s in self._backing_off.values() if until_s > now_s]
            self._backing_off.clear()
            await asyncio.gather(*(self._queue.postpone(batch, until_ms=int(now_s * 1000)) for batch in waiting))
            self.flush()

    async def _next(self, shard: int) -> Batch | None:
        """A batch left over comes first. While Zion fails usage coalesces where it is, and frozen batches probe."""
        batch = await self._queue.lease(shard, lease_s=LEASE_S)
        if batch is not None:
            self._backing_off.pop(batch.batch_id, None)
            return batch
        if self._breaker.state is not BreakerState.CLOSED and (await self._queue.backlog(shard)).batches:
            return None
        batch = await self._queue.claim(
            shard,
            batch_id=uuid4().hex,
            users=USERS_PER_BATCH,
            items=self._items,
            lease_s=LEASE_S,
            gather_s=self._gather_s,
            enough_users=USERS_PER_BATCH,
        )
        if batch is not None:
            await self._delivery.prepare(batch)
        return batch

    # --- one batch ---

    async def _deliver(self, batch: Batch) -> bool:
        """Send a batch and book what became of it; False when Zion is not to be asked again just now."""
        try:
            with self._metrics.flush_seconds.time():
                async with self._lease_kept(batch):
                    results = await self._delivery.results(batch)
        except ZionRefusedKey as error:
            self._metrics.key_refused.inc()
            self._metrics.flushes.labels("key_refused").inc()
            self._storm.log_once_per_s(logging.ERROR, "key", f"{error}: usage waits until an operator acts")
            await self._back_off(batch, _BACKOFF_MOST_S)
            return False
        except ZionUnavailable as error:
            self._metrics.flushes.labels("unknown" if error.outcome_unknown else "not_sent").inc()
            self._storm.log_once_per_s(logging.WARNING, "zion", f"usage waits: {error}")
            delay_s = self._uniform(0.1, min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2 ** min(batch.attempts, 6)))
            if error.outcome_unknown and error.retry_after_s:
                # Zion's own wish (429) concerns all that it is sent; an open breaker's is kept anyhow.
                self._ask_again_at_s = self._clock.monotonic_s() + error.retry_after_s
                delay_s = max(delay_s, error.retry_after_s)
            await self._back_off(batch, delay_s)
            return False
        if results is None or not await self._booked(batch, results):
            return True
        self._metrics.flushes.labels("acked").inc()
        self._metrics.batch_items.observe(len(results))
        self._metrics.lag_seconds.observe(max(0.0, self._clock.unix_s() - batch.claimed_ms / 1000))
        for result in results:
            word = "applied" if result.applied else "refused" if result.permanent else "later"
            self._metrics.increments.labels(word).inc()
        # Items that may work later are not asked for again in the same breath.
        return all(result.applied or result.permanent for result in results)

    async def _booked(self, batch: Batch, results: list[IncrementResult]) -> bool:
        """Whether this process booked Zion's word; a Redis that is away for a moment is waited for."""
        until_s = self._clock.monotonic_s() + _BOOKING_WITHIN_S
        while True:
            try:
                booked = await self._queue.ack(batch, results)
            except RedisUnavailable:
                if self._clock.monotonic_s() >= until_s:
                    raise
                await self._clock.sleep(0.2)
            else:
                self._delivery.forget(batch)
                return booked

    # --- leases ---

    @asynccontextmanager
    async def _lease_kept(self, batch: Batch) -> AsyncIterator[None]:
        keeping = asyncio.create_task(self._keep_lease(batch))
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def _keep_lease(self, batch: Batch) -> None:
        while True:
            await self._clock.sleep(LEASE_S / 3)
            try:
                await self._postpone(batch, LEASE_S)
            except SentinelError as error:
                self._storm.log_once_per_s(logging.WARNING, "lease", f"a batch's lease could not be renewed: {error}")

    async def _back_off(self, batch: Batch, delay_s: float) -> None:
        now_s = self._clock.unix_s()
        self._backing_off = {name: one for name, one in self._backing_off.items() if one[1] > now_s}
        self._backing_off[batch.batch_id] = (batch, now_s + delay_s)
        await self._postpone(batch, 0 if self._stopping else delay_s)

    async def _postpone(self, batch: Batch, delay_s: float) -> None:
        await self._queue.postpone(batch, until_ms=int((self._clock.unix_s() + delay_s) * 1000))

"""One frozen batch, sent to Zion by the one way that counts nothing twice, until Zion's word on each item is known."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from sentinel_shared.contracts import IncrementResult
from sentinel_shared.errors import (
    MalformedLimits,
    SentinelError,
    UnknownUser,
    ZionRefusedKey,
    ZionRejected,
    ZionRouteMissing,
    ZionUnavailable,
)

if TYPE_CHECKING:
    from sentinel_shared.accounts import Accounts
    from sentinel_shared.clock import Clock
    from sentinel_shared.contracts import Increment, LimitName
    from sentinel_shared.logging import StormGuard
    from sentinel_shared.usage_queue import Batch, UsageQueue
    from sentinel_shared.zion_client import ZionClient
    from sentinel_usage_worker.metrics import WorkerMetrics

POST_TIMEOUT_S: Final = 8.0
_SINGLES_AT_ONCE: Final = 8
_BATCH_ROUTE_PROBE_S: Final = 600.0
_BASES_KEPT: Final = 1_000

_LATER: Final = IncrementResult(applied=False, permanent=False, new_value=None, error=None)

_log: Final = logging.getLogger(__name__)


class Delivery:
    """One per process. Set `stopping`, and of a batch that goes item by item no further item is begun."""

    def __init__(
        self,
        queue: UsageQueue,
        zion: ZionClient,
        accounts: Accounts,
        *,
        idempotent: bool,
        clock: Clock,
        metrics: WorkerMetrics,
        storm: StormGuard,
    ) -> None:
        self.stopping = False
        self._queue = queue
        self._zion = zion
        self._accounts = accounts
        self._idempotent = idempotent
        self._clock = clock
        self._metrics = metrics
        self._storm = storm
        self._no_batch_until_s = 0.0
        self._bases: dict[str, dict[tuple[str, LimitName], int]] = {}
        """Without idempotency: what Zion had booked of each item's limit before its batch was first sent."""

    async def prepare(self, batch: Batch) -> None:
        """To be called between a batch's claim and its first `results`; `forget` when it is booked."""
        if not self._idempotent:
            self._bases[batch.batch_id] = await self._read_bases(batch.increments())
            if len(self._bases) > _BASES_KEPT:
                del self._bases[next(iter(self._bases))]

    def forget(self, batch: Batch) -> None:
        self._bases.pop(batch.batch_id, None)

    async def results(self, batch: Batch) -> list[IncrementResult] | None:
        """Zion's word on each item; None when the batch was split, or another worker has booked it.

        Raises ZionUnavailable (to be sent again, the same bytes under the same key), ZionRefusedKey, RedisUnavailable.
        """
        increments = batch.increments()
        if batch.maybe_applied and not self._idempotent:
            return await self._compared(batch, increments)
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
        except (ZionRefusedKey, ZionUnavailable) as error:
            if isinstance(error, ZionRefusedKey) or not error.outcome_unknown:
                await self._queue.note_not_applied(batch)
            raise

    async def _one_by_one(self, batch: Batch, increments: list[Increment]) -> list[IncrementResult] | None:
        """Each under its own key; what is known is remembered, so that another worker can go on from there."""
        if not await self._queue.note_singles(batch):
            return None
        slots = asyncio.Semaphore(_SINGLES_AT_ONCE)
        done = dict(batch.done)
        failures: list[SentinelError] = []

        async def one(index: int) -> None:
            async with slots:
                if failures or self.stopping:
                    return
                try:
                    done[index] = await self._single(batch, index, increments[index])
                    await self._queue.note_done(batch, index, done[index])
                except SentinelError as error:
                    failures.append(error)

        await asyncio.gather(*(one(index) for index in range(len(increments)) if index not in done))
        if failures:
            raise failures[0]
        if len(done) < len(increments):
            raise ZionUnavailable("this worker stops; another one goes on with the batch", outcome_unknown=False)
        return [done[index] for index in range(len(increments))]

    async def _single(self, batch: Batch, index: int, increment: Increment) -> IncrementResult:
        try:
            return await self._zion.increment(increment, f"{batch.batch_id}:{index}")
        except (ZionRejected, UnknownUser) as error:
            self._expect_free_to_choose(batch)
            return IncrementResult(applied=False, permanent=True, new_value=None, error=str(error))
        except ZionRouteMissing as error:
            raise ZionUnavailable("Zion has no increment endpoint at all", outcome_unknown=False) from error

    def _free_to_choose(self, batch: Batch) -> bool:
        """Whether the batch may go under other keys: an earlier attempt that was perhaps applied would be doubled.

        After ten minutes in which Zion never recognised its key the risk is taken, so that usage is not stuck.
        """
        age_s = self._clock.unix_s() - batch.claimed_ms / 1000
        if batch.maybe_applied and age_s > _BATCH_ROUTE_PROBE_S:
            self._storm.log_once_per_s(logging.ERROR, "risk", f"batch {batch.batch_id} may be counted twice by Zion")
            return True
        return not batch.maybe_applied

    def _expect_free_to_choose(self, batch: Batch) -> None:
        if not self._free_to_choose(batch):
            raise ZionUnavailable("Zion refused a batch that it may have applied before; its key is tried again")

    # --- a Zion that does not honour keys ---

    async def _compared(self, batch: Batch, increments: list[Increment]) -> list[IncrementResult]:
        """For a batch of unknown fate: an item that shows in Zion's `used` was applied, another is owed again.

        Where what Zion had before is not known (another worker's batch, and limits read since), it is owed again.
        """
        bases = self._bases.get(batch.batch_id)
        if bases is None:
            bases = await self._read_bases(increments, before_ms=batch.claimed_ms)
        users = list(dict.fromkeys(increment.external_id for increment in increments))
        told = await asyncio.gather(*(self._used(user) for user in users))
        used = {(user, name): value for user, limits in zip(users, told, strict=True) for name, value in limits.items()}

        def compare(index: int, increment: Increment) -> IncrementResult:
            where = (increment.external_id, increment.limit_name)
            if index in batch.done:
                return batch.done[index]
            if where in bases and used.get(where, -1) >= bases[where] + increment.amount:
                return IncrementResult(applied=True, permanent=False, new_value=used[where], error=None)
            return _LATER

        return [compare(index, increment) for index, increment in enumerate(increments)]

    async def _used(self, external_id: str) -> dict[LimitName, int]:
        try:
            return {snapshot.name: snapshot.used for snapshot in await self._zion.limits(external_id)}
        except (UnknownUser, MalformedLimits, ZionRejected):
            return {}

    async def _read_bases(
        self, increments: list[Increment], *, before_ms: float = float("inf")
    ) -> dict[tuple[str, LimitName], int]:
        """Zion's `used` by item, of accounts whose limits were last read before `before_ms`."""
        users = list(dict.fromkeys(increment.external_id for increment in increments))
        bases = {}
        for user, view in zip(users, await asyncio.gather(*map(self._accounts.read, users)), strict=True):
            if view is not None and view.committed_ms < before_ms:
                for state, (base, _, _, _) in zip(view.limits, view.ledger, strict=True):
                    bases[user, state.name] = base
        return bases

"""What did it cost? Settles every admitted request exactly once, whatever becomes of its client or of Redis."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, cast

import msgspec
from msgspec.structs import replace

from sentinel_shared.accounts import Settlement, SettleOutcome
from sentinel_shared.errors import RedisFull, RedisOutcomeUnknown, RedisRefused, RedisUnavailable
from sentinel_shared.logging import StormGuard

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from sentinel_proxy.metrics import ProxyMetrics
    from sentinel_proxy.spool import Spool
    from sentinel_shared.accounts import Accounts
    from sentinel_shared.clock import Clock
    from sentinel_shared.redis_lane import Reply

_REPLAY_EVERY_S: Final = 0.5
_OUTCOMES: Final = {
    SettleOutcome.SETTLED: "settled",
    SettleOutcome.CORRECTED: "corrected_after_reap",
    SettleOutcome.RESERVATION_LOST: "reservation_lost",
    SettleOutcome.KNOWN_BEFORE: "known_before",
}

_log: Final = logging.getLogger(__name__)


@dataclass(slots=True)
class Running:
    """A request that holds a reservation. `output_tokens_seen` is what a reap would charge if this process died now."""

    rid: str
    external_id: str
    request_id: str
    model: str
    endpoint: str
    renew_at_s: float
    output_tokens_seen: int = 0
    counting: bool = False


class _Event(msgspec.Struct, omit_defaults=True):
    """One line of the audit stream."""

    rid: str
    external_id: str
    request_id: str
    model: str
    endpoint: str
    outcome: str
    input_tokens: int = 0
    output_tokens: int = 0
    counted_here: bool = False


_encode: Final = msgspec.json.Encoder().encode


@dataclass(slots=True)
class _Memory:
    """Settlements that neither Redis nor the disk would take."""

    settlements: list[tuple[Settlement, float | None]] = field(default_factory=list)


class Meter:
    """One per process. `run` keeps leases alive and replays the spool; `close` waits for what is being settled."""

    def __init__(
        self, accounts: Accounts, spool: Spool, *, lease_s: float, clock: Clock, metrics: ProxyMetrics
    ) -> None:
        self._accounts = accounts
        self._spool = spool
        self._renew_s = lease_s / 3
        self._clock = clock
        self._metrics = metrics
        self._storm = StormGuard(_log, clock.monotonic_s)
        self._running: dict[str, Running] = {}
        self._settling: set[asyncio.Future[Reply]] = set()
        self._counting: set[asyncio.Task[None]] = set()
        self._memory = _Memory()
        self._settled = metrics.event("settled")

    @property
    def running(self) -> int:
        """Requests that hold a reservation."""
        return len(self._running)

    def begin(self, *, rid: str, external_id: str, request_id: str, model: str, endpoint: str) -> Running:
        """From now on the reservation is kept alive; `charge` or `refund` ends it."""
        running = Running(rid, external_id, request_id, model, endpoint, self._clock.monotonic_s() + self._renew_s)
        self._running[rid] = running
        return running

    def holds(self, running: Running) -> bool:
        """Whether it has been neither charged nor refunded, nor is it being counted."""
        return running.rid in self._running and not running.counting

    def soon(self, running: Running, charging: Coroutine[None, None, None]) -> None:
        """Let `charging`, which counts and then charges, run on though its request ends; its lease is kept alive."""
        running.counting = True
        task = asyncio.create_task(charging)
        self._counting.add(task)
        task.add_done_callback(self._counting.discard)

    def charge(
        self, running: Running, *, input_tokens: int, output_tokens: int, requests: int = 1, counted_here: bool = False
    ) -> None:
        """Settle, without waiting: what is sent to Redis after this returns comes after it."""
        event = _Event(
            running.rid,
            running.external_id,
            running.request_id,
            running.model,
            running.endpoint,
            "charged",
            input_tokens,
            output_tokens,
            counted_here,
        )
        self._metrics.input_tokens.inc(input_tokens)
        self._metrics.output_tokens.inc(output_tokens)
        self._end(
            Settlement(
                rid=running.rid,
                external_id=running.external_id,
                requests=requests,
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                event=_encode(event).decode(),
            )
        )

    def refund(self, running: Running, *, reached: bool) -> None:
        """Nothing is charged. The sliding window gets its request back unless the upstream was `reached`."""
        self._end(
            Settlement(
                rid=running.rid,
                external_id=running.external_id,
                requests=0,
                input_tokens=0,
                output_tokens=0,
                event="",
                window_requests_back=0 if reached else 1,
            )
        )

    def refund_unheard(self, rid: str, external_id: str) -> None:
        """An admission whose answer never came may have been made: give it back."""
        self._end(Settlement(rid, external_id, 0, 0, 0, "", window_requests_back=1))

    def _end(self, settlement: Settlement) -> None:
        self._running.pop(settlement.rid, None)
        self._send(settlement, None)

    def _send(self, settlement: Settlement, attempted_s: float | None) -> None:
        now_s = self._clock.unix_s()
        if attempted_s is not None:
            settlement = replace(settlement, attempt_age_ms=max(1, int((now_s - attempted_s) * 1000)))
        sent = self._accounts.send_settlement(settlement)
        self._settling.add(sent)
        sent.add_done_callback(partial(self._ended, settlement, attempted_s, now_s))

    def _ended(self, settlement: Settlement, before_s: float | None, now_s: float, sent: asyncio.Future[Reply]) -> None:
        self._settling.discard(sent)
        error = asyncio.CancelledError() if sent.cancelled() else sent.exception()
        if error is None:
            outcome = sent.result()
            if outcome == SettleOutcome.SETTLED:
                self._settled.inc()
            else:
                self._metrics.event(_OUTCOMES[SettleOutcome(cast("int", outcome))]).inc()
        elif isinstance(error, RedisUnavailable) and not isinstance(error, RedisOutcomeUnknown):
            self._keep(settlement, before_s)
        else:
            if not isinstance(error, RedisOutcomeUnknown):
                self._storm.log_once_per_s(logging.ERROR, "refused", f"Redis refused a settlement, it is kept: {error}")
            self._keep(settlement, now_s if before_s is None else before_s)

    def _keep(self, settlement: Settlement, attempted_s: float | None) -> None:
        try:
            self._spool.put(settlement, attempted_s=attempted_s)
            self._metrics.event("spooled").inc()
        except OSError as error:
            self._storm.log_once_per_s(logging.ERROR, "disk", f"settlements are kept in memory, not on disk: {error}")
            self._memory.settlements.append((settlement, attempted_s))
            self._metrics.event("kept_in_memory").inc()
        self._metrics.spool_waiting.set(self._spool.waiting + len(self._memory.settlements))

    # --- in the background ---

    async def run(self) -> None:
        """Until cancelled: every half second, renew leases that are due and try to replay what waits."""
        while True:
            await self._clock.sleep(_REPLAY_EVERY_S)
            await self._renew_leases()
            await self.replay()

    async def _renew_leases(self) -> None:
        now_s = self._clock.monotonic_s()
        due = [running for running in self._running.values() if running.renew_at_s <= now_s]
        for running in due:
            running.renew_at_s = now_s + self._renew_s
        renewals = [
            self._accounts.extend(
                rid=running.rid, external_id=running.external_id, output_tokens_seen=running.output_tokens_seen
            )
            for running in due
        ]
        for result in await asyncio.gather(*renewals, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, RedisUnavailable):
                _log.warning("a lease could not be renewed: %s", result)

    async def replay(self) -> None:
        """Settle what waits, this process's and what dead ones left on disk; what fails stays."""
        memory, self._memory.settlements = self._memory.settlements, []
        for settlement, attempted_s in memory:
            self._send(settlement, attempted_s)
        try:
            await self._spool.sync()
        except OSError as error:
            self._storm.log_once_per_s(logging.ERROR, "disk", f"the spool may not outlive this machine: {error}")
        try:
            settle, reach = self._accounts.settle, self._accounts.reach
            replayed = await self._spool.replay(settle, reach, now_s=self._clock.unix_s())
        except (RedisUnavailable, RedisFull):
            return
        except RedisRefused as error:
            self._storm.log_once_per_s(logging.ERROR, "refused", f"settlements wait on disk, Redis refuses: {error}")
        except OSError as error:
            self._storm.log_once_per_s(logging.ERROR, "disk", f"settlements wait, the spool cannot be read: {error}")
        else:
            if replayed:
                self._metrics.event("replayed").inc(replayed)
                _log.info("replayed %d settlements that had waited on disk", replayed)
        finally:
            self._metrics.spool_waiting.set(self._spool.waiting + len(self._memory.settlements))

    async def close(self, *, timeout_s: float) -> None:
        """Wait for settlements under way; what does not get through goes to disk."""
        if self._counting:
            await asyncio.wait(self._counting, timeout=timeout_s)
        if self._settling:
            await asyncio.wait(self._settling, timeout=timeout_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.replay()
        self._spool.close()

"""The account of a user: what may still be used, decided and changed only by scripts that every replica shares.

Every method raises `RedisUnavailable` (nothing applied), `RedisOutcomeUnknown` (perhaps applied: ask again with the
same rid, it has effect once), `RedisFull` or `RedisRefused`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, cast

import msgspec

from sentinel_shared import keys
from sentinel_shared.contracts import LIMIT_NAMES, LimitName, LimitSnapshot, ResetPeriod
from sentinel_shared.errors import RedisOutcomeUnknown
from sentinel_shared.replication import Replication
from sentinel_shared.scripts import load
from sentinel_shared.units import next_period_end_s, period_end_s, period_start_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentinel_shared.redis_lane import RedisLane, Reply, Script

_PERIODS: Final = (None, ResetPeriod.DAILY, ResetPeriod.WEEKLY, ResetPeriod.MONTHLY, ResetPeriod.NEVER)
_UNLIMITED: Final = -1
_ABSENT: Final = -2


@dataclass(frozen=True, slots=True)
class WindowPolicy:
    """The per-user sliding window; 0 turns that limit off."""

    window_ms: int
    requests: int
    tokens: int

    @property
    def active_ms(self) -> int:
        """The window's length for scripts: 0 when neither limit is on."""
        return self.window_ms if self.requests or self.tokens else 0


class Cost(msgspec.Struct, frozen=True, gc=False):
    """What a request may cost. `output_wanted_tokens` is -1 when the client set no cap, 0 when there is no output."""

    input_tokens: int
    output_wanted_tokens: int
    model_max_output_tokens: int
    choices: int = 1


class Binding(IntEnum):
    """Which limit decides; `BUSY_*` when it is only promised to requests that run now."""

    NONE = 0
    REQUESTS = 1
    INPUT_TOKENS = 2
    OUTPUT_TOKENS = 3
    WINDOW_REQUESTS = 4
    WINDOW_TOKENS = 5
    BUSY_REQUESTS = 11
    BUSY_INPUT_TOKENS = 12
    BUSY_OUTPUT_TOKENS = 13


@dataclass(frozen=True, slots=True)
class LimitState:
    """One limit as the account holds it; `limit` None is unlimited, `period_end_s` None never ends."""

    name: LimitName
    limit: int | None
    used: int
    reserved: int
    period_end_s: int | None

    @property
    def remaining(self) -> int | None:
        """What is neither used nor promised, never below 0; None when unlimited."""
        return None if self.limit is None else max(0, self.limit - self.used - self.reserved)


class Decision:
    """The account's answer to `admit`, read lazily: most answers need only a few of its numbers."""

    __slots__ = ("_reply",)

    def __init__(self, reply: list[int]) -> None:
        self._reply = reply

    @property
    def admitted(self) -> bool:
        """Whether the request may run."""
        return self._reply[0] == 1

    @property
    def granted_output_tokens(self) -> int:
        """Output tokens promised, over all choices; -1 when nothing limits them."""
        return self._reply[1]

    @property
    def binding(self) -> Binding:
        """The limit that denied."""
        return Binding(self._reply[2])

    @property
    def wait_ms(self) -> int:
        """How long until a denied request may succeed; -1: not by waiting."""
        return self._reply[3]

    @property
    def now_ms(self) -> int:
        """Redis's clock at the decision, Unix ms."""
        return self._reply[4]

    @property
    def refresh_due(self) -> bool:
        """The limits are past their freshness: someone has to ask Zion."""
        return self._reply[5] == 1

    @property
    def limits_age_ms(self) -> int:
        """Since Zion was last heard about this user."""
        return self._reply[6]

    def limit(self, index: int) -> tuple[int, int, int, int]:
        """Limit (-1 unlimited, -2 absent), used, reserved, period end s (0 never) of `LIMIT_NAMES[index]`."""
        at = 7 + 4 * index
        limit, used, reserved, end_s = self._reply[at : at + 4]
        return limit, used, reserved, end_s

    def limit_state(self, index: int) -> LimitState | None:
        """The same in words; None when Zion has no such limit for the user."""
        return _limit_state(LIMIT_NAMES[index], *self.limit(index))

    @property
    def window_requests(self) -> int:
        """Requests counted in the window, this one included when admitted."""
        return self._reply[19]

    @property
    def window_tokens(self) -> int:
        """Tokens counted in the window."""
        return self._reply[20]


class SettleOutcome(IntEnum):
    """What a settlement did: see `settle.lua`."""

    KNOWN_BEFORE = 0
    SETTLED = 1
    CORRECTED = 2
    RESERVATION_LOST = 3


class CommitOutcome(IntEnum):
    """What became of a refresh: see `refresh_commit.lua`."""

    OVERTAKEN = 0
    COMMITTED = 1
    PERIOD_OVER = 2


@dataclass(frozen=True, slots=True)
class RefreshStart:
    """Where a refresh started: the account's epoch (-1 none), and per limit all that Zion had confirmed by then."""

    epoch: int
    confirmed: tuple[int, ...]


class Settlement(msgspec.Struct, frozen=True, gc=False):
    """What a request really cost. A refund is a settlement of nothing.

    `attempt_age_ms` is how long ago it was first sent to Redis without an answer (0: never); `window_requests_back`
    gives the sliding window its request back (the upstream was never reached).
    """

    rid: str
    external_id: str
    requests: int
    input_tokens: int
    output_tokens: int
    event: str
    attempt_age_ms: int = 0
    window_requests_back: int = 0


@dataclass(frozen=True, slots=True)
class Freshness:
    """How long limits serve: fresh, and then stale while Zion is away."""

    fresh_ms: int
    stale_ms: int

    @classmethod
    def of(cls, *, cache_ttl_s: float, max_stale_s: float) -> Freshness:
        """From the settings `CACHE_TTL_SECONDS` and `LIMITS_MAX_STALE_SECONDS`."""
        return cls(fresh_ms=int(cache_ttl_s * 1000), stale_ms=int(max_stale_s * 1000))


@dataclass(frozen=True, slots=True)
class AccountView:
    """An account spelled out, for `GET /v1/usage` and for support."""

    limits: tuple[LimitState, ...]
    reset_periods: tuple[ResetPeriod | None, ...]
    ledger: tuple[tuple[int, int, int, int], ...]
    """base, pending, inflight, dead of each limit in `limits`."""
    epoch: int
    fresh_until_ms: int
    stale_until_ms: int
    committed_ms: int
    window_requests: int
    window_tokens: int
    now_ms: int
    batch_id: str


class Accounts:
    """All accounts, through one lane."""

    def __init__(
        self,
        lane: RedisLane,
        scripts: AccountScripts,
        *,
        window: WindowPolicy,
        lease_s: float,
        wait_replicas: int = 0,
    ) -> None:
        self._lane = lane
        self._replication = Replication(lane, wait_replicas)
        self._scripts = scripts
        self._window_ms = window.active_ms
        self._window_requests = window.requests
        self._window_tokens = window.tokens
        self._lease_ms = int(lease_s * 1000)

    async def admit(self, *, rid: str, external_id: str, cost: Cost) -> Decision | None:
        """Decide and reserve in one step; None when the account is not known (or too stale): fetch it, ask again."""
        shard = keys.shard_of(external_id)
        reply = await self._lane.call(
            self._scripts.admit,
            (keys.account(external_id), keys.leases(shard), keys.due(shard)),
            (
                rid,
                external_id,
                cost.input_tokens,
                cost.output_wanted_tokens,
                cost.model_max_output_tokens,
                cost.choices,
                self._lease_ms,
                self._window_ms,
                self._window_requests,
                self._window_tokens,
            ),
        )
        numbers = cast("list[int]", reply)
        return None if numbers[0] < 0 else Decision(numbers)

    async def settle(self, settlement: Settlement) -> SettleOutcome:
        """Charge what was used and queue it for Zion. Has effect once, however often it is called."""
        return SettleOutcome(cast("int", await self.send_settlement(settlement)))

    def send_settlement(self, settlement: Settlement) -> asyncio.Future[Reply]:
        """The same without waiting: it goes out before what this lane sends later. The reply is a SettleOutcome.

        With `wait_replicas`, RedisOutcomeUnknown says that too few replicas have it: settle again.
        """
        s = settlement
        shard = keys.shard_of(s.external_id)
        sent = self._lane.call(
            self._scripts.settle,
            (
                keys.account(s.external_id),
                keys.leases(shard),
                keys.queue(shard),
                keys.audit(shard),
                keys.tallies(shard),
                keys.settled_prefix(shard) + s.rid,
                keys.reaped_prefix(shard) + s.rid,
            ),
            (
                s.rid,
                s.external_id,
                s.requests,
                s.input_tokens,
                s.output_tokens,
                s.event,
                keys.AUDIT_EVENTS_PER_SHARD,
                s.attempt_age_ms,
                keys.SETTLED_TTL_S,
                self._window_ms,
                s.window_requests_back,
            ),
        )
        return asyncio.ensure_future(self._replicated(shard, sent)) if self._replication.replicas else sent

    async def _replicated(self, shard: int, sent: asyncio.Future[Reply]) -> Reply:
        reply, replicas = await self._replication.of(shard, sent)
        if replicas < self._replication.replicas:
            raise RedisOutcomeUnknown(f"only {replicas} of {self._replication.replicas} replicas have a settlement")
        return reply

    async def reach(self) -> None:
        """Raises RedisUnavailable unless all of Redis answers now."""
        await self._lane.ping()

    async def extend(self, *, rid: str, external_id: str, output_tokens_seen: int) -> bool:
        """Renew a long request's lease; False when its reservation is gone."""
        leases = keys.leases(keys.shard_of(external_id))
        args = (rid, external_id, self._lease_ms, output_tokens_seen)
        return await self._lane.call(self._scripts.extend, (keys.account(external_id), leases), args) == 1

    async def refresh_begin(self, external_id: str) -> RefreshStart:
        """What is to be handed to `refresh_commit`; call it before Zion is asked."""
        reply = await self._lane.call(self._scripts.refresh_begin, (keys.account(external_id),), ())
        epoch, *confirmed = cast("list[int]", reply)
        return RefreshStart(epoch, tuple(confirmed))

    async def refresh_commit(
        self,
        *,
        external_id: str,
        start: RefreshStart,
        limits: Sequence[LimitSnapshot],
        freshness: Freshness,
        next_refresh_s: float,
        now_s: float,
    ) -> CommitOutcome:
        """Make Zion's answer the account's, unless a newer one came first. `now_s` dates periods Zion left open."""
        by_name = {snapshot.name: snapshot for snapshot in limits}
        args: list[str | int] = [
            external_id,
            start.epoch,
            freshness.fresh_ms,
            freshness.stale_ms,
            int(next_refresh_s * 1000),
        ]
        for name, confirmed in zip(LIMIT_NAMES, start.confirmed, strict=True):
            args += (*_snapshot_args(by_name.get(name), now_s), confirmed)
        due = keys.due(keys.shard_of(external_id))
        reply = await self._lane.call(self._scripts.refresh_commit, (keys.account(external_id), due), args)
        return CommitOutcome(cast("int", reply))

    async def read(self, external_id: str) -> AccountView | None:
        """What the account holds now; changes nothing. None when there is none."""
        key = keys.account(external_id)
        reply = cast("list[bytes]", await self._lane.call(self._scripts.read, (key,), (self._window_ms,)))
        return _view(reply) if reply else None

    async def lease_due(self, shard: int, *, at_most: int, lease_s: float, idle_s: float) -> list[str]:
        """External ids whose limits are due for a refresh, leased to the caller."""
        args = (keys.account_prefix(shard), at_most, int(lease_s * 1000), int(idle_s * 1000))
        reply = await self._lane.call(self._scripts.lease_due, (keys.due(shard),), args)
        return [member.decode() for member in cast("list[bytes]", reply)]

    async def mark_due(self, external_id: str, *, now_s: float) -> None:
        """Let limits-sync refresh this user as soon as it can."""
        shard = keys.shard_of(external_id)
        await self._lane.submit(keys.due(shard), "ZADD", keys.due(shard), int(now_s * 1000), external_id)

    async def unmark_due(self, external_id: str) -> None:
        """Take the user off the refresh list; the next request puts it on again."""
        key = keys.due(keys.shard_of(external_id))
        await self._lane.submit(key, "ZREM", key, external_id)

    async def refresh_list(self, shard: int) -> tuple[int, float | None]:
        """How many users of a shard are kept fresh, and when the first of them is due (Unix s; None: there is none)."""
        key = keys.due(shard)
        count, first = self._lane.submit(key, "ZCARD", key), self._lane.submit(key, "ZRANGE", key, 0, 0, "WITHSCORES")
        users, due = cast("tuple[int, list[bytes]]", tuple(await asyncio.gather(count, first)))
        return users, float(due[1]) / 1000 if due else None


@dataclass(frozen=True, slots=True)
class AccountScripts:
    """The scripts behind `Accounts`, loaded once per process."""

    admit: Script
    settle: Script
    extend: Script
    refresh_begin: Script
    refresh_commit: Script
    read: Script
    lease_due: Script

    @classmethod
    def load(cls) -> AccountScripts:
        """Read them from the package."""
        return cls(**{name: load(name) for name in cls.__slots__})

    def all(self) -> tuple[Script, ...]:
        """For the lane, which loads them at connect."""
        return tuple(getattr(self, name) for name in self.__slots__)


def _limit_state(name: LimitName, limit: int, used: int, reserved: int, end_s: int) -> LimitState | None:
    if limit == _ABSENT:
        return None
    return LimitState(
        name=name,
        limit=None if limit == _UNLIMITED else limit,
        used=used,
        reserved=reserved,
        period_end_s=end_s or None,
    )


def _snapshot_args(snapshot: LimitSnapshot | None, now_s: float) -> tuple[int, ...]:
    if snapshot is None:
        return (_ABSENT, 0, 0, 0, 0, 0)
    period = snapshot.reset_period
    start_s, end_s = snapshot.period_start_s, snapshot.period_end_s
    if period is ResetPeriod.NEVER:
        start_s, end_s = None, None
    elif end_s is None:
        start_s, end_s = period_start_s(period, now_s), period_end_s(period, now_s)
    return (
        _UNLIMITED if snapshot.limit is None else snapshot.limit,
        snapshot.used,
        _PERIODS.index(period),
        start_s or 0,
        end_s or 0,
        (next_period_end_s(period, end_s) or 0) if end_s else 0,
    )


def _view(reply: list[bytes]) -> AccountView:
    n = [int(text) for text in reply[:-1]]
    limits, periods, ledger = [], [], []
    for index, name in enumerate(LIMIT_NAMES):
        limit, base, pending, inflight, dead, reserved, _, end_s, _, _, period, _ = n[11 + 12 * index : 23 + 12 * index]
        state = _limit_state(name, limit, base + pending + inflight + dead, reserved, end_s)
        if state is not None:
            limits.append(state)
            periods.append(_PERIODS[period])
            ledger.append((base, pending, inflight, dead))
    return AccountView(
        limits=tuple(limits),
        reset_periods=tuple(periods),
        ledger=tuple(ledger),
        epoch=n[0],
        fresh_until_ms=n[1],
        stale_until_ms=n[2],
        committed_ms=n[5],
        window_requests=n[7] + n[9],
        window_tokens=n[8] + n[10],
        now_ms=n[47],
        batch_id=reply[-1].decode(),
    )

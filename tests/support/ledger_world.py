"""Proxies, workers, refreshers, operators and time, interleaved step by step over the real scripts, and what must hold.

One `World` is one run of one seed: two users in one shard, on a database of its own, under a clock that only the
world moves. After every step `check` compares the accounts with what the model knows to be true.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

from msgspec.structs import replace

from sentinel_shared import keys
from sentinel_shared.accounts import (
    Accounts,
    AccountScripts,
    Binding,
    CommitOutcome,
    Cost,
    Freshness,
    RefreshStart,
    Settlement,
    SettleOutcome,
    WindowPolicy,
)
from sentinel_shared.contracts import LIMIT_NAMES, IncrementResult, LimitName, LimitSnapshot, ResetPeriod
from sentinel_shared.redis_lane import RedisLane
from sentinel_shared.usage_queue import Batch, QueueScripts, UsageQueue
from tests.support.ledger_model import CLOCK, DAY_S, Applied, Book, ModelZion, Reading, expected_decision, with_clock

MIDNIGHT_S = 1_800_057_600
LEASE_MS = 10_000
IDLE_S = 90
WINDOW_MS = 12_000
LATEST_MS = keys.SETTLED_TTL_S * 1000
"""Whatever was given up for lost comes within this time, or never."""
REAPED_WITHIN_MS = LATEST_MS + 3_500_000
"""Nor is a reservation left unreaped for longer, from when its settlement came before it: see `settle.lua`."""
FRESHNESS = Freshness(fresh_ms=30_000, stale_ms=2 * DAY_S * 1000)
UNBOUNDED = {"queue", "leases", "due", "audit", "batches", "dead_letters", "tallies"}
"""Keys whose bound is another one than time: see `keys`."""


def _same_shard(count: int) -> list[str]:
    names = (f'user "{number}"\n{{é}}' for number in range(1000))
    return [name for name in names if keys.shard_of(name) == 3][:count]


def _is_hash(key: bytes) -> bool:
    """Whose DUMP has no fixed order."""
    return key.split(b"}:", 1)[1].startswith((b"account:", b"batch:", b"dead_letters", b"tallies"))


USERS = _same_shard(2)
SHARD = 3


@dataclass(frozen=True, slots=True)
class Scripts:
    """All scripts under the test's clock, one rule perhaps taken out."""

    account: AccountScripts
    queue: QueueScripts

    @classmethod
    def load(cls, *, taken_out: tuple[str, str, str] | None = None) -> Scripts:
        def clocked(scripts: Any) -> dict[str, Any]:
            out = {}
            for name in type(scripts).__slots__:
                replace = taken_out[1:] if taken_out is not None and taken_out[0] == name else None
                out[name] = with_clock(getattr(scripts, name), replace=replace)
            return out

        return cls(
            AccountScripts(**clocked(AccountScripts.load())),
            QueueScripts(**clocked(QueueScripts.load())),
        )


@dataclass
class Request:
    """An admitted request: what it was promised, and what it has cost so far by the books."""

    rid: str
    user: str
    policy: WindowPolicy
    cost: Cost
    granted: int
    admitted_ms: int
    deadline_ms: int
    seen: int = 0
    settlement: Settlement | None = None
    settled_ms: int = 0
    stands: bool = True
    """Its reservation is in the account."""
    reaped: bool = False
    charged: list[int] = field(default_factory=lambda: [0, 0, 0])
    in_window: tuple[int, int] = (0, 0)

    @property
    def promised(self) -> tuple[int, int, int]:
        return (1, self.cost.input_tokens, max(0, self.granted)) if self.stands else (0, 0, 0)


@dataclass
class Owed:
    """One limit of one user, by the model: what was ever charged, applied by Zion, acknowledged, dropped."""

    charged: int = 0
    applied: int = 0
    acked: int = 0
    dropped: int = 0
    gone_before: int = 0
    """Acknowledged or dropped before this period: no part of its `used`."""
    twice: float = 0
    """How much a refresh may have counted twice, until the next one."""
    snapshot_of: int | None = None
    """The last period of which a snapshot was committed."""

    @property
    def unacked(self) -> int:
        return self.applied - self.acked


@dataclass
class Hand:
    """What one worker has in hand: a batch, and Zion's word on it when it has come."""

    batch: Batch
    results: list[IncrementResult] | None = None
    refused: bool = False
    singles: dict[int, IncrementResult] | None = None


@dataclass
class Refresher:
    """A refresh under way: begun, then read, then committed."""

    user: str
    start: RefreshStart
    acked: list[int]
    reading: Reading | None = None
    unacked: list[int] = field(default_factory=list)


class World:
    """See the module. A step that has nothing to do returns at once."""

    def __init__(self, lane: RedisLane, seed: int, scripts: Scripts) -> None:
        self.dice = dice = random.Random(seed)
        self.lane = lane
        self.now_ms = MIDNIGHT_S * 1000 - dice.choice([700, 4_000, 20_000, 60_000, 3 * 3_600_000])
        self.window = WindowPolicy(WINDOW_MS, dice.choice([0, 0, 4, 9]), dice.choice([0, 0, 250]))
        self.accounts = Accounts(lane, scripts.account, window=self.window, lease_s=LEASE_MS / 1000)
        self.queue = UsageQueue(lane, scripts.queue)
        self.zion = ModelZion(
            {user: {name: self._book(name) for name in LIMIT_NAMES} for user in USERS},
            tells_new_value=dice.random() < 0.6,
            lag_ms=dice.choice([0, 0, 900, 3_000]),
            dice=dice,
        )
        self.owed = {user: {name: Owed() for name in LIMIT_NAMES} for user in USERS}
        self.requests: list[Request] = []
        self.on_their_way: list[Request] = []
        """Settled, as their admission was given up for lost; but it waits in some buffer, and will be executed."""
        self.hands: list[Hand | None] = [None, None, None]
        self.in_flight: dict[str, set[str]] = {}
        """Whose usage is in which batch that is not acknowledged yet."""
        self.refreshers: list[Refresher] = []
        self.committed: dict[str, int] = dict.fromkeys(USERS, 0)
        self.limits: dict[str, dict[LimitName, int | None]] = {}
        self.numbers = 0

    def _book(self, name: LimitName) -> Book:
        dice = self.dice
        period, length_s = dice.choice(
            [(ResetPeriod.NEVER, None), (ResetPeriod.DAILY, DAY_S), (ResetPeriod.DAILY, DAY_S), (None, 25)]
        )
        limits = [0, 4, 9, None, 500] if name is LimitName.REQUESTS else [0, 120, 400, 400, None, 20_000]
        return Book(dice.choice(limits), period, length_s, absent=dice.random() < 0.1)

    def name(self, word: str) -> str:
        self.numbers += 1
        return f"{word}{self.numbers}"

    # --- the stage ---

    async def open(self) -> None:
        await self.lane.call_on_each("FLUSHDB")[0]
        await self.set_clock()
        for user in USERS:
            await self._refresh(user)

    async def set_clock(self) -> None:
        await self.lane.execute(
            CLOCK, "SET", CLOCK, f"{self.now_ms // 1000} {self.now_ms % 1000 * 1000 + self.dice.randrange(1000)}"
        )

    async def dump(self) -> dict[bytes, Any]:
        """Everything that a script may change; two dumps are equal iff nothing was changed."""
        names = sorted(cast("list[bytes]", await self.lane.call_on_each("KEYS", "sentinel:*")[0]))
        dumps = [self.lane.submit(name, "HGETALL" if _is_hash(name) else "DUMP", name) for name in names]
        out: dict[bytes, Any] = {}
        for name, dump in zip(names, dumps, strict=True):
            value = await dump
            out[name] = dict(zip(value[::2], value[1::2], strict=True)) if isinstance(value, list) else value
        return out

    async def unchanged(self, call: Awaitable[Any]) -> Any:
        """The reply of a call that must have no effect."""
        before = await self.dump()
        reply = await call
        after = await self.dump()
        assert after == before, sorted(name for name in before | after if before.get(name) != after.get(name))
        return reply

    # --- time ---

    async def step_time(self) -> None:
        leap_ms = self.dice.choice([1, 40, 300, 1_000, 1_000, 2_500, 6_000, 11_000])
        if self.dice.random() < 0.25:
            ends_s = [b.end_s(self.now_ms) for books in self.zion.books.values() for b in books.values()]
            ends_ms = [1000 * end_s - self.now_ms for end_s in ends_s if end_s is not None]
            leap_ms = max(1, min(ends_ms, default=5) + self.dice.choice([-1, 0, 1, 600]))
        elif self.dice.random() < 0.04:
            leap_ms = self.dice.choice([200_000, 1_000_000, DAY_S * 1000])
        if await self.advance(leap_ms) and self.dice.random() < 0.5:
            for user in USERS:
                await self._refresh(user)

    async def advance(self, leap_ms: int) -> bool:
        """Whether a period has ended."""
        ended = False
        late_ms = [request.settled_ms for request in self.requests if request.stands and request.settlement is not None]
        if leap_ms > IDLE_S * 1000 and late_ms and self.now_ms + leap_ms - min(late_ms) > REAPED_WITHIN_MS:
            await self.advance(LEASE_MS)
            await self.step_reap()
        before_ms, self.now_ms = self.now_ms, self.now_ms + leap_ms
        await self.set_clock()
        for user, books in self.zion.books.items():
            for name, book in books.items():
                if book.number(before_ms) != book.number(self.now_ms):
                    owed = self.owed[user][name]
                    owed.gone_before, ended = owed.acked + owed.dropped, True
                    owed.twice = owed.twice if math.isinf(owed.twice) else 0  # an unknown period ends unseen
        self.on_their_way = [r for r in self.on_their_way if self.now_ms - r.settled_ms <= LATEST_MS]
        if leap_ms > IDLE_S * 1000:
            await self._age(keys.settled_prefix(SHARD), leap_ms // 1000)
            self.refreshers.clear()  # no call to Zion takes that long
            for user in USERS:
                account = keys.account(user)
                if cast("int", await self.lane.execute(account, "TTL", account)) >= 0:
                    await self.lane.execute(account, "DEL", account)
                    self.committed[user] = 0
                    await self._refresh(user)
        return ended

    async def _age(self, prefix: str, leap_s: int) -> None:
        for name in cast("list[bytes]", await self.lane.call_on_each("KEYS", "sentinel:*")[0]):
            if name.startswith(prefix.encode()):
                left_s = cast("int", await self.lane.execute(name, "TTL", name)) - leap_s
                await self.lane.execute(name, "EXPIRE", name, left_s)

    # --- proxies ---

    async def step_admit(self) -> None:
        request = await self._admit(self.name("r"), self.dice.choice(USERS), self._cost())
        if request is not None:
            self.requests.append(request)
            await self._check_never_above(request.user)

    async def step_lose(self) -> None:
        """An admission is not heard of again: the request ran all the same, or was refused, and is settled."""
        request = Request(
            self.name("r"), self.dice.choice(USERS), self.window, self._cost(), -1, self.now_ms, 0, stands=False
        )
        request.settlement = settlement = self._settlement(request)
        assert await self.accounts.settle(settlement) is SettleOutcome.RESERVATION_LOST
        request.settled_ms = self.now_ms
        self._charge(request, [settlement.requests, settlement.input_tokens, settlement.output_tokens])
        self.requests.append(request)
        self.on_their_way.append(request)

    async def step_arrive(self) -> None:
        """An admission that had been given up for lost is executed."""
        if self.on_their_way:
            request = self.on_their_way.pop(self.dice.randrange(len(self.on_their_way)))
            late = await self._admit(request.rid, request.user, request.cost)
            if late is not None:
                late.settlement, late.settled_ms, late.charged = request.settlement, request.settled_ms, request.charged
                self.requests[self.requests.index(request)] = late
                await self._check_never_above(late.user)

    def _cost(self) -> Cost:
        dice, choices = self.dice, self.dice.choice([1, 1, 2, 3])
        wanted = dice.choice([-1, -1, 0, 20 * choices, 90 * choices])
        return Cost(dice.randint(0, 40), wanted, dice.choice([60, 2_000]) * choices, choices)

    async def _admit(self, rid: str, user: str, cost: Cost) -> Request | None:
        view = await self.accounts.read(user)
        assert view is not None
        if self.now_ms >= view.stale_until_ms:
            assert await self.unchanged(self.accounts.admit(rid=rid, external_id=user, cost=cost)) is None
            return None
        limits = {state.name: state for state in view.limits}
        counted = (view.window_requests, view.window_tokens)
        binding, granted = expected_decision(limits, counted, self.window, cost)
        asking = self.accounts.admit(rid=rid, external_id=user, cost=cost)
        decision = await (asking if binding is Binding.NONE else self.unchanged(asking))
        assert decision is not None
        assert (decision.binding, decision.granted_output_tokens) == (binding, granted)
        assert decision.admitted == (binding is Binding.NONE)
        assert decision.now_ms == self.now_ms
        if not decision.admitted:
            return None
        again = await self.unchanged(self.accounts.admit(rid=rid, external_id=user, cost=cost))
        assert again is not None
        assert (again.admitted, again.granted_output_tokens) == (True, granted)
        request = Request(rid, user, self.window, cost, granted, self.now_ms, self.now_ms + LEASE_MS)
        request.in_window = (1, cost.input_tokens + max(0, granted))
        return request

    async def _check_never_above(self, user: str) -> None:
        """What is truly used in this period, and what is promised, fit under every limit at an admission."""
        view = await self.accounts.read(user)
        assert view is not None
        for state in view.limits:
            index = LIMIT_NAMES.index(state.name)
            promised = sum(request.promised[index] for request in self.requests if request.user == user)
            if state.limit is not None:
                assert self.truth(user, state.name) + promised <= state.limit, (state, promised)
        since_ms = self.now_ms - WINDOW_MS
        recent = [r.in_window for r in self.requests if r.user == user and r.admitted_ms > since_ms]
        assert not self.window.requests or sum(requests for requests, _ in recent) <= self.window.requests
        assert not self.window.tokens or sum(tokens for _, tokens in recent) <= self.window.tokens

    def _pick(self, wanted: Callable[[Request], bool]) -> Request | None:
        found = [request for request in self.requests if wanted(request)]
        return self.dice.choice(found) if found else None

    async def step_settle(self) -> None:
        request = self._pick(lambda r: r.settlement is None)
        if request is not None:
            await self.settle(request)

    def _settlement(self, request: Request) -> Settlement:
        dice, estimate = self.dice, request.cost.input_tokens
        refunded = dice.random() < 0.15
        most = request.granted if request.granted >= 0 else 70
        return Settlement(
            request.rid,
            request.user,
            0 if refunded else 1,
            0 if refunded else max(0, estimate + dice.choice([-9, 0, 0, 7])),
            0 if refunded else dice.choice([0, most, dice.randint(0, most)]),
            "",
            window_requests_back=1 if refunded else 0,
        )

    async def settle(self, request: Request) -> None:
        settlement = self._settlement(request)
        outcome = await self.accounts.settle(settlement)
        assert outcome is (SettleOutcome.CORRECTED if request.reaped else SettleOutcome.SETTLED)
        request.settlement, request.settled_ms = settlement, self.now_ms
        self._take_back(request)
        self._charge(request, [settlement.requests, settlement.input_tokens, settlement.output_tokens])

    def _take_back(self, request: Request) -> None:
        """What was promised, by a settlement."""
        if request.stands and request.settlement is not None:
            s = request.settlement
            request.in_window = (1 - s.window_requests_back, s.input_tokens + s.output_tokens)
            request.stands = False

    def _charge(self, request: Request, costs: list[int]) -> None:
        """Zion keeps no book for a limit that was absent in the last snapshot."""
        for index, name in enumerate(LIMIT_NAMES):
            if name not in self.absent[request.user]:
                self.owed[request.user][name].charged += costs[index] - request.charged[index]
                request.charged[index] = costs[index]

    async def step_settle_again(self) -> None:
        request = self._pick(lambda r: r.settlement is not None)
        if request is not None and request.settlement is not None:
            age_ms = max(1, self.now_ms - request.settled_ms)
            if age_ms <= LATEST_MS and self.dice.random() < 0.5:
                age_ms = 0  # the first attempt, given up for lost too, is executed after the second one
            again = self.accounts.settle(replace(request.settlement, attempt_age_ms=age_ms))
            assert await (again if request.stands else self.unchanged(again)) is SettleOutcome.KNOWN_BEFORE
            self._take_back(request)

    async def step_extend(self) -> None:
        request = self._pick(lambda r: r.settlement is None or r.stands)
        if request is None:
            return
        seen = self.dice.randint(request.seen, max(request.seen, request.granted))
        extending = self.accounts.extend(rid=request.rid, external_id=request.user, output_tokens_seen=seen)
        if not request.stands:
            assert not await self.unchanged(extending)
        else:
            assert await extending
            request.seen, request.deadline_ms = seen, self.now_ms + LEASE_MS

    async def step_reap(self) -> None:
        over = [request for request in self.requests if request.stands and request.deadline_ms <= self.now_ms]
        reaped = await self.queue.reap(SHARD, at_most=100)
        assert reaped == len(over)
        for request in over:
            request.stands = False
            if request.settlement is None:
                request.reaped = True
                self._charge(request, [1, request.cost.input_tokens, request.seen])

    # --- workers ---

    async def step_work(self) -> None:
        """One worker goes one step on: take a batch, ask Zion, book its word. Or it dies, and forgets everything."""
        worker = self.dice.randrange(len(self.hands))
        hand = self.hands[worker]
        if hand is None:
            batch = await self._take()
            self.hands[worker] = None if batch is None else Hand(batch, singles=batch.done if batch.singles else None)
        elif self.dice.random() < 0.08:
            self.hands[worker] = None
        elif hand.results is not None:
            await self._book_results(hand.batch, hand.results)
            self.hands[worker] = None
        elif hand.refused:
            if not await self._go_on_refused(hand):
                self.hands[worker] = None
        elif self.dice.random() < 0.25:
            await self.queue.postpone(hand.batch, until_ms=self.now_ms + self.dice.choice([0, 1_000]))
            if self.zion.rejects(hand.batch.batch_id) is False:
                self._post(hand.batch)  # applied, then silent
            self.hands[worker] = None
        elif hand.singles is not None or self.zion.rejects(hand.batch.batch_id):
            hand.refused = True
        else:
            hand.results = [applied.result for applied in self._post(hand.batch)]

    async def _take(self) -> Batch | None:
        lease_s = self.dice.choice([0, 0, 2])
        batch = await self.queue.lease(SHARD, lease_s=lease_s)
        if batch is not None:
            return batch
        batch = await self.queue.claim(
            SHARD,
            batch_id=self.name("b"),
            users=self.dice.choice([1, 2, 2]),
            items=self.dice.choice([1, 3, 6]),
            lease_s=lease_s,
            gather_s=self.dice.choice([0, 1, 4]),
            enough_users=self.dice.choice([1, 2]),
        )
        if batch is not None:
            users = {item.external_id for item in batch.increments()}
            assert users.isdisjoint(set().union(*self.in_flight.values())), "two batches in flight for one user"
            self.in_flight[batch.batch_id] = users
        return batch

    def _post(self, batch: Batch) -> list[Applied]:
        return [self._increment(batch, index) for index in range(len(batch.increments()))]

    def _increment(self, batch: Batch, index: int) -> Applied:
        item, key = batch.increments()[index], f"{batch.batch_id}:{index}"
        new = key not in self.zion.answers
        applied = self.zion.increment(key, item, self.now_ms)
        if new and applied.result.applied:
            self.owed[item.external_id][item.limit_name].applied += item.amount
        return applied

    async def _go_on_refused(self, hand: Hand) -> bool:
        """A batch that Zion refuses as a whole: in halves, or item by item. False when this worker is done with it."""
        batch = hand.batch
        if hand.singles is None:
            here = await self._is_there(batch)
            first_id, second_id = self.name("b"), self.name("b")
            splitting = self.queue.split(batch, first_id=first_id, second_id=second_id)
            users = list(dict.fromkeys(item.external_id for item in batch.increments()))
            if here and len(users) > 1:
                assert await splitting
                del self.in_flight[batch.batch_id]
                self.in_flight |= {first_id: {users[0]}, second_id: {users[1]}}
                return False
            assert not await self.unchanged(splitting)
            noting = self.queue.note_singles(batch)
            if not await (noting if here else self.unchanged(noting)):
                assert not here
                return False
            hand.singles = {}
        left = [index for index in range(len(batch.increments())) if index not in hand.singles]
        if left:
            hand.singles[left[0]] = self._increment(batch, left[0]).result
            await self.queue.note_done(batch, left[0], hand.singles[left[0]])
        else:
            hand.results = [hand.singles[index] for index in range(len(batch.increments()))]
        return True

    async def _is_there(self, batch: Batch) -> bool:
        key = keys.batch_prefix(SHARD) + batch.batch_id
        return await self.lane.execute(key, "EXISTS", key) == 1

    async def _book_results(self, batch: Batch, results: list[IncrementResult]) -> None:
        booking = self.queue.ack(batch, results)
        if not await self._is_there(batch):
            assert not await self.unchanged(booking)
            return
        assert await booking
        del self.in_flight[batch.batch_id]
        assert not await self.unchanged(self.queue.ack(batch, results))
        for index, (item, result) in enumerate(zip(batch.increments(), results, strict=True)):
            if not result.applied:
                continue
            owed = self.owed[item.external_id][item.limit_name]
            book = self.zion.books[item.external_id][item.limit_name]
            owed.acked += item.amount
            then = self.zion.answers[f"{batch.batch_id}:{index}"].period
            here = book.number(self.now_ms)
            if result.new_value is not None and then != here == owed.snapshot_of == book.number(batch.claimed_ms):
                owed.twice += result.new_value  # a figure of the old period, from a Zion that turned too late

    async def step_operator(self) -> None:
        for letter in await self.queue.dead_letters():
            if self.dice.random() < 0.5:
                continue
            decide = self.dice.choice([self.queue.replay, self.queue.replay, self.queue.drop])
            assert await decide(letter)
            assert not await self.unchanged(decide(letter))
            if decide == self.queue.drop:
                self.owed[letter.external_id][letter.limit_name].dropped += letter.amount

    # --- Zion's limits ---

    async def step_refresh(self) -> None:
        """One of three refreshers goes one step on, or dies."""
        if len(self.refreshers) < 3 and self.dice.random() < 0.4:
            await self._begin(self.dice.choice(USERS))
        elif self.refreshers:
            refresher = self.dice.choice(self.refreshers)
            if refresher.reading is None:
                self._read(refresher)
            else:
                self.refreshers.remove(refresher)
                if self.dice.random() < 0.95:
                    await self._commit(refresher)

    async def _refresh(self, user: str) -> None:
        refresher = await self._begin(user)
        self._read(refresher)
        self.refreshers.remove(refresher)
        await self._commit(refresher)

    async def _begin(self, user: str) -> Refresher:
        start = await self.accounts.refresh_begin(user)
        refresher = Refresher(user, start, [owed.acked for owed in self.owed[user].values()])
        self.refreshers.append(refresher)
        return refresher

    def _read(self, refresher: Refresher) -> None:
        refresher.reading = self.zion.read(refresher.user, self.now_ms)
        refresher.unacked = [owed.unacked for owed in self.owed[refresher.user].values()]

    async def _commit(self, refresher: Refresher) -> None:
        user, reading = refresher.user, refresher.reading
        assert reading is not None

        async def commit() -> CommitOutcome:
            return await self.accounts.refresh_commit(
                external_id=user,
                start=refresher.start,
                limits=reading.limits,
                freshness=FRESHNESS,
                next_refresh_s=24,
                now_s=self.now_ms / 1000,
            )

        if reading.order < self.committed[user]:
            assert await self.unchanged(commit()) is CommitOutcome.OVERTAKEN, "an old answer came back"
            return
        outcome = await commit()
        if outcome is CommitOutcome.OVERTAKEN:
            return
        assert await self.unchanged(commit()) is CommitOutcome.OVERTAKEN
        self.committed[user] = reading.order
        self._note_commit(refresher, {snapshot.name: snapshot for snapshot in reading.limits})

    def _note_commit(self, refresher: Refresher, limits: dict[LimitName, LimitSnapshot]) -> None:
        user = refresher.user
        self.limits[user] = {name: snapshot.limit for name, snapshot in limits.items()}
        for index, name in enumerate(LIMIT_NAMES):
            owed, snapshot = self.owed[user][name], limits.get(name)
            if snapshot is None:
                owed.twice = math.inf  # not looked at while absent
            elif snapshot.period_end_s is None or snapshot.period_end_s * 1000 > self.now_ms:
                owed.snapshot_of = self.zion.books[user][name].number(self.now_ms)
                owed.twice = refresher.unacked[index] + owed.acked - refresher.acked[index]

    async def step_governance(self) -> None:
        """Zion's other writers, and its administrator."""
        user, name = self.dice.choice(USERS), self.dice.choice(LIMIT_NAMES)
        book = self.zion.books[user][name]
        if self.dice.random() < 0.5:
            book.others[book.number(self.now_ms - self.zion.lag_ms)] += self.dice.randint(1, 20)
        else:
            fresh = self._book(name)
            book.limit, book.absent = fresh.limit, fresh.absent

    # --- what must hold ---

    @property
    def absent(self) -> dict[str, set[LimitName]]:
        return {user: set(LIMIT_NAMES) - set(self.limits[user]) for user in USERS}

    def truth(self, user: str, name: LimitName) -> int:
        """What this user has used of this period's limit through us: in Zion's book, or owed to it."""
        owed, book = self.owed[user][name], self.zion.books[user][name]
        return book.ours[book.number(self.now_ms)] + owed.charged - owed.dropped - owed.applied

    async def check(self) -> None:
        for user in USERS:
            view = await self.accounts.read(user)
            assert view is not None
            assert {state.name: state.limit for state in view.limits} == self.limits[user]
            for state, ledger in zip(view.limits, view.ledger, strict=True):
                self._check_limit(user, state, ledger)
            key = keys.account(user)
            if cast("int", await self.lane.execute(key, "TTL", key)) >= 0:
                assert all(owed.charged == owed.acked + owed.dropped for owed in self.owed[user].values())
                assert not any(request.stands for request in self.requests if request.user == user)

    def _check_limit(self, user: str, state: Any, ledger: tuple[int, int, int, int]) -> None:
        owed, book = self.owed[user][state.name], self.zion.books[user][state.name]
        base, pending, inflight, dead = ledger
        assert min(base, inflight, dead, state.reserved) >= 0, ledger
        assert state.used == base + pending + inflight + dead
        assert pending + inflight + dead == owed.charged - owed.dropped - owed.acked, "a unit lost or doubled"
        index = LIMIT_NAMES.index(state.name)
        promised = [request.promised[index] for request in self.requests if request.user == user]
        assert state.reserved == sum(promised)
        assert state.used >= self.truth(user, state.name), ("used is below the truth", state, ledger)
        if state.period_end_s != book.end_s(self.now_ms):
            owed.twice = math.inf  # the account does not know this period: it may count the one before
            return
        most = owed.charged - owed.gone_before + book.others[book.number(self.now_ms)] + owed.twice
        assert state.used <= most, ("used is too high", state, ledger, most)

    async def quiet(self) -> None:
        """Everybody finishes. Then Zion's books hold every unit exactly once, and no key is without a bound."""
        for request in self.requests:
            if request.settlement is None and self.dice.random() < 0.5:
                await self.settle(request)
        await self.advance(LEASE_MS)
        await self.step_reap()
        self.hands = [None, None, None]
        for _ in range(400):
            await self.advance(2_100)
            batch, letters = await self._take(), await self.queue.dead_letters()
            for letter in letters:
                await self.queue.replay(letter)
            if batch is not None:
                await self._finish(batch)
            elif not letters and not (await self.queue.backlog(SHARD)).users:
                break
            await self.check()
        await self._check_keys()
        self.zion.lag_ms = 0
        for user in USERS:
            await self._refresh(user)
            await self._check_quiet(user)

    async def _finish(self, batch: Batch) -> None:
        if batch.singles or self.zion.rejects(batch.batch_id):
            hand = Hand(batch, refused=True, singles=batch.done if batch.singles else None)
            while hand.results is None and await self._go_on_refused(hand):
                pass
            if hand.results is not None:
                await self._book_results(batch, hand.results)
        else:
            await self._book_results(batch, [applied.result for applied in self._post(batch)])

    async def _check_quiet(self, user: str) -> None:
        view = await self.accounts.read(user)
        assert view is not None
        for state, (_, pending, inflight, dead) in zip(view.limits, view.ledger, strict=True):
            owed, book = self.owed[user][state.name], self.zion.books[user][state.name]
            assert (inflight, dead, state.reserved) == (0, 0, 0)
            assert pending <= 0, "the queue is empty, but usage is still owed"
            assert book.ours.total() + pending == owed.charged - owed.dropped
            assert state.used == book.used(self.now_ms) + pending

    async def _check_keys(self) -> None:
        for name in cast("list[bytes]", await self.lane.call_on_each("KEYS", "sentinel:*")[0]):
            kind = name.decode().split("}:", 1)[1].split(":", 1)[0]
            if kind in UNBOUNDED:
                continue
            life_s = cast("int", await self.lane.execute(name, "TTL", name))
            credit = kind == "account" and any(
                owed.charged < owed.acked + owed.dropped
                for owed in self.owed[name.decode().split("account:", 1)[1]].values()
            )
            assert life_s >= 0 or credit, name
        backlog = await self.queue.backlog(SHARD)
        assert (backlog.users, backlog.batches, backlog.dead_letters, backlog.leases) == (0, 0, 0, 0)


STEP_WEIGHTS: dict[Callable[[World], Awaitable[None]], int] = {
    World.step_admit: 10,
    World.step_time: 9,
    World.step_settle: 7,
    World.step_settle_again: 1,
    World.step_lose: 1,
    World.step_arrive: 1,
    World.step_extend: 2,
    World.step_reap: 2,
    World.step_work: 13,
    World.step_operator: 2,
    World.step_refresh: 8,
    World.step_governance: 1,
}


async def live(world: World, *, steps: int) -> None:
    """One run: `steps` random steps, checked after each, and then quiet."""
    await world.open()
    for _ in range(steps):
        (step,) = world.dice.choices(list(STEP_WEIGHTS), list(STEP_WEIGHTS.values()))
        await step(world)
        await world.check()
    await world.quiet()

"""The ledger under random interleavings of proxies, workers, refreshers, reapers and crashes, over the real scripts.

A reference model knows what was really used. At every step: nothing is admitted beyond a limit, `used` is never below
the truth, no counter but `pending` is negative; and when all is quiet Zion's books hold every unit exactly once.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sentinel_shared import keys
from sentinel_shared.accounts import Accounts, Cost, Freshness, Settlement, WindowPolicy
from sentinel_shared.contracts import LIMIT_NAMES, IncrementResult, LimitSnapshot, ResetPeriod
from sentinel_shared.usage_queue import Batch, UsageQueue
from tests.integration.ledger.conftest import ACCOUNT_SCRIPTS, QUEUE_SCRIPTS

EXAMPLES = int(os.environ.get("LEDGER_EXAMPLES", "500"))
STEPS = 45
FRESHNESS = Freshness(fresh_ms=60_000, stale_ms=60_000, idle_s=60)
OFF = WindowPolicy(0, 0, 0)
# So short that it turns several times within an example: its sub-buckets are 3 ms.
SHORT = WindowPolicy(36, 4, 0)
NUMBERS = itertools.count()
EARLIER = IncrementResult(applied=False, permanent=False, new_value=None, error="later")
NEVER = IncrementResult(applied=False, permanent=True, new_value=None, error="unknown")


@dataclass
class ModelZion:
    """Counts per limit; honours keys; can be silent after it has applied."""

    limits: dict[str, int]
    tells_new_value: bool
    used: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMIT_NAMES, 0))
    answers: dict[str, list[IncrementResult]] = field(default_factory=dict)

    def post(self, batch: Batch, dice: random.Random) -> list[IncrementResult]:
        if batch.batch_id not in self.answers:
            results = []
            for item in batch.increments():
                fate = dice.random()
                if fate < 0.8:
                    self.used[item.limit_name] += item.amount
                    new_value = self.used[item.limit_name] if self.tells_new_value else None
                    results.append(IncrementResult(applied=True, permanent=False, new_value=new_value, error=None))
                else:
                    results.append(EARLIER if fate < 0.95 else NEVER)
            self.answers[batch.batch_id] = results
        return self.answers[batch.batch_id]

    def snapshot(self) -> list[LimitSnapshot]:
        return [
            LimitSnapshot(name, self.limits[name], self.used[name], ResetPeriod.NEVER, None, None)
            for name in LIMIT_NAMES
        ]


@dataclass
class Request:
    """What the model knows of one admitted request. `charged` is what it has cost so far, by the books."""

    rid: str
    input_tokens: int
    granted: int
    lease_over: bool
    seen: int = 0
    settled: Settlement | None = None
    reaped: bool = False

    @property
    def charged(self) -> tuple[int, int, int]:
        if self.settled is not None:
            return (self.settled.requests, self.settled.input_tokens, self.settled.output_tokens)
        return (1, self.input_tokens, self.seen) if self.reaped else (0, 0, 0)

    @property
    def promised(self) -> tuple[int, int, int]:
        running = self.settled is None and not self.reaped
        return (1, self.input_tokens, self.granted) if running else (0, 0, 0)


class World:
    """One user, and everybody who touches the account."""

    def __init__(self, lane, seed: int, scripts=ACCOUNT_SCRIPTS, queue_scripts=QUEUE_SCRIPTS) -> None:
        self.dice = random.Random(seed)
        self.lane = lane
        self.user = f"user {next(NUMBERS)} {os.getpid()} {time.time_ns()}"
        self.shard = keys.shard_of(self.user)
        limits = {
            "ai_requests": self.dice.choice([0, 3, 8, 1000]),
            "ai_input_tokens": self.dice.choice([0, 100, 400, 100_000]),
            "ai_output_tokens": self.dice.choice([0, 100, 300, 100_000]),
        }
        self.zion = ModelZion(limits, tells_new_value=self.dice.random() < 0.5)
        self.window = self.dice.choice([OFF, OFF, SHORT])
        self.admitted_ms: list[int] = []
        self.accounts = Accounts(lane, scripts, window=self.window, lease_s=60)
        self.doomed = Accounts(lane, scripts, window=self.window, lease_s=0.001)
        self.queue = UsageQueue(lane, queue_scripts, idle_s=60)
        self.requests: list[Request] = []
        self.letters = 0
        self.batch: Batch | None = None
        self.refreshing: tuple[object, list[LimitSnapshot] | None] | None = None

    # --- the actors' steps ---

    async def begin(self) -> None:
        start = await self.accounts.refresh_begin(self.user)
        await self.commit(start, self.zion.snapshot())

    async def commit(self, start, snapshot) -> None:
        await self.accounts.refresh_commit(
            external_id=self.user,
            start=start,
            limits=snapshot,
            freshness=FRESHNESS,
            next_refresh_s=50,
            now_s=time.time(),
        )

    async def step_admit(self) -> None:
        lease_over = self.dice.random() < 0.3
        rid = f"r{next(NUMBERS)}-{os.getpid()}-{time.time_ns()}"
        choices = self.dice.choice([1, 1, 2, 3])
        wanted = self.dice.choice([-1, 0, 10 * choices, 60 * choices])
        cost = Cost(self.dice.randint(1, 40), wanted, 80 * choices, choices)
        decision = await (self.doomed if lease_over else self.accounts).admit(rid=rid, external_id=self.user, cost=cost)
        assert decision is not None
        if not decision.admitted:
            return
        self.admitted_ms.append(decision.now_ms)
        granted = decision.granted_output_tokens
        assert granted >= 0
        assert granted % choices == 0
        again = await self.accounts.admit(rid=rid, external_id=self.user, cost=cost)
        assert again is not None
        assert again.granted_output_tokens == granted
        self.requests.append(Request(rid, cost.input_tokens, granted, lease_over))
        totals = self.totals()
        for index, name in enumerate(LIMIT_NAMES):
            if index != 1:  # input may exceed by actual minus estimate, never at its admission by the estimate itself
                assert totals[index] <= self.zion.limits[name], (name, totals)

    def check_window(self) -> None:
        """Any true window holds at most the limit, by Redis's own time stamps."""
        if self.window.requests:
            for first, beyond in zip(self.admitted_ms, self.admitted_ms[self.window.requests :], strict=False):
                assert beyond - first >= self.window.window_ms - 1

    def totals(self) -> list[int]:
        """What was really used or is promised, per limit."""
        return [sum(r.charged[i] + r.promised[i] for r in self.requests) for i in range(3)]

    async def step_settle(self) -> None:
        running = [request for request in self.requests if request.settled is None]
        if not running:
            return
        request = self.dice.choice(running)
        refunded = self.dice.random() < 0.15
        settlement = Settlement(
            request.rid,
            self.user,
            0 if refunded else 1,
            0 if refunded else max(0, request.input_tokens + self.dice.randint(-5, 0)),
            0 if refunded else self.dice.randint(0, request.granted),
            "",
        )
        await self.accounts.settle(settlement)
        request.settled = settlement

    async def step_settle_again(self) -> None:
        settled = [request for request in self.requests if request.settled is not None]
        if settled:
            request = self.dice.choice(settled)
            assert request.settled is not None
            assert await self.accounts.settle(request.settled) == 0

    async def step_extend(self) -> None:
        running = [r for r in self.requests if r.settled is None and not r.reaped and not r.lease_over]
        if running:
            request = self.dice.choice(running)
            seen = self.dice.randint(0, request.granted)
            assert await self.accounts.extend(rid=request.rid, external_id=self.user, output_tokens_seen=seen)
            request.seen = seen

    async def step_reap(self) -> None:
        await asyncio.sleep(0.002)
        doomed = [r for r in self.requests if r.lease_over and r.settled is None and not r.reaped]
        while await self.queue.reap(self.shard, at_most=100):
            pass
        for request in doomed:
            request.reaped = True

    async def step_claim(self) -> None:
        if self.batch is None:
            self.batch = await self.queue.claim(
                self.shard, batch_id=f"b{next(NUMBERS)}-{os.getpid()}-{time.time_ns()}",
                users=100, items=1000, lease_s=0, gather_s=0, enough_users=1,
            )  # fmt: skip

    async def step_worker_dies(self) -> None:
        self.batch = None

    async def step_take_over(self) -> None:
        if self.batch is None:
            await asyncio.sleep(0.001)
            self.batch = await self.queue.lease(self.shard, lease_s=0)

    async def step_post(self) -> None:
        if self.batch is None:
            return
        results = self.zion.post(self.batch, self.dice)
        if self.dice.random() < 0.3:
            return  # applied, then silent: somebody sends the same bytes again
        assert await self.queue.ack(self.batch, results)
        assert not await self.queue.ack(self.batch, results)
        self.batch = None

    async def step_replay_letters(self) -> None:
        for letter in await self.queue.dead_letters():
            if letter.external_id == self.user and self.dice.random() < 0.5:
                assert await self.queue.replay(letter)
                assert not await self.queue.replay(letter)

    async def step_refresh(self) -> None:
        """One of the three steps of a refresh; everything else may happen in between."""
        if self.refreshing is None:
            self.refreshing = (await self.accounts.refresh_begin(self.user), None)
        elif self.refreshing[1] is None:
            self.refreshing = (self.refreshing[0], self.zion.snapshot())
        else:
            await self.commit(*self.refreshing)
            self.refreshing = None

    # --- what must hold ---

    async def check(self) -> None:
        view = await self.accounts.read(self.user)
        assert view is not None
        truth = [sum(request.charged[i] for request in self.requests) for i in range(3)]
        for index, (state, ledger) in enumerate(zip(view.limits, view.ledger, strict=True)):
            base, pending, inflight, dead = ledger
            assert state.used >= truth[index], (state, ledger, truth)
            assert min(base, inflight, dead, state.reserved) >= 0
            assert state.used == base + pending + inflight + dead
            assert state.reserved == sum(request.promised[index] for request in self.requests)

    async def quiet(self) -> None:
        """Everybody finishes: then Zion has it all, once."""
        for request in self.requests:
            request.lease_over = True
            if request.settled is None and not request.reaped:
                await self.accounts.settle(Settlement(request.rid, self.user, 1, request.input_tokens, 0, ""))
                request.settled = Settlement(request.rid, self.user, 1, request.input_tokens, 0, "")
        self.batch = None
        for _ in range(60):
            await asyncio.sleep(0.001)
            batch = await self.queue.lease(self.shard, lease_s=0) or await self.queue.claim(
                self.shard, batch_id=f"q{next(NUMBERS)}-{os.getpid()}-{time.time_ns()}",
                users=100, items=1000, lease_s=0, gather_s=0, enough_users=1,
            )  # fmt: skip
            if batch is not None:
                await self.queue.ack(batch, self.zion.post(batch, self.dice))
            letters = [letter for letter in await self.queue.dead_letters() if letter.external_id == self.user]
            for letter in letters:
                await self.queue.replay(letter)
            if batch is None and not letters:
                break
        view = await self.accounts.read(self.user)
        assert view is not None
        truth = [sum(request.charged[i] for request in self.requests) for i in range(3)]
        pending = [ledger[1] for ledger in view.ledger]
        assert all(credit <= 0 for credit in pending), "the queue is empty, but usage is still owed"
        assert [self.zion.used[name] + credit for name, credit in zip(LIMIT_NAMES, pending, strict=True)] == truth
        assert all(state.reserved == 0 for state in view.limits)
        assert all(ledger[2] == ledger[3] == 0 for ledger in view.ledger)


STEP_WEIGHTS = {
    World.step_admit: 8,
    World.step_settle: 6,
    World.step_settle_again: 2,
    World.step_extend: 2,
    World.step_reap: 2,
    World.step_claim: 4,
    World.step_worker_dies: 1,
    World.step_take_over: 2,
    World.step_post: 4,
    World.step_replay_letters: 1,
    World.step_refresh: 5,
}


async def live(world: World) -> None:
    await world.begin()
    for _ in range(STEPS):
        (step,) = world.dice.choices(list(STEP_WEIGHTS), list(STEP_WEIGHTS.values()))
        await step(world)
        await world.check()
        world.check_window()
    await world.quiet()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**62))
def test_whatever_the_order_nothing_is_lost_doubled_or_let_through(runner, lane, seed):
    runner.run(live(World(lane, seed)))


@pytest.mark.soak
@settings(
    max_examples=20 * EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**62))
def test_nor_in_a_much_longer_run(runner, lane, seed):
    runner.run(live(World(lane, seed)))


# --- the proof can fail: with a rule taken out it notices ---

TAKEN_OUT = {
    "a settled reservation is remembered": ("settle", "redis.call('SET', KEYS[6], '1', 'EX', ARGV[9])", ""),
    "what was reaped leaves a tombstone": (
        "reap",
        "redis.call('SET', ARGV[2] .. rid, struct.pack('<ddd', unpack(charge)), 'EX', ARGV[3])",
        "",
    ),
    "an ack puts its user back on the queue": ("ack", "if owed then", "if false then"),
    "a batch is acknowledged once": ("ack", "redis.call('DEL', KEYS[3])", ""),
    "what was confirmed during a refresh is added": (
        "refresh_commit",
        "since > 0 and math.max(answer, math.min(base, answer + since)) or answer",
        "answer",
    ),
    "the oldest bucket counts in full": (
        "admit",
        "a[W + 1] + a[W + 3] + 1 > window_requests",
        "a[W + 1] + a[W + 3] / 2 + 1 > window_requests",
    ),
    "reserved counts": ("admit", "left - a[at + RESERVED] < least", "left < least"),
    "inflight counts": ("admit", "a[at + PENDING] + a[at + INFLIGHT] + a[at + DEAD]", "a[at + PENDING]"),
}


@pytest.mark.parametrize("rule", TAKEN_OUT)
def test_the_proof_notices_when_a_rule_is_taken_out(runner, lane, rule):
    name, text, instead = TAKEN_OUT[rule]
    scripts = {one: getattr(ACCOUNT_SCRIPTS, one) for one in type(ACCOUNT_SCRIPTS).__slots__}
    queue_scripts = {one: getattr(QUEUE_SCRIPTS, one) for one in type(QUEUE_SCRIPTS).__slots__}
    owner = scripts if name in scripts else queue_scripts
    source = owner[name].source.decode()
    assert text in source, "the script no longer says so: take out the rule as it stands now"
    owner[name] = type(owner[name]).of(name, source.replace(text, instead).encode())
    with pytest.raises(AssertionError):  # noqa: PT012 - which of the seeds shows it is open
        for seed in range(400):
            world = World(lane, seed, type(ACCOUNT_SCRIPTS)(**scripts), type(QUEUE_SCRIPTS)(**queue_scripts))
            runner.run(live(world))

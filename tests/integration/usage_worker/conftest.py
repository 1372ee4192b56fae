"""The usage worker: its flusher tick by tick beside a Zion in this process, and as processes beside a real one."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prometheus_client import CollectorRegistry

from sentinel_dev.zion import DEMO_API_KEY, create_zion
from sentinel_shared import keys
from sentinel_shared.accounts import Accounts, AccountScripts, AccountView, Cost, Freshness, Settlement, WindowPolicy
from sentinel_shared.breaker import Breaker, ZionBudget
from sentinel_shared.clock import SystemClock
from sentinel_shared.contracts import LIMIT_NAMES, LimitSnapshot
from sentinel_shared.logging import StormGuard
from sentinel_shared.redis_lane import RedisLane
from sentinel_shared.usage_queue import QueueScripts, UsageQueue
from sentinel_shared.zion_client import ZionClient
from sentinel_usage_worker.delivery import Delivery
from sentinel_usage_worker.flush import SHARDS, Flusher
from sentinel_usage_worker.metrics import WorkerMetrics
from tests.support.redis_server import RedisServer
from tests.support.system import System, eventually

FRESHNESS = Freshness.of(cache_ttl_s=300, max_stale_s=300)
SCRIPTS = (*QueueScripts.load().all(), *AccountScripts.load().all())


class LeapingClock(SystemClock):
    """The machine's clock, whose monotonic time can be put ahead; leases are a matter of Redis's own."""

    ahead_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


@dataclass(frozen=True)
class Hand:
    """A worker without its process."""

    flusher: Flusher
    breaker: Breaker
    metrics: WorkerMetrics

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


class Ledger:
    """Accounts and queue in a real Redis, what proxies would do to them, and what was settled so far."""

    def __init__(self, lane: RedisLane, redis: RedisServer) -> None:
        self.lane = lane
        self.redis = redis
        self.queue = UsageQueue(lane, QueueScripts.load())
        self.accounts = Accounts(lane, AccountScripts.load(), window=WindowPolicy(0, 0, 0), lease_s=60)
        self.settled: dict[str, Counter[str]] = defaultdict(Counter)

    async def open_account(self, name: str, used: int = 0) -> None:
        """As a refresh does it."""
        await self.accounts.refresh_commit(
            external_id=name,
            start=await self.accounts.refresh_begin(name),
            limits=[LimitSnapshot(limit, None, used, None, None, None) for limit in LIMIT_NAMES],
            freshness=FRESHNESS,
            next_refresh_s=200,
            now_s=time.time(),
        )

    async def use(self, *names: str, input_tokens: int = 5, output_tokens: int = 7) -> None:
        """A request of each, admitted and settled."""
        amounts = (1, input_tokens, output_tokens)

        async def one(name: str) -> None:
            rid = uuid4().hex
            assert (await self.accounts.admit(rid=rid, external_id=name, cost=Cost(input_tokens, 0, 100))) is not None
            await self.accounts.settle(Settlement(rid, name, *amounts, ""))
            self.settled[name].update(dict(zip(LIMIT_NAMES, amounts, strict=True)))

        await asyncio.gather(*map(one, names))

    async def view(self, name: str) -> AccountView:
        view = await self.accounts.read(name)
        assert view is not None
        return view

    async def owed(self, name: str) -> dict[str, list[int]]:
        """Of each limit: pending, in flight, dead."""
        view = await self.view(name)
        return {
            state.name: [pending, inflight, dead]
            for state, (_, pending, inflight, dead) in zip(view.limits, view.ledger, strict=True)
        }

    async def waits(self) -> tuple[int, int]:
        """Users in the queue, open batches."""
        backlogs = [await self.queue.backlog(shard) for shard in range(SHARDS)]
        return sum(one.users for one in backlogs), sum(one.batches for one in backlogs)

    async def unaccounted(self) -> int:
        tokens = [await self.queue.unaccounted_tokens(shard, accounts_at_most=1_000) for shard in range(SHARDS)]
        return sum(one for one in tokens if one is not None)

    def batch_ids(self) -> list[str]:
        return [name for shard in range(SHARDS) for name in self.redis.ask("ZRANGE", keys.batches(shard), 0, -1)]

    def lapse_leases(self, *, at_most: int = 1_000) -> None:
        """As if time had passed: whoever holds a batch has died, or its back-off is over."""
        held = [
            (keys.batches(s), name) for s in range(SHARDS) for name in self.redis.ask("ZRANGE", keys.batches(s), 0, -1)
        ]
        for key, name in held[:at_most]:
            self.redis.ask("ZADD", key, "XX", 0, name)


class Bench(Ledger):
    """A ledger, a Zion in this process, and any number of hands. A test's faults are Zion's `state.faults`."""

    def __init__(self, lane: RedisLane, redis: RedisServer) -> None:
        super().__init__(lane, redis)
        self.zion = create_zion()
        self.clock = LeapingClock()
        self._clients: list[ZionClient] = []

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()

    def hand(self, *, idempotent: bool = True, backoff: float = 0.0, zion_url: str | None = None) -> Hand:
        """`backoff` 0: as short as it may be, 1: as long; `zion_url`: not this Zion."""
        metrics = WorkerMetrics(CollectorRegistry())
        breaker = Breaker(self.clock, random.Random(1))
        client = ZionClient(
            zion_url or "http://zion",
            DEMO_API_KEY,
            breaker=breaker,
            budget=ZionBudget(16, kept=1),
            clock=self.clock,
            timeout_s=0.5,
            transport=None if zion_url else httpx.ASGITransport(self.zion),
        )
        self._clients.append(client)
        storm = StormGuard(logging.getLogger("tests"), self.clock.monotonic_s)
        common: dict[str, Any] = {"clock": self.clock, "metrics": metrics, "storm": storm}
        delivery = Delivery(self.queue, client, self.accounts, idempotent=idempotent, **common)
        flusher = Flusher(
            self.queue,
            delivery,
            breaker,
            gather_s=0.0,
            items=1000,
            uniform=lambda least, most: least + backoff * (most - least),
            **common,
        )
        return Hand(flusher, breaker, metrics)

    async def users(self, number: int = 1, *, in_zion: bool = True) -> list[str]:
        """New ones, each with an account."""
        names = [f"u-{uuid4().hex[:10]}" for _ in range(number)]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.zion), base_url="http://zion") as admin:
            for name in names if in_zion else ():
                limits = dict.fromkeys(LIMIT_NAMES, 10**9)
                (await admin.post("/admin/users", json={"externalId": name, "limits": limits})).raise_for_status()
        await asyncio.gather(*map(self.open_account, names))
        return names

    def trouble(self, **rule: Any) -> None:
        """What Zion does, instead or as well, until `well`."""
        self.zion.state.faults.add(json.dumps({"route": "batch", **rule}).encode())

    def well(self) -> None:
        self.zion.state.faults.clear()

    def booked(self, name: str) -> dict[str, int]:
        totals = self.zion.state.books.totals
        return {limit: totals[name, limit].applied for limit in LIMIT_NAMES if (name, limit) in totals}

    def balanced(self) -> bool:
        """Zion's books have what was settled, no more and no less."""
        return all(self.booked(name) == dict(settled) for name, settled in self.settled.items())

    def calls(self, route: str = "batch") -> int:
        calls = self.zion.state.calls.get(route)
        return calls.count if calls else 0

    def keys_seen(self) -> set[str]:
        """Under which idempotency keys anything was applied."""
        return {entry["key"] for entry in self.zion.state.books.entries}

    async def tick(self, hand: Hand) -> None:
        """One tick, and all that it starts."""
        hand.flusher.flush()
        while hand.flusher._running:
            await self.turn()

    async def turn(self) -> None:
        """Lets the others run."""
        await asyncio.sleep(0.002)

    async def ticks_until(self, hand: Hand, what: Any, *, within_s: float = 10) -> None:
        """Ticks one after the other until `what()` is true."""
        deadline = time.monotonic() + within_s
        while True:
            await self.tick(hand)
            answer = what()
            if await answer if asyncio.iscoroutine(answer) else answer:
                return
            assert time.monotonic() < deadline, f"not within {within_s} s"
            await asyncio.sleep(0.01)

    async def settled_down(self, hand: Hand) -> None:
        """Ticks until nothing waits; then the books balance to the token."""

        async def nothing_waits() -> bool:
            return await self.waits() == (0, 0)

        await self.ticks_until(hand, nothing_waits)
        assert {name: self.booked(name) for name in self.settled} == {
            name: dict(settled) for name, settled in self.settled.items()
        }
        assert await self.unaccounted() == 0


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("usage-worker") / "redis") as server:
        yield server


@pytest.fixture
async def bench(redis_server):
    redis_server.ask("FLUSHALL")
    lane = await RedisLane.connect(redis_server.url, client_name="tests", scripts=SCRIPTS, command_timeout_s=5.0)
    one = Bench(lane, redis_server)
    yield one
    await one.close()
    await lane.close()


class Place(Ledger):
    """A ledger beside processes: Redis, Zion, workers. Its methods are for tests that are not coroutines."""

    def __init__(self, system: System, runner: asyncio.Runner) -> None:
        self.system = system
        self.run = runner.run
        lane = self.run(
            RedisLane.connect(system.redis.url, client_name="tests", scripts=SCRIPTS, command_timeout_s=5.0)
        )
        super().__init__(lane, system.redis)

    def fresh_start(self) -> None:
        for process in self.system.processes:
            if process.name.startswith("usage-worker"):
                process.kill()
        self.redis.ask("FLUSHALL")
        self.system.zion.post("/admin/reset")
        self.settled.clear()

    def workers(self, number: int = 1, **environ: str):
        return self.system.start_all(*["usage-worker"] * number, **{"USAGE_FLUSH_SECONDS": "0.1", **environ})

    def users(self, number: int = 1) -> list[str]:
        names = [self.system.add_user().external_id for _ in range(number)]
        for name in names:
            self.run(self.open_account(name))
        return names

    def trouble(self, **rule: Any) -> None:
        self.system.zion.post("/admin/faults", [{"route": "batch", **rule}])

    def well(self) -> None:
        httpx.delete(self.system.zion.url + "/admin/faults", timeout=5).raise_for_status()

    def calls(self, route: str = "batch") -> int:
        return int(self.system.zion.get("/admin/books").json()["calls"].get(route, 0))

    def booked(self) -> dict[str, dict[str, int]]:
        told = self.system.zion.get("/admin/books").json()["users"]
        return {
            name: {limit: told.get(name, {}).get(limit, {}).get("applied", 0) for limit in LIMIT_NAMES}
            for name in self.settled
        }

    def balances(self, *, within_s: float = 15) -> None:
        """Waits until Zion has all that was settled, and then not a token more."""
        settled = {name: dict(amounts) for name, amounts in self.settled.items()}
        eventually(self.booked, within_s=within_s, until=lambda booked: booked == settled)
        eventually(lambda: self.run(self.waits()), within_s=within_s, until=lambda waits: waits == (0, 0))
        assert self.booked() == settled
        assert self.run(self.unaccounted()) == 0

    def redis_answers(self) -> bool:
        """Whether our own lane is connected, and connects it again."""
        try:
            return self.run(self.lane.ping()) > 0
        except Exception:  # noqa: BLE001 - whatever is wrong with it
            return False


@pytest.fixture(scope="module")
def whole_place(tmp_path_factory):
    with asyncio.Runner() as runner, System(tmp_path_factory.mktemp("usage-worker") / "system") as system:
        one = Place(system, runner)
        yield one
        runner.run(one.lane.close())


@pytest.fixture
def place(whole_place):
    whole_place.fresh_start()
    yield whole_place
    whole_place.fresh_start()

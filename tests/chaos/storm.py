"""A storm: steady mixed load on the whole system while processes, Redis and Zion fail at random, from a seed.

Afterwards the books are compared request by request: the gateway's record, Sentinel's audit stream, Zion's ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import httpx
import msgspec
import redis

from sentinel_shared import keys
from tests.support.redis_server import RedisServer
from tests.support.system import LIMITS, Server, System, User, eventually

if TYPE_CHECKING:
    from pathlib import Path

USERS: Final = 6
CLIENTS: Final = 6
QUIET_WITHIN_S: Final = 60.0
MODELS: Final = (
    "openai/gpt-4o",
    "sim/slow-20ms",
    "sim/no-usage",
    "sim/usage-with-choices",
    "sim/many-events-per-write",
)
SERVICES: Final = ("proxy", "usage-worker", "limits-sync")
ZION_FAULTS: Final = (
    {"kind": "status", "status": 500},
    {"kind": "status", "status": 503},
    {"kind": "status", "status": 429, "retry_after": 1},
    {"kind": "status", "status": 400},
    {"kind": "delay", "seconds": 1.5},
    {"kind": "refuse"},
    {"kind": "applied_then_silent"},
    {"kind": "applied_then_silent", "hang": True},
    {"kind": "applied_then_silent", "status": 502},
    {"kind": "partial", "probability": 0.5},
    {"kind": "garbage"},
    {"kind": "missing_items"},
    {"kind": "no_batch"},
)
ENVIRON: Final = {
    "RESERVATION_LEASE_SECONDS": "2",
    "USAGE_FLUSH_SECONDS": "0.5",
    "CACHE_TTL_SECONDS": "5",
    "JWT_CACHE_TTL_SECONDS": "60",
    "DISCONNECT_DRAIN_SECONDS": "2",
    "SHUTDOWN_GRACE_SECONDS": "5",
    "LOG_LEVEL": "warning",
}


@dataclass
class Report:
    """What the storm did, and what the books say. `problems` is empty when they balance."""

    seed: int
    requests: int = 0
    complete: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    charged: int = 0
    reaped: int = 0
    zion_calls: int = 0
    unknown_outcomes: int = 0
    """How many POSTs at most ended without Zion's word."""
    doubled: Counter[str] = field(default_factory=Counter)
    """Units by limit that Zion has more than once: none, unless it does not honour keys."""
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        doubled = ", ".join(f"{count} {name}" for name, count in sorted(self.doubled.items())) or "0"
        verdict = self.problems or [f"the books balance: lost 0, doubled {doubled}"]
        return [
            f"seed {self.seed}: {self.requests} requests, {self.complete} complete, {self.refused} refused",
            f"faults: {faults}",
            f"audit: {self.charged} charged, {self.reaped} reaped only; {self.zion_calls} increment calls to Zion",
            *verdict,
        ]


class Storm:
    """One run. `run` returns the report; the same seed throws the same dice."""

    def __init__(self, system: System, *, seed: int, idempotent: bool, replica: RedisServer | None) -> None:
        self._system = system
        self._idempotent = idempotent
        self._replica = replica
        self._environ = ENVIRON | {
            "ZION_IDEMPOTENCY": "on" if idempotent else "off",
            "REDIS_WAIT_REPLICAS": "1" if replica else "0",
        }
        self._random = random.Random(seed)
        self._services: list[Server] = []
        self._users: list[User] = []
        self._complete: dict[str, str] = {}
        self._numbers = 0
        self._ending = False
        self.report = Report(seed)

    async def run(self, *, seconds: float) -> Report:
        """Start, load, break, quieten, compare."""
        await asyncio.to_thread(self._start)
        async with httpx.AsyncClient(timeout=15, limits=httpx.Limits(max_connections=50)) as http:
            clients = [
                asyncio.create_task(self._client(http, random.Random(f"{self.report.seed}-{n}")))
                for n in range(CLIENTS)
            ]
            until_s = time.monotonic() + seconds
            while time.monotonic() < until_s:
                await asyncio.sleep(self._random.uniform(0.3, 1.2))
                await asyncio.to_thread(self._break_something)
            self._ending = True
            await asyncio.gather(*clients)
        await asyncio.to_thread(self._quieten)
        await asyncio.to_thread(self._compare)
        return self.report

    def _start(self) -> None:
        self._system.zion.post("/admin/reset", {"honourKeys": self._idempotent})
        self._users = [self._system.add_user() for _ in range(USERS)]
        self._services = self._system.start_all(*SERVICES, *SERVICES, **self._environ)

    # --- load ---

    async def _client(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        while not self._ending:
            await asyncio.sleep(dice.uniform(0.0, 0.05))
            proxies = [server for server in self._services if server.name.startswith("proxy") and server.code is None]
            if proxies:
                await self._request(http, dice, dice.choice(proxies))

    async def _request(self, http: httpx.AsyncClient, dice: random.Random, proxy: Server) -> None:
        user = dice.choice(self._users)
        self._numbers += 1
        request_id = f"storm-{self.report.seed}-{self._numbers}"
        streamed, leaves = dice.random() < 0.5, dice.random() < 0.1
        body = {
            "model": dice.choice(MODELS),
            "user": user.external_id,
            "messages": [{"role": "user", "content": f"say {dice.randint(1, 40)} tokens"}],
            "stream": streamed,
        }
        headers = {**user.headers, "x-request-id": request_id}
        self.report.requests += 1
        try:
            async with http.stream("POST", f"{proxy.url}/v1/chat/completions", json=body, headers=headers) as answer:
                if answer.status_code != 200:
                    self.report.refused += 1
                    return
                text = b""
                async for piece in answer.aiter_bytes():
                    text += piece
                    if streamed and leaves:
                        return
        except httpx.HTTPError:
            return
        if (b"[DONE]" in text) if streamed else text.endswith(b"}"):
            self._complete[request_id] = user.external_id
            self.report.complete += 1

    # --- what breaks ---

    def _break_something(self) -> None:
        actions = (
            (self._kill, 3),
            (self._pause, 3),
            (self._restart, 1),
            (self._kill_redis, 1),
            (self._pause_redis, 1),
            (self._zion_fault, 4),
            (self._break_replica, 3 if self._replica else 0),
        )
        (action,) = self._random.choices([a for a, _ in actions], [weight for _, weight in actions])
        self.report.faults[action.__name__.strip("_")] += 1
        # Each of two workers sends four batches at once.
        self.report.unknown_outcomes += 8
        action()

    def _victim(self) -> int:
        return self._random.randrange(len(self._services))

    def _kill(self) -> None:
        at = self._victim()
        self._services[at].kill()
        self._replace(at)

    def _restart(self) -> None:
        at = self._victim()
        self._services[at].stop(within_s=30)
        self._replace(at)

    def _replace(self, at: int) -> None:
        service = self._services[at].name.rpartition("-")[0]
        self._services[at] = self._system.start(service, **self._environ)

    def _pause(self) -> None:
        server = self._services[self._victim()]
        server.pause()
        time.sleep(self._random.uniform(0.2, 3.0))
        server.resume()

    def _kill_redis(self) -> None:
        self._system.redis.kill()
        time.sleep(self._random.uniform(0.1, 1.0))
        self._system.redis.start()

    def _pause_redis(self) -> None:
        self._system.redis.pause()
        time.sleep(self._random.uniform(0.2, 1.5))
        self._system.redis.resume()

    def _break_replica(self) -> None:
        assert self._replica is not None
        if self._random.random() < 0.5:
            self._replica.restart()
        else:
            self._replica.pause()
            time.sleep(self._random.uniform(0.2, 3.0))
            self._replica.resume()

    def _zion_fault(self) -> None:
        fault = dict(self._random.choice(ZION_FAULTS))
        route = "batch" if fault["kind"] in {"partial", "missing_items", "no_batch", "applied_then_silent"} else "*"
        if fault.get("status") == 400:
            route = "batch"
        times = self._random.randint(1, 4)
        fault |= {"route": route, "times": times, "seed": self._random.randrange(1_000)}
        self.report.unknown_outcomes += times
        self._system.zion.post("/admin/faults", [fault])

    # --- quiet, then the books ---

    def _quieten(self) -> None:
        httpx.delete(self._system.zion.url + "/admin/faults", timeout=5).raise_for_status()
        for at, server in enumerate(self._services):
            if server.code is not None:
                self._replace(at)
        for server in self._services:
            server.until_ready()
        eventually(lambda: sum(self._owed().values()), within_s=QUIET_WITHIN_S, until=lambda owed: owed == 0)

    def _redis(self) -> redis.Redis:
        return redis.Redis.from_url(self._system.redis.url)

    def _owed(self) -> Counter[str]:
        """Everything that is not settled, sent and acknowledged yet."""
        owed: Counter[str] = Counter()
        with self._redis() as store:
            for shard in range(keys.SHARDS):
                owed["queued"] += store.zcard(keys.queue(shard))
                owed["reserved"] += store.zcard(keys.leases(shard))
                owed["in batches"] += store.zcard(keys.batches(shard))
        owed["spooled"] = sum(1 for _ in (self._system.folder / "spool").glob("*.spool"))
        return owed

    def _events(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        with self._redis() as store:
            for shard in range(keys.SHARDS):
                events += [msgspec.json.decode(entry[b"event"]) for _, entry in store.xrange(keys.audit(shard))]
        return events

    def _compare(self) -> None:
        problems = self.report.problems
        events = self._events()
        charged = {event["rid"]: event for event in events if event["outcome"] == "charged"}
        reaped = {e["rid"]: e for e in events if e["outcome"] == "reaped" and e["rid"] not in charged}
        self.report.charged, self.report.reaped = len(charged), len(reaped)
        by_request = Counter(event["request_id"] for event in events if event["outcome"] == "charged")
        problems += [f"{name} charged {times} times" for name, times in by_request.items() if times > 1]
        problems += self._against_the_gateway(list(charged.values()))
        problems += self._unbilled(by_request, reaped)
        sums: dict[str, Counter[str]] = defaultdict(Counter)
        for event in [*charged.values(), *reaped.values()]:
            amounts = (1, event.get("input_tokens", 0), event.get("output_tokens", 0))
            sums[event["external_id"]].update(dict(zip(LIMITS, amounts, strict=True)))
        for user in self._users:
            booked = self._system.booked(user)
            expected = {name: sums[user.external_id][name] for name in LIMITS}
            more = {name: booked[name] - expected[name] for name in LIMITS if booked[name] > expected[name]}
            self.report.doubled.update(more)
            if any(booked[name] < expected[name] for name in LIMITS) or (more and self._idempotent):
                problems.append(f"{user.external_id}: Zion has {booked}, Sentinel settled {expected}")
        problems += self._beyond_the_bound()
        unaccounted = {
            server.name: server.metric("sentinel_usage_unaccounted_tokens")
            for server in self._services
            if server.name.startswith("usage-worker")
        }
        problems += [f"{name}: {tokens} tokens unaccounted for" for name, tokens in unaccounted.items() if tokens]
        calls = self._system.zion.get("/admin/books").json()["calls"]
        self.report.zion_calls = sum(calls.get(route, 0) for route in ("batch", "increment"))

    def _beyond_the_bound(self) -> list[str]:
        """An unknown outcome doubles one batch at most."""
        posts: Counter[tuple[str, str]] = Counter()
        for entry in self._system.zion.get("/admin/ledger").json()["entries"]:
            posts[entry["key"].partition(":")[0], entry["limitName"]] += entry["amount"]
        largest = {name: max((units for (_, one), units in posts.items() if one == name), default=0) for name in LIMITS}
        return [
            f"{count} {name} doubled, {self.report.unknown_outcomes} unknown outcomes of batches up to {largest[name]}"
            for name, count in self.report.doubled.items()
            if count > self.report.unknown_outcomes * largest[name]
        ]

    def _against_the_gateway(self, charged: list[dict[str, Any]]) -> list[str]:
        """What the gateway finished and Sentinel heard to the end must be charged to the token."""
        told = self._system.gateway.get("/admin/requests").json()
        records = {record["id"]: record for record in told["requests"] if record["charged"]}
        problems = []
        for event in charged:
            record = records.get(event["request_id"])
            amounts = (event.get("input_tokens", 0), event.get("output_tokens", 0))
            heard = event["request_id"] in self._complete
            if heard and record and amounts != (record["input"], record["output"]):
                problems.append(
                    f"{event['request_id']}: gateway {record['input'], record['output']}, charged {amounts}"
                )
        return problems

    def _unbilled(self, by_request: Counter[str], reaped: dict[str, dict[str, Any]]) -> list[str]:
        """A complete answer is charged, or, where its proxy died before it could say so, reaped."""
        missing = Counter(user for name, user in self._complete.items() if name not in by_request)
        spare = Counter(event["external_id"] for event in reaped.values())
        return [
            f"{user}: {count} complete answers were not billed, {spare[user]} reaped"
            for user, count in missing.items()
            if count > spare[user]
        ]


async def storm(
    folder: Path, *, seed: int, seconds: float, idempotent: bool = True, with_replica: bool = False
) -> Report:
    """A whole run in a folder of its own, which keeps the logs; with a Zion that honours keys, or one that does not.

    With a replica settlements count once it has them; it is stopped and killed, too.
    """
    with System(folder) as system, contextlib.ExitStack() as stack:
        replica = None
        if with_replica:
            replica = RedisServer(folder / "replica", replicaof=f"127.0.0.1 {system.redis.port}")
            stack.enter_context(replica)
        return await Storm(system, seed=seed, idempotent=idempotent, replica=replica).run(seconds=seconds)

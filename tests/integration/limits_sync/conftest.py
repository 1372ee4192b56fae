"""limits-sync as processes, on a real Redis and a simulated Zion; the requests of users are scripts that we call."""

from __future__ import annotations

import asyncio
import time
from uuid import uuid4

import httpx
import pytest

from sentinel_shared import keys
from sentinel_shared.accounts import Accounts, AccountScripts, Cost, Freshness, Settlement, WindowPolicy
from sentinel_shared.contracts import LimitName, LimitSnapshot
from sentinel_shared.errors import RedisUnavailable
from sentinel_shared.redis_lane import RedisLane
from tests.support.system import System, eventually

KNOWN_LIMIT = 7
"""What accounts hold before the first refresh; Zion says `ZIONS_LIMIT`."""
ZIONS_LIMIT = 1_000


class Place:
    """A System without proxies, and what those would do: accounts committed, requests admitted, users marked as due."""

    def __init__(self, system: System, runner: asyncio.Runner) -> None:
        self.system = system
        self._runner = runner
        scripts = AccountScripts.load()
        self.lane = runner.run(
            RedisLane.connect(
                system.redis.url, client_name="limits-sync-tests", scripts=scripts.all(), command_timeout_s=5.0
            )
        )
        self.accounts = Accounts(self.lane, scripts, window=WindowPolicy(0, 0, 0), lease_s=60)

    def close(self) -> None:
        self._runner.run(self.lane.close())

    def fresh_start(self) -> None:
        for process in self.system.processes:
            if process.name.startswith("limits-sync"):
                process.kill()
        self.system.redis.ask("FLUSHALL")
        self.system.zion.post("/admin/reset")

    def sync(self, **environ):
        """A running limits-sync."""
        (server,) = self.system.start_all("limits-sync", **{"CACHE_TTL_SECONDS": "300", **environ})
        return server

    def users(self, number=1, *, in_zion=True, **known):
        """New ones, with an account each, as `commit` makes it."""
        names = [f"u-{uuid4().hex[:10]}" for _ in range(number)]
        for name in names:
            if in_zion:
                self.system.add_user({"ai_requests": ZIONS_LIMIT}, external_id=name)
        self._runner.run(self._commit_all(names, **known))
        return names

    async def _commit_all(self, names, **known):
        await asyncio.gather(*(self._commit(name, **known) for name in names))

    async def _commit(self, name, *, due_in_s=0.5, fresh_s=300.0, period_end_s=None):
        snapshot = LimitSnapshot(LimitName.REQUESTS, KNOWN_LIMIT, 0, None, None, period_end_s)
        await self.accounts.refresh_commit(
            external_id=name,
            start=await self.accounts.refresh_begin(name),
            limits=[snapshot],
            freshness=Freshness.of(cache_ttl_s=fresh_s, max_stale_s=86_400),
            next_refresh_s=due_in_s,
            now_s=time.time(),
        )

    def use(self, names):
        """A request of each; whether it met limits that were not fresh any more."""

        async def one(name):
            rid = uuid4().hex
            decision = await self.accounts.admit(rid=rid, external_id=name, cost=Cost(1, 0, 100))
            await self.accounts.settle(Settlement(rid, name, 0, 0, 0, ""))
            return decision is None or decision.refresh_due

        async def all_of_them():
            return await asyncio.gather(*(one(name) for name in names))

        return self._runner.run(all_of_them())

    def mark_due(self, name):
        """As the proxy does when Zion's webhook comes."""
        self._runner.run(self.accounts.mark_due(name, now_s=time.time()))

    def redis_answers(self):
        """Whether our own lane is connected."""
        try:
            return self._runner.run(self.lane.ping())
        except RedisUnavailable:
            return None

    def view(self, name):
        return self._runner.run(self.accounts.read(name))

    def limit(self, name):
        view = self.view(name)
        return view and view.limits[0].limit

    def due_in_s(self, name):
        """None: not on the list."""
        score = self.system.redis.ask("ZSCORE", keys.due(keys.shard_of(name)), name)
        return None if score is None else float(score) / 1000 - time.time()

    def refreshed(self, names, *, within_s=20):
        """Waits until all of them have what Zion says."""
        eventually(
            lambda: [name for name in names if self.limit(name) != ZIONS_LIMIT],
            within_s=within_s,
            until=lambda missing: not missing,
        )

    def gets(self):
        """How often Zion was asked about whom."""
        return self.system.zion.get("/admin/calls").json().get("limits", {}).get("users", {})

    def trouble(self, **rule):
        """What Zion does instead of answering, until `well`."""
        self.system.zion.post("/admin/faults", [{"route": "limits", **rule}])

    def well(self):
        httpx.delete(self.system.zion.url + "/admin/faults", timeout=5).raise_for_status()


@pytest.fixture(scope="module")
def whole_place(tmp_path_factory):
    with asyncio.Runner() as runner, System(tmp_path_factory.mktemp("sync")) as system:
        one = Place(system, runner)
        yield one
        one.close()


@pytest.fixture
def place(whole_place):
    whole_place.fresh_start()
    yield whole_place
    whole_place.fresh_start()

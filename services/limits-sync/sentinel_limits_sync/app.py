"""The limits sync put together: rounds over the refresh lists, and the status server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from sentinel_limits_sync.metrics import SyncMetrics
from sentinel_limits_sync.rounds import SHARDS, Rounds
from sentinel_shared.accounts import Accounts, AccountScripts, Freshness, WindowPolicy
from sentinel_shared.breaker import Breaker, BreakerState, ZionBudget
from sentinel_shared.clock import SystemClock
from sentinel_shared.directory import Directory
from sentinel_shared.errors import RedisUnavailable, SentinelError
from sentinel_shared.logging import StormGuard
from sentinel_shared.metrics import exposition, new_registry
from sentinel_shared.redis_lane import RedisLane
from sentinel_shared.refresh import LimitsRefresher
from sentinel_shared.signals import stop_signal
from sentinel_shared.status_server import Health, StatusPages, StatusServer, listen, status_app
from sentinel_shared.zion_client import ZionClient

if TYPE_CHECKING:
    from sentinel_limits_sync.settings import Settings

_GAUGES_EVERY_S: Final = 1.0

_log: Final = logging.getLogger(__name__)


async def run(settings: Settings) -> int:
    """Work until SIGTERM: lease nothing more, finish what is under way, end with 0. Twice: end at once.

    Raises RedisUnavailable or RedisRefused when Redis cannot be used at the start; later on it is waited for.
    """
    async with AsyncExitStack() as stack:
        clock = SystemClock()
        metrics = SyncMetrics(new_registry())
        breaker = Breaker(clock, random.Random())  # noqa: S311 - jitter
        storm = StormGuard(_log, clock.monotonic_s)
        stopping = stop_signal()
        lanes: list[RedisLane] = []

        async def redis() -> float:
            if not lanes:
                raise RedisUnavailable("not connected yet")
            return await lanes[0].ping()

        health = Health({"redis": redis}, needed=["redis"], version=version("sentinel-limits-sync"), clock=clock)
        pages = StatusPages(health, lambda: exposition(metrics.registry, os.environ))
        await stack.enter_async_context(StatusServer(status_app(pages), listen(settings.host, settings.port)))
        lane = await RedisLane.connect(
            settings.redis_url,
            client_name="sentinel-limits-sync",
            scripts=AccountScripts.load().all(),
            command_timeout_s=1.0,
            tls_ca_file=str(settings.redis_ca_file) if settings.redis_ca_file else None,
        )
        lanes.append(lane)
        stack.push_async_callback(lane.close)
        zion = ZionClient(
            settings.zion_api_url,
            settings.zion_api_key.reveal(),
            breaker=breaker,
            budget=ZionBudget(settings.zion_max_concurrency, kept=0),
            clock=clock,
        )
        stack.push_async_callback(zion.aclose)
        accounts = Accounts(lane, AccountScripts.load(), window=WindowPolicy(0, 0, 0), lease_s=60)
        freshness = Freshness.of(cache_ttl_s=settings.cache_ttl_s, max_stale_s=settings.limits_max_stale_s)
        rounds = Rounds(
            accounts,
            LimitsRefresher(accounts, Directory(lane), zion, freshness=freshness, clock=clock),
            breaker,
            most_at_once=settings.zion_max_concurrency,
            idle_s=2 * settings.cache_ttl_s,
            clock=clock,
            metrics=metrics,
            storm=storm,
        )
        going = asyncio.create_task(rounds.run())
        gauges = asyncio.create_task(_keep_gauges(accounts, metrics, breaker, clock))
        await stopping.wait()
        health.draining = True
        for task in (going, gauges):
            task.cancel()
        await asyncio.gather(going, gauges, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.shutdown_grace_s):
                await rounds.drain()
    return 0


async def _keep_gauges(accounts: Accounts, metrics: SyncMetrics, breaker: Breaker, clock: SystemClock) -> None:
    while True:
        with contextlib.suppress(SentinelError):
            lists = await asyncio.gather(*(accounts.refresh_list(shard) for shard in range(SHARDS)))
            metrics.users.set(sum(users for users, _ in lists))
            due_s = min((due_s for _, due_s in lists if due_s is not None), default=clock.unix_s())
            metrics.lateness.set(max(0.0, clock.unix_s() - due_s))
        metrics.breaker_open.labels("zion").set(breaker.state is not BreakerState.CLOSED)
        await clock.sleep(_GAUGES_EVERY_S)

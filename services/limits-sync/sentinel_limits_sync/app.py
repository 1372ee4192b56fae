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
from sentinel_shared.errors import RedisUnavailable, SentinelError, ZionUnavailable
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
_CALLS_PER_CLIENT: Final = 64

_log: Final = logging.getLogger(__name__)


async def run(settings: Settings) -> int:
    """Work until SIGTERM: lease nothing more, finish what is under way, end with 0. Twice: end at once.

    Raises RedisUnavailable or RedisRefused when Redis cannot be used at the start; later on it is waited for.
    """
    async with AsyncExitStack() as stack:
        clock = SystemClock()
        metrics = SyncMetrics(new_registry())
        breaker = Breaker(clock, random.Random())  # noqa: S311 - jitter
        stopping = stop_signal()
        lanes: list[RedisLane] = []
        health = _health(lanes, breaker, metrics, clock)
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
        accounts = Accounts(lane, AccountScripts.load(), window=WindowPolicy(0, 0, 0), lease_s=60)
        freshness = Freshness.of(cache_ttl_s=settings.cache_ttl_s, max_stale_s=settings.limits_max_stale_s)
        clients = [await stack.enter_async_context(client) for client in _clients(settings, breaker, clock)]
        rounds = Rounds(
            accounts,
            [LimitsRefresher(accounts, Directory(lane), zion, freshness=freshness, clock=clock) for zion in clients],
            breaker,
            most_at_once=settings.zion_max_concurrency,
            fresh_s=settings.cache_ttl_s,
            clock=clock,
            metrics=metrics,
            storm=StormGuard(_log, clock.monotonic_s),
        )
        async with asyncio.TaskGroup() as group:  # a loop that breaks ends the process: its supervisor starts another
            going = [
                group.create_task(rounds.run()),
                group.create_task(_keep_gauges(lane, accounts, metrics, breaker, clock)),
                group.create_task(health.watch(metrics.ready.set)),
            ]
            await stopping.wait()
            health.draining = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.shutdown_grace_s):
                    await rounds.drain()
            for task in going:
                task.cancel()
    return 0


def _clients(settings: Settings, breaker: Breaker, clock: SystemClock) -> list[ZionClient]:
    """Several, each with its part of the calls: httpx looks through its whole pool at every call."""
    number = -(-settings.zion_max_concurrency // _CALLS_PER_CLIENT)
    slots = settings.zion_max_concurrency // number
    return [
        ZionClient(
            settings.zion_api_url,
            settings.zion_api_key.reveal(),
            breaker=breaker,
            budget=ZionBudget(slots, kept=0),
            clock=clock,
        )
        for _ in range(number)
    ]


def _health(lanes: list[RedisLane], breaker: Breaker, metrics: SyncMetrics, clock: SystemClock) -> Health:
    """`lanes` is empty until Redis is connected. Zion being away only degrades: accounts serve stale limits."""

    async def redis() -> float:
        if not lanes:
            raise RedisUnavailable("not connected yet")
        return await lanes[0].ping()

    async def zion() -> float:
        if breaker.state is not BreakerState.CLOSED:
            raise ZionUnavailable("its breaker is open")
        return 0.0

    return Health(
        {"redis": redis, "zion": zion},
        needed=["redis"],
        version=version("sentinel-limits-sync"),
        clock=clock,
        stats=metrics.stats,
    )


async def _keep_gauges(
    lane: RedisLane, accounts: Accounts, metrics: SyncMetrics, breaker: Breaker, clock: SystemClock
) -> None:
    while True:
        if lane.connected:
            with contextlib.suppress(SentinelError):
                lists = await asyncio.gather(*(accounts.refresh_list(shard) for shard in range(SHARDS)))
                metrics.users.set(sum(users for users, _ in lists))
                due_s = min((due_s for _, due_s in lists if due_s is not None), default=clock.unix_s())
                metrics.lateness.set(max(0.0, clock.unix_s() - due_s))
        metrics.breaker_open.labels("zion").set(breaker.state is not BreakerState.CLOSED)
        await clock.sleep(_GAUGES_EVERY_S)

"""The usage worker put together: arq ticks, the flusher works. arq is the runtime, never the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import socket
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, cast

from arq.connections import ArqRedis
from arq.cron import cron
from arq.worker import Worker

from sentinel_shared.accounts import Accounts, AccountScripts, Freshness, WindowPolicy
from sentinel_shared.breaker import Breaker, BreakerState, ZionBudget
from sentinel_shared.clock import SystemClock
from sentinel_shared.errors import RedisUnavailable, SentinelError
from sentinel_shared.logging import StormGuard
from sentinel_shared.metrics import exposition, new_registry
from sentinel_shared.redis_lane import RedisLane
from sentinel_shared.signals import stop_signal
from sentinel_shared.status_server import Health, StatusPages, StatusServer, listen, status_app
from sentinel_shared.usage_queue import QueueScripts, UsageQueue
from sentinel_shared.zion_client import ZionClient
from sentinel_usage_worker.flush import SHARDS, Flusher
from sentinel_usage_worker.metrics import WorkerMetrics

if TYPE_CHECKING:
    from sentinel_usage_worker.settings import Settings

QUEUE_NAME: Final = "sentinel:arq:usage"
_TICK_TIMEOUT_S: Final = 25
_POST_TIMEOUT_S: Final = 8.0
_GAUGES_EVERY_S: Final = 1.0

_log: Final = logging.getLogger(__name__)


async def connect(settings: Settings) -> RedisLane:
    """The lane to the ledger's Redis. Raises RedisUnavailable, RedisRefused."""
    return await RedisLane.connect(
        settings.redis_url,
        client_name="sentinel-usage-worker",
        scripts=[*QueueScripts.load().all(), *AccountScripts.load().all()],
        command_timeout_s=1.0,
        tls_ca_file=str(settings.redis_ca_file) if settings.redis_ca_file else None,
    )


def queue_of(settings: Settings, lane: RedisLane) -> UsageQueue:
    """The usage queue through a lane."""
    freshness = Freshness.of(cache_ttl_s=settings.cache_ttl_s, max_stale_s=settings.limits_max_stale_s)
    return UsageQueue(lane, QueueScripts.load(), idle_s=freshness.idle_s, wait_replicas=settings.redis_wait_replicas)


async def run(settings: Settings) -> int:
    """Work until SIGTERM: claim nothing more, finish the batch under way, book it, end with 0. Twice: end at once.

    Raises RedisUnavailable or RedisRefused when Redis cannot be used at the start; later on it is waited for.
    """
    async with AsyncExitStack() as stack:
        clock = SystemClock()
        metrics = WorkerMetrics(new_registry())
        stopping = stop_signal()
        parts: dict[str, Any] = {}

        async def redis() -> float:
            if "lane" not in parts:
                raise RedisUnavailable("not connected yet")
            return float(await parts["lane"].ping())

        async def arq() -> float:
            if not parts.get("arq"):
                raise RedisUnavailable("arq is not running")
            return 0.0

        breaker = Breaker(clock, random.Random())  # noqa: S311 - jitter
        health = Health(
            {"redis": redis, "arq": arq},
            needed=["redis", "arq"],
            version=version("sentinel-usage-worker"),
            clock=clock,
        )
        pages = StatusPages(health, lambda: exposition(metrics.registry, os.environ))
        await stack.enter_async_context(StatusServer(status_app(pages), listen(settings.host, settings.port)))
        storm = StormGuard(_log, clock.monotonic_s)
        lane = await connect(settings)
        stack.push_async_callback(lane.close)
        parts["lane"] = lane
        slots = settings.zion_max_concurrency
        zion = ZionClient(
            settings.zion_api_url,
            settings.zion_api_key.reveal(),
            breaker=breaker,
            budget=ZionBudget(slots, kept=1),
            clock=clock,
            timeout_s=_POST_TIMEOUT_S,
        )
        stack.push_async_callback(zion.aclose)
        queue = queue_of(settings, lane)
        flusher = Flusher(
            queue,
            zion,
            breaker,
            Accounts(lane, AccountScripts.load(), window=WindowPolicy(0, 0, 0), lease_s=60),
            gather_s=settings.usage_flush_s,
            items=settings.usage_batch_items,
            idempotent=settings.zion_idempotency,
            clock=clock,
            metrics=metrics,
            storm=storm,
        )
        gauges = asyncio.create_task(_keep_gauges(queue, metrics, breaker, clock))
        ticking = asyncio.create_task(_tick(settings, flusher, parts, storm, clock))
        await stopping.wait()
        health.draining = True
        flusher.stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.shutdown_grace_s):
                await flusher.idle()
        for task in (ticking, gauges):
            task.cancel()
        await asyncio.gather(ticking, gauges, return_exceptions=True)
    return 0


async def _tick(
    settings: Settings, flusher: Flusher, parts: dict[str, Any], storm: StormGuard, clock: SystemClock
) -> None:
    """Arq's worker ends with its Redis connection: start it anew, with a pause that grows and is jittered."""
    pause_s = 0.1
    while True:
        began_s = clock.monotonic_s()
        try:
            await _run_arq(settings, flusher, parts)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever ended arq must not end this process
            storm.log_once_per_s(logging.WARNING, "arq", f"arq stopped and is started again: {type(error).__name__}")
        finally:
            parts["arq"] = False
        pause_s = 0.1 if clock.monotonic_s() - began_s > 10 else min(5.0, pause_s * 2)
        await clock.sleep(random.uniform(pause_s / 2, pause_s))  # noqa: S311 - jitter


async def _run_arq(settings: Settings, flusher: Flusher, parts: dict[str, Any]) -> None:
    async def flush(_ctx: dict[Any, Any]) -> None:
        await _quietly(flusher.flush())

    async def reap(_ctx: dict[Any, Any]) -> None:
        await _quietly(flusher.reap())

    pool = ArqRedis.from_url(settings.arq_redis_url, socket_timeout=5, socket_connect_timeout=2)
    pool.job_serializer = _dumps
    pool.job_deserializer = json.loads
    pool.default_queue_name = QUEUE_NAME
    replica = f"{socket.gethostname()}:{os.getpid()}"
    every_second = set(range(60))
    worker = Worker(
        cron_jobs=[
            cron(
                cast("Any", flush),
                name="flush",
                second=every_second,
                unique=True,
                timeout=_TICK_TIMEOUT_S,
                keep_result=0,
            ),
            cron(
                cast("Any", reap), name="reap", second=every_second, unique=True, timeout=_TICK_TIMEOUT_S, keep_result=0
            ),
        ],
        redis_pool=pool,
        queue_name=QUEUE_NAME,
        handle_signals=False,
        max_jobs=64,
        keep_result=0,
        poll_delay=0.2,
        max_tries=1,
        health_check_interval=10,
        health_check_key=f"{QUEUE_NAME}:health:{replica}",
        job_serializer=_dumps,
        job_deserializer=json.loads,
        log_results=False,
    )
    parts["arq"] = True
    try:
        await worker.async_run()
    finally:
        with contextlib.suppress(Exception):
            await worker.close()


async def _quietly(work: Any) -> None:
    """What was foreseen is no failed job: it is told by metrics and one line a second."""
    try:
        await work
    except SentinelError as error:
        _log.info("a tick did not get through: %s", error)


def _dumps(job: Any) -> bytes:
    return json.dumps(job, default=str).encode()


async def _keep_gauges(queue: UsageQueue, metrics: WorkerMetrics, breaker: Breaker, clock: SystemClock) -> None:
    while True:
        with contextlib.suppress(SentinelError):
            backlogs = [await queue.backlog(shard) for shard in range(SHARDS)]
            metrics.queue_depth.set(sum(b.users for b in backlogs))
            oldest_ms = min((b.oldest_ms for b in backlogs if b.oldest_ms), default=None)
            metrics.oldest_age.set(0 if oldest_ms is None else max(0.0, clock.unix_s() - oldest_ms / 1000))
            metrics.open_batches.set(sum(b.batches for b in backlogs))
            metrics.dead_letters.set(sum(b.dead_letters for b in backlogs))
            metrics.reservations.set(sum(b.leases for b in backlogs))
            unaccounted = [await queue.unaccounted_tokens(shard, accounts_at_most=2_000) for shard in range(SHARDS)]
            if None not in unaccounted:
                metrics.unaccounted.set(sum(tokens for tokens in unaccounted if tokens is not None))
        metrics.breaker_open.labels("zion").set(breaker.state is not BreakerState.CLOSED)
        await clock.sleep(_GAUGES_EVERY_S)

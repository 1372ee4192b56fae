"""The usage worker put together: arq ticks, the flusher works. arq is the runtime, never the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import random
import signal
import socket
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, cast

from arq.connections import ArqRedis, Sentinel  # type: ignore[attr-defined]  # arq's own way to Redis Sentinel
from arq.cron import cron
from arq.worker import Worker

from sentinel_shared.accounts import Accounts, AccountScripts, WindowPolicy
from sentinel_shared.breaker import Breaker, BreakerState, ZionBudget
from sentinel_shared.clock import SystemClock
from sentinel_shared.errors import RedisUnavailable, SentinelError, ZionUnavailable
from sentinel_shared.logging import StormGuard
from sentinel_shared.metrics import exposition, new_registry
from sentinel_shared.redis_lane import RedisLane
from sentinel_shared.redis_lane.url import Kind, parse_url
from sentinel_shared.signals import stop_signal
from sentinel_shared.status_server import Health, StatusPages, StatusServer, listen, status_app
from sentinel_shared.usage_queue import QueueScripts, UsageQueue
from sentinel_shared.zion_client import ZionClient
from sentinel_usage_worker.delivery import POST_TIMEOUT_S, Delivery
from sentinel_usage_worker.flush import SHARDS, Flusher
from sentinel_usage_worker.metrics import WorkerMetrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection

    from sentinel_shared.clock import Clock
    from sentinel_usage_worker.settings import Settings

QUEUE_NAME: Final = "sentinel:arq:usage"
_TICK_TIMEOUT_S: Final = 10
_GAUGES_EVERY_S: Final = 1.0
_CONSERVED_SHARDS_A_ROUND: Final = 2
_CONSERVED_ACCOUNTS_MOST: Final = 2_000
_STEADY_AFTER_S: Final = 10.0
_ARQ_TIMEOUTS: Final[dict[str, Any]] = {"socket_timeout": 5.0, "socket_connect_timeout": 2.0}
_ARQ_CLOSE_WITHIN_S: Final = 2.0
_HEALTH_CACHE_S: Final = 0.5

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
    return UsageQueue(lane, QueueScripts.load(), wait_replicas=settings.redis_wait_replicas)


async def run(settings: Settings) -> int:
    """Work until SIGTERM: claim nothing more, finish the batch under way, book it, end with 0. Twice: end at once.

    Raises RedisUnavailable or RedisRefused when Redis cannot be used at the start; later on it is waited for.
    """
    async with AsyncExitStack() as stack:
        clock = SystemClock()
        metrics = WorkerMetrics(new_registry())
        breaker = Breaker(clock, random.Random())  # noqa: S311 - jitter
        storm = StormGuard(_log, clock.monotonic_s)
        stopping = stop_signal()
        lanes: list[RedisLane] = []
        ticks = Ticks(settings, clock, storm)
        health = _health(lanes, ticks, breaker, metrics, clock)
        pages = StatusPages(health, lambda: exposition(metrics.registry, os.environ))
        await stack.enter_async_context(StatusServer(status_app(pages), listen(settings.host, settings.port)))
        lane = await connect(settings)
        stack.push_async_callback(lane.close)
        lanes.append(lane)
        zion = await stack.enter_async_context(
            ZionClient(
                settings.zion_api_url,
                settings.zion_api_key.reveal(),
                breaker=breaker,
                budget=ZionBudget(settings.zion_max_concurrency, kept=1),
                clock=clock,
                timeout_s=POST_TIMEOUT_S,
            )
        )
        queue = queue_of(settings, lane)
        accounts = Accounts(lane, AccountScripts.load(), window=WindowPolicy(0, 0, 0), lease_s=60)
        delivery = Delivery(
            queue, zion, accounts, idempotent=settings.zion_idempotency, clock=clock, metrics=metrics, storm=storm
        )
        flusher = Flusher(
            queue,
            delivery,
            breaker,
            gather_s=settings.usage_flush_s,
            items=settings.usage_batch_items,
            clock=clock,
            metrics=metrics,
            storm=storm,
        )
        async with asyncio.TaskGroup() as group:  # a loop that breaks ends the process: its supervisor starts another
            going = [
                group.create_task(ticks.run(flusher)),
                group.create_task(_keep_gauges(lane, queue, metrics, breaker, clock)),
                group.create_task(health.watch(metrics.ready.set)),
            ]
            await stopping.wait()
            health.draining = True
            await flusher.stop(within_s=settings.shutdown_grace_s)
            await _end(going)
    return 0


async def _end(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancelled until they are over: arq loses a cancellation now and then, while Redis is being lost."""
    while tasks:
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=_ARQ_CLOSE_WITHIN_S + 1)


class Ticks:
    """arq's crons, every second one tick to flush and one to reap, each for one of all replicas."""

    def __init__(self, settings: Settings, clock: Clock, storm: StormGuard) -> None:
        self.running = False
        self._settings = settings
        self._clock = clock
        self._storm = storm

    async def run(self, flusher: Flusher) -> None:
        """Until cancelled. arq's worker ends with its Redis connection: it is started anew, ever later, with jitter."""
        pause_s = 0.1
        while True:
            began_s = self._clock.monotonic_s()
            try:
                await self._run_worker(flusher)
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) is None or task.cancelling():
                    raise  # else a job of arq's was cancelled, not this task
            except Exception as error:  # noqa: BLE001 - whatever ended arq must not end this process
                kind = type(error).__name__
                self._storm.log_once_per_s(logging.WARNING, "arq", f"arq stopped and is started again: {kind}")
            steady = self._clock.monotonic_s() - began_s > _STEADY_AFTER_S
            pause_s = 0.1 if steady else min(5.0, pause_s * 2)
            await self._clock.sleep(random.uniform(pause_s / 2, pause_s))  # noqa: S311 - jitter

    async def _run_worker(self, flusher: Flusher) -> None:
        async def flush(_ctx: dict[Any, Any]) -> None:
            # Not awaited: what is being sent must not end with arq's connection, nor with a job's time-out.
            flusher.flush()

        async def reap(_ctx: dict[Any, Any]) -> None:
            try:
                await flusher.reap()
            except SentinelError as error:
                self._storm.log_once_per_s(logging.WARNING, "reap", f"reservations could not be reaped: {error}")

        async def started(_ctx: dict[Any, Any]) -> None:
            self.running = True

        async with _arq_pool(self._settings) as pool:
            health_key = f"{QUEUE_NAME}:health:{socket.gethostname()}:{os.getpid()}"
            worker = Worker(
                cron_jobs=[_every_second("flush", flush), _every_second("reap", reap)],
                redis_pool=pool,
                queue_name=QUEUE_NAME,
                handle_signals=False,
                on_startup=cast("Any", started),
                max_jobs=64,
                keep_result=0,
                poll_delay=0.2,
                health_check_interval=10,
                health_check_key=health_key,
                job_serializer=_dumps,
                job_deserializer=json.loads,
                log_results=False,
            )
            try:
                await worker.async_run()
            finally:
                self.running = False
                # Not by the worker's own `close`: a job that is cancelled in it would pass for a cancellation of ours.
                worker.handle_sig(signal.SIGUSR1)
                await asyncio.gather(*worker.tasks.values(), return_exceptions=True)
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(_ARQ_CLOSE_WITHIN_S):
                        await pool.delete(health_key)


def _every_second(name: str, work: Callable[[dict[Any, Any]], Awaitable[None]]) -> Any:
    return cron(
        cast("Any", work),
        name=f"sentinel:usage:{name}",
        second=set(range(60)),
        unique=True,
        timeout=_TICK_TIMEOUT_S,
        keep_result=0,
    )


@asynccontextmanager
async def _arq_pool(settings: Settings) -> AsyncIterator[ArqRedis]:
    """Connections with time-outs, which arq's own settings lack; JSON, for pickle executes what it reads."""
    where = parse_url(settings.arq_redis_url)
    options: dict[str, Any] = {
        "db": where.db,
        "username": where.username,
        "password": where.password,
        "ssl": where.tls,
        **_ARQ_TIMEOUTS,
    }
    if where.tls:
        ca_file = str(settings.redis_ca_file) if settings.redis_ca_file else None
        options |= {"ssl_check_hostname": True, "ssl_ca_certs": ca_file}
    finders: list[Any] = []
    address = where.addresses[0]
    if where.kind is Kind.SENTINEL:
        sentinel = Sentinel(where.addresses, sentinel_kwargs=_ARQ_TIMEOUTS, **options)  # type: ignore[no-untyped-call]
        finders = sentinel.sentinels
        pool = sentinel.master_for(where.service or "", redis_class=ArqRedis)
    elif address.port is None:
        pool = ArqRedis(unix_socket_path=address.host, **options)
    else:
        pool = ArqRedis(host=address.host, port=address.port, **options)
    pool.job_serializer, pool.job_deserializer = _dumps, json.loads
    pool.default_queue_name = QUEUE_NAME
    try:
        yield pool
    finally:
        for client in (pool, *finders):
            with contextlib.suppress(Exception):
                await client.aclose(close_connection_pool=True)


def _dumps(job: Any) -> bytes:
    return json.dumps(job, default=str).encode()


def _health(lanes: list[RedisLane], ticks: Ticks, breaker: Breaker, metrics: WorkerMetrics, clock: Clock) -> Health:
    """`lanes` is empty until Redis is connected. Zion being away only degrades: usage waits."""

    async def redis() -> float:
        if not lanes:
            raise RedisUnavailable("not connected yet")
        return await lanes[0].ping()

    async def arq() -> float:
        if not ticks.running:
            raise RedisUnavailable("arq is not running")
        return 0.0

    async def zion() -> float:
        if breaker.state is not BreakerState.CLOSED:
            raise ZionUnavailable("its breaker is open")
        return 0.0

    return Health(
        {"redis": redis, "arq": arq, "zion": zion},
        needed=["redis", "arq"],
        version=version("sentinel-usage-worker"),
        clock=clock,
        stats=metrics.stats,
        cache_s=_HEALTH_CACHE_S,
    )


async def _keep_gauges(
    lane: RedisLane, queue: UsageQueue, metrics: WorkerMetrics, breaker: Breaker, clock: Clock
) -> None:
    unaccounted: dict[int, float] = {}
    shard = 0
    while True:
        if lane.connected:
            with contextlib.suppress(SentinelError):
                await _read_backlogs(queue, metrics, clock)
                for _ in range(_CONSERVED_SHARDS_A_ROUND):
                    tokens = await queue.unaccounted_tokens(shard, accounts_at_most=_CONSERVED_ACCOUNTS_MOST)
                    unaccounted[shard] = math.nan if tokens is None else tokens
                    shard = (shard + 1) % SHARDS
        if len(unaccounted) == SHARDS:
            metrics.unaccounted.set(sum(unaccounted.values()))
        metrics.breaker_open.labels("zion").set(breaker.state is not BreakerState.CLOSED)
        await clock.sleep(_GAUGES_EVERY_S)


async def _read_backlogs(queue: UsageQueue, metrics: WorkerMetrics, clock: Clock) -> None:
    backlogs = await asyncio.gather(*(queue.backlog(shard) for shard in range(SHARDS)))
    oldest_ms = min((b.oldest_ms for b in backlogs if b.oldest_ms), default=None)
    metrics.queue_depth.set(sum(b.users for b in backlogs))
    metrics.oldest_age.set(0 if oldest_ms is None else max(0.0, clock.unix_s() - oldest_ms / 1000))
    metrics.open_batches.set(sum(b.batches for b in backlogs))
    metrics.dead_letters.set(sum(b.dead_letters for b in backlogs))
    metrics.reservations.set(sum(b.leases for b in backlogs))

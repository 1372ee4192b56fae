"""The proxy put together: `running` builds everything in order and takes it down in reverse."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI

from sentinel_proxy import calibration
from sentinel_proxy.access_log import AccessLog
from sentinel_proxy.auth import Authenticator
from sentinel_proxy.limiter import Limiter
from sentinel_proxy.local_share import LocalShare
from sentinel_proxy.meter import Meter
from sentinel_proxy.metrics import ProxyMetrics
from sentinel_proxy.models import Models
from sentinel_proxy.routes import Gate, not_found, status_routes, support_routes, webhook_routes, wrong_method
from sentinel_proxy.settings import RedisFailMode
from sentinel_proxy.spool import Spool, ledger_name
from sentinel_proxy.tokens import Ratios, TokenCounter
from sentinel_proxy.toolbox import Load, Toolbox
from sentinel_proxy.upstream import Upstream
from sentinel_shared.accounts import Accounts, AccountScripts, Freshness, WindowPolicy
from sentinel_shared.breaker import Breaker, BreakerState, ZionBudget
from sentinel_shared.clock import SystemClock
from sentinel_shared.directory import Directory
from sentinel_shared.metrics import exposition, new_registry
from sentinel_shared.redis_lane import RedisLane
from sentinel_shared.refresh import LimitsRefresher
from sentinel_shared.settings import LogLevel
from sentinel_shared.status_server import Health, StatusPages
from sentinel_shared.zion_client import ZionClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sentinel_proxy.exchange import Receive, Scope, Send
    from sentinel_proxy.settings import Settings
    from sentinel_proxy.tracing import Tracing

_TOKENIZER_THREADS: Final = 1
_SETTLE_AT_CLOSE_S: Final = 5.0
_SETTLE_WITHIN_S: Final = 1.0
"""Where replicas have to have a settlement: on a lane of its own, so that no admission waits behind it."""
_GAUGES_EVERY_S: Final = 1.0


class SentinelApp(FastAPI):
    """A FastAPI app whose paths under /v1 go straight to raw ASGI endpoints: a decorated route costs 230 us."""

    def __init__(self, gate: Callable[[Scope, Receive, Send], Awaitable[None]], health: Health) -> None:
        super().__init__(
            title="Sentinel",
            version=version("sentinel-proxy"),
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            redirect_slashes=False,
        )
        self.router.default = not_found
        self.add_exception_handler(HTTPStatus.METHOD_NOT_ALLOWED, wrong_method)
        self.health = health
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one exchange."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            await self._gate(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await super().__call__(scope, receive, send)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[SentinelApp]:
    """The app, ready to serve: encodings are loaded and Redis knows the scripts.

    Started in this order, stopped in reverse: metrics, tokenizer and Redis (at the same time), Zion's client, traces,
    the upstream's client, who-may, what-it-cost, then the background tasks, which are the first to end. What is being
    settled is waited for before Redis is left. Raises RedisUnavailable, RedisRefused, SpoolUnusable.
    """
    async with AsyncExitStack() as stack:
        clock = SystemClock()
        window = WindowPolicy(
            window_ms=settings.rate_limit_window_s * 1000,
            requests=settings.rate_limit_requests,
            tokens=settings.rate_limit_tokens,
        )
        metrics = ProxyMetrics(new_registry(), models=())
        scripts = AccountScripts.load()
        loading = asyncio.create_task(asyncio.to_thread(_load_counter, metrics))
        lane = await _connected(stack, settings, scripts)
        counter = await loading
        stack.callback(counter.close)
        accounts = Accounts(lane, scripts, window=window, lease_s=settings.reservation_lease_s)
        directory = Directory(lane)
        breaker = Breaker(clock, random.Random())  # noqa: S311 - jitter
        slots = settings.zion_max_concurrency
        zion = ZionClient(
            settings.zion_api_url,
            settings.zion_api_key.reveal(),
            breaker=breaker,
            budget=ZionBudget(slots, kept=max(1, slots // 4)),
            clock=clock,
        )
        stack.push_async_callback(zion.aclose)
        tracing = _tracing(settings, clock)
        stack.push_async_callback(tracing.close)
        upstream = tracing.upstream.open(
            base_url=settings.gateway_url,
            api_key=settings.gateway_api_key.reveal(),
            connect_timeout_s=settings.upstream_connect_timeout_s,
            idle_timeout_s=settings.upstream_idle_timeout_s,
            max_connections=settings.upstream_max_connections,
            ca_file=settings.upstream_ca_file,
        )
        stack.callback(upstream.close)
        freshness = Freshness.of(cache_ttl_s=settings.cache_ttl_s, max_stale_s=settings.limits_max_stale_s)
        settling = accounts
        if settings.redis_wait_replicas:
            settling = Accounts(
                await _connected(stack, settings, scripts, command_timeout_s=_SETTLE_WITHIN_S),
                scripts,
                window=window,
                lease_s=settings.reservation_lease_s,
                wait_replicas=settings.redis_wait_replicas,
            )
        meter = Meter(
            settling,
            Spool(settings.spool_dir, ledger=ledger_name(settings.redis_url)),
            lease_s=settings.reservation_lease_s,
            clock=clock,
            metrics=metrics,
        )
        stack.push_async_callback(meter.close, timeout_s=_SETTLE_AT_CLOSE_S)
        limiter = Limiter(
            accounts,
            directory,
            LimitsRefresher(accounts, directory, zion, freshness=freshness, clock=clock),
            LocalShare(window),
            meter.refund_unheard,
            window=window,
            fail_mode=settings.redis_fail_mode,
            clock=clock,
            metrics=metrics,
        )
        models = Models(
            upstream, default_max_output_tokens=settings.default_max_output_tokens, clock=clock, metrics=metrics
        )
        tools = Toolbox(
            settings=settings,
            auth=Authenticator(
                directory,
                zion,
                trust_s=settings.jwt_cache_ttl_s,
                max_stale_s=settings.limits_max_stale_s,
                clock=clock,
                metrics=metrics,
            ),
            limiter=limiter,
            meter=meter,
            upstream=upstream,
            models=models,
            counter=counter,
            ratios=Ratios(),
            metrics=metrics,
            new_rid=_rids(),
            samples=calibration.Samples(),
            load=Load(),
        )
        access_logs = _access_logs(settings)
        for access_log in access_logs:
            stack.callback(access_log.flush)
        health = Health(
            {"redis": lane.ping, "zion": _breaker_check(breaker), "upstream": _learned_check(models)},
            # Else a process does its work without Redis, too: were it not ready, the mode would never be of use.
            needed=["redis"] if settings.redis_fail_mode is RedisFailMode.CLOSED else [],
            version=version("sentinel-proxy"),
            clock=clock,
            stats=lambda: {"inflight_requests": tools.load.count, "reservations": meter.running},
        )
        app = SentinelApp(tracing.around(Gate(tools, window, [*tracing.reports, *access_logs])), health)
        _include_routes(
            app,
            tools,
            directory=directory,
            accounts=accounts,
            window=window,
            scrape=lambda: exposition(metrics.registry, os.environ),
        )
        background = [meter.run(), models.learn(), _keep_gauges(tools, breaker), health.watch(metrics.ready.set)]
        if settings.token_calibration:
            background.append(calibration.share(tools.ratios, directory, clock))
        for work in background:
            stack.push_async_callback(_end, asyncio.create_task(work))
        yield app


def _load_counter(metrics: ProxyMetrics) -> TokenCounter:
    def count_fallback(reason: str) -> None:
        metrics.tokenizer_fallbacks.labels(reason).inc()

    return TokenCounter.load(threads=_TOKENIZER_THREADS, on_fallback=count_fallback)


def _include_routes(
    app: SentinelApp,
    tools: Toolbox,
    *,
    directory: Directory,
    accounts: Accounts,
    window: WindowPolicy,
    scrape: Callable[[], bytes],
) -> None:
    settings = tools.settings
    app.include_router(status_routes(StatusPages(app.health, scrape)))
    if settings.webhook_secret is not None:
        app.include_router(webhook_routes(settings.webhook_secret.reveal(), tools, directory, accounts))
    if settings.admin_api_key is not None:
        app.include_router(support_routes(settings.admin_api_key.reveal(), accounts, window))


async def _connected(
    stack: AsyncExitStack, settings: Settings, scripts: AccountScripts, *, command_timeout_s: float = 0.25
) -> RedisLane:
    lane = await RedisLane.connect(
        settings.redis_url,
        client_name="sentinel-proxy",
        scripts=scripts.all(),
        command_timeout_s=command_timeout_s,
        tls_ca_file=str(settings.redis_ca_file) if settings.redis_ca_file else None,
    )
    stack.push_async_callback(lane.close)
    return lane


async def _keep_gauges(tools: Toolbox, breaker: Breaker) -> None:
    """Until cancelled. Every process keeps its own, since any of them may answer the scrape for all."""
    while True:
        tools.metrics.inflight.set(tools.load.count)
        tools.metrics.breaker_open.labels("zion").set(breaker.state is not BreakerState.CLOSED)
        await asyncio.sleep(_GAUGES_EVERY_S)


def _access_logs(settings: Settings) -> list[AccessLog]:
    """None or one."""
    if settings.log_level not in {LogLevel.DEBUG, LogLevel.INFO}:
        return []
    return [AccessLog(sys.stdout.buffer, service="sentinel-proxy")]


class _Untraced:
    """In the place of Tracing where there is none: what is passed through it is as it was."""

    upstream = Upstream
    reports = ()

    def around(self, gate: Gate) -> Gate:
        return gate

    async def close(self) -> None:
        return


def _tracing(settings: Settings, clock: SystemClock) -> Tracing | _Untraced:
    if settings.traces_url is None:
        return _Untraced()
    from sentinel_proxy.tracing import Tracing  # noqa: PLC0415 - a library that costs nobody who does not use it

    return Tracing.open(settings, settings.traces_url, version=version("sentinel-proxy"), clock=clock)


def _rids() -> Callable[[], str]:
    """Ids that no other process makes, and that no client can choose."""
    prefix = os.urandom(8).hex()
    numbers = itertools.count()
    return lambda: f"{prefix}-{next(numbers):x}"


def _breaker_check(breaker: Breaker) -> Callable[[], Any]:
    async def check() -> float:
        if breaker.state is not BreakerState.CLOSED:
            raise ZionAway
        return 0.0

    return check


def _learned_check(models: Models) -> Callable[[], Any]:
    async def check() -> float:
        await models.get("/models", request_id="health")
        return 0.0

    return check


class ZionAway(Exception):
    """Zion's breaker is not closed."""


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

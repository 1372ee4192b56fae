"""arq finds its Redis through Redis Sentinel, as the ledger does, and follows a fail-over."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from sentinel_shared.clock import SystemClock
from sentinel_shared.logging import StormGuard
from sentinel_usage_worker.settings import Settings
from sentinel_usage_worker.worker import Ticks, _arq_pool
from tests.support.redis_server import RedisServer, SentinelSetup

pytestmark = pytest.mark.xdist_group("usage-worker-sentinel")


def settings(redis_url: str) -> Settings:
    return Settings.from_env({"ZION_API_URL": "http://zion", "ZION_API_KEY": "key", "REDIS_URL": redis_url})


class Counting:
    """In the place of a flusher."""

    def __init__(self) -> None:
        self.flushes = 0
        self.reaps = 0

    def flush(self) -> None:
        self.flushes += 1

    async def reap(self) -> None:
        self.reaps += 1


@pytest.fixture
def sentinel(tmp_path):
    try:
        setup = SentinelSetup(tmp_path / "sentinel").__enter__()
    except RuntimeError as error:
        pytest.skip(f"no Sentinel here: {error}")
    yield setup
    setup.__exit__()


async def ticks_go_on(counting: Counting, *, within_s: float) -> None:
    flushes, reaps, deadline = counting.flushes, counting.reaps, time.monotonic() + within_s
    while counting.flushes <= flushes + 1 or counting.reaps <= reaps:
        assert time.monotonic() < deadline, f"no tick within {within_s} s"
        await asyncio.sleep(0.02)


async def test_ticks_go_on_when_the_master_is_another_one(sentinel):
    clock, counting = SystemClock(), Counting()
    ticks = Ticks(settings(sentinel.url), clock, StormGuard(logging.getLogger("tests"), clock.monotonic_s))
    running = asyncio.create_task(ticks.run(counting))  # type: ignore[arg-type]
    await ticks_go_on(counting, within_s=10)
    assert ticks.running
    sentinel.master.kill()
    await ticks_go_on(counting, within_s=30)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert running.cancelled()
    assert not ticks.running


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_waits_of_arqs_connections_are_bounded(tmp_path, kind):
    with RedisServer(tmp_path / "redis", unixsocket=str(tmp_path / "s")) as server:
        url = server.url if kind == "tcp" else f"unix://{tmp_path}/s"
        async with _arq_pool(settings(url)) as pool:
            assert await pool.ping()
            assert pool.connection_pool.connection_kwargs["socket_timeout"] == 5.0

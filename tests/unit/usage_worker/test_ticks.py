"""arq keeps time for the worker, and may be lost at any moment."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

from arq.worker import Worker

from sentinel_shared.clock import SystemClock
from sentinel_shared.logging import StormGuard
from sentinel_usage_worker.settings import Settings
from sentinel_usage_worker.worker import Ticks
from tests.support.redis_server import free_port


async def test_arq_that_is_lost_while_a_job_of_its_runs_is_started_again(monkeypatch):
    starts: asyncio.Queue[None] = asyncio.Queue()

    async def begins_a_job_and_is_lost(worker: Worker) -> None:
        starts.put_nowait(None)
        loop = asyncio.get_running_loop()
        worker.tasks["job"] = loop.create_task(asyncio.Event().wait())
        worker.main_task = loop.create_task(asyncio.sleep(0))
        raise TimeoutError

    monkeypatch.setattr(Worker, "async_run", begins_a_job_and_is_lost)
    settings = Settings.from_env(
        {"ZION_API_URL": "http://zion", "ZION_API_KEY": "key", "REDIS_URL": f"redis://127.0.0.1:{free_port()}"}
    )
    clock = SystemClock()
    ticks = Ticks(settings, clock, StormGuard(logging.getLogger("test"), clock.monotonic_s))
    ticking = asyncio.create_task(ticks.run(cast("Any", None)))
    try:
        async with asyncio.timeout(10):
            for _ in range(2):
                await starts.get()
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)

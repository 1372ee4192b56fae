"""The worker ends when it is told to, whatever becomes of what it stands on."""

from __future__ import annotations

import asyncio
import contextlib

from sentinel_usage_worker import worker


async def test_a_task_that_loses_a_cancellation_is_cancelled_again(monkeypatch):
    monkeypatch.setattr(worker, "_ARQ_CLOSE_WITHIN_S", -0.99)

    async def deaf_once():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    tasks = [asyncio.create_task(deaf_once()) for _ in range(2)]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await worker._end(tasks)
    assert all(task.cancelled() for task in tasks)

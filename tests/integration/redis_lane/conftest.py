from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from sentinel_shared.redis_lane import RedisLane
from tests.support.redis_server import RedisServer

Connect = Callable[..., AbstractAsyncContextManager[RedisLane]]
Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


def pytest_asyncio_loop_factories():
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as started:
        yield started


@pytest.fixture
def connected() -> Connect:
    @asynccontextmanager
    async def connect(url: str, **options: Any) -> AsyncIterator[RedisLane]:
        lane = await RedisLane.connect(url, **{"client_name": "test", "command_timeout_s": 2.0, **options})
        try:
            yield lane
        finally:
            await lane.close()

    return connect


@pytest.fixture
def eventually() -> Eventually:
    async def wait(holds: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(20):
            while not await holds():
                await asyncio.sleep(0.01)

    return wait

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from sentinel_dev.zion import Zion, create_zion

KEY = "gateway-key"


class Clock:
    def __init__(self, now_s: float = 1_767_225_600.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def simulator(*arguments: str) -> Iterator[str]:
    """A simulator as a process; must stop with 0 and have nothing to complain of."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sentinel_dev.simulate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate(timeout=20)
        assert (process.returncode, complaints) == (0, "")
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def gateway_url() -> Iterator[str]:
    with simulator("gateway", "--key", KEY) as url:
        yield url


@pytest.fixture
def books(gateway_url) -> Iterator[Callable[[], dict[str, Any]]]:
    """Reads the gateway's books, which were empty when the test began."""
    with httpx.Client(base_url=gateway_url) as http:
        http.post("/admin/reset")
        yield lambda: http.get("/admin/books").json()


@pytest.fixture
async def gateway(gateway_url, books) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=gateway_url, headers=headers, timeout=10) as http:
        yield http


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def zion_app(clock) -> Zion:
    return create_zion(secret="s", api_key="k", now=clock)


@pytest.fixture
async def zion(zion_app) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(zion_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://zion", headers={"x-api-key": "k"}) as http:
        yield http

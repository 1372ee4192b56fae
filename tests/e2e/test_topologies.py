"""The whole system on a Redis Cluster of three, and behind Redis Sentinel: the same promises."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest

from tests.support.redis_server import RedisCluster, RedisServer, SentinelSetup
from tests.support.system import System, eventually

LIMIT = 30
BODY = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "say 5 tokens"}]}


async def post_all(system, user, number):
    async with httpx.AsyncClient(timeout=30) as http:
        urls = [f"{proxy.url}/v1/chat/completions" for proxy in system.proxies]
        body = {**BODY, "user": user.external_id}
        posts = (http.post(urls[n % len(urls)], json=body, headers=user.headers) for n in range(number))
        return Counter([answer.status_code for answer in await asyncio.gather(*posts)])


def holds_its_promises(system):
    """Twice as many requests as are allowed, over two proxies: exactly the limit pass, and Zion is told of each."""
    users = [system.add_user({"ai_requests": LIMIT}) for _ in range(3)]
    for user in users:
        assert asyncio.run(post_all(system, user, 2 * LIMIT)) == {200: LIMIT, 429: LIMIT}
    for user in users:
        told_all(system, user)
        assert system.booked(user) == system.charged(user)


def told_all(system, user):
    eventually(lambda: system.booked(user), within_s=10, until=lambda booked: booked["ai_requests"] == LIMIT)


SERVICES = ("proxy", "proxy", "usage-worker", "limits-sync")


def test_on_a_cluster_of_three(tmp_path):
    with (
        RedisCluster(tmp_path / "cluster") as cluster,
        RedisServer(tmp_path / "arq") as arq,
        System(tmp_path / "system", USAGE_FLUSH_SECONDS="0.5") as system,
    ):
        system.start_all(*SERVICES, REDIS_URL=cluster.url, ARQ_REDIS_URL=arq.url)
        holds_its_promises(system)


def test_a_cluster_without_a_redis_for_arq_is_one_line_and_exit_2(tmp_path):
    with System(tmp_path / "system") as system:
        worker = system.start("usage-worker", REDIS_URL="redis+cluster://127.0.0.1:1")
        assert worker.wait(within_s=20) == 2
        assert worker.said.count("\n") == 1
        assert "ARQ_REDIS_URL" in worker.said


def test_behind_redis_sentinel(tmp_path):
    try:
        setup = SentinelSetup(tmp_path / "sentinel").__enter__()
    except RuntimeError as error:
        pytest.skip(f"no Sentinel here: {error}")
    try:
        with RedisServer(tmp_path / "arq") as arq, System(tmp_path / "system", USAGE_FLUSH_SECONDS="0.5") as system:
            system.start_all(*SERVICES, REDIS_URL=setup.url, ARQ_REDIS_URL=arq.url)
            holds_its_promises(system)
    finally:
        setup.__exit__(None, None, None)

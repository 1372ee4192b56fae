"""A real server and a lane to it, in one event loop for a whole module: hypothesis runs hundreds of examples."""

from __future__ import annotations

import asyncio

import pytest

from sentinel_shared.accounts import AccountScripts
from sentinel_shared.redis_lane import RedisLane
from sentinel_shared.usage_queue import QueueScripts
from tests.support.redis_server import plain_redis_url

ACCOUNT_SCRIPTS = AccountScripts.load()
QUEUE_SCRIPTS = QueueScripts.load()


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as one:
        yield one


@pytest.fixture(scope="module")
def lane(runner, tmp_path_factory):
    scripts = [*ACCOUNT_SCRIPTS.all(), *QUEUE_SCRIPTS.all()]
    with plain_redis_url(tmp_path_factory.mktemp("redis")) as url:
        connected = runner.run(
            RedisLane.connect(url, client_name="ledger-tests", scripts=scripts, command_timeout_s=5.0)
        )
        yield connected
        runner.run(connected.close())

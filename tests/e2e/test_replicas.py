"""REDIS_WAIT_REPLICAS: what is settled outlives a fail-over, and no admission waits for replicas."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.redis_server import RedisServer, SentinelSetup
from tests.support.system import System, chat_body, eventually

pytestmark = pytest.mark.xdist_group("e2e-replicas")


@pytest.fixture
def setup(tmp_path):
    try:
        started = SentinelSetup(tmp_path / "redis").__enter__()
    except RuntimeError as error:
        pytest.skip(f"no Sentinel here: {error}")
    yield started
    started.__exit__(None, None, None)


@pytest.fixture
def place(tmp_path, setup):
    with RedisServer(tmp_path / "arq") as arq, System(tmp_path / "system", USAGE_FLUSH_SECONDS="0.5") as running:
        environ = {"REDIS_URL": setup.url, "ARQ_REDIS_URL": arq.url, "REDIS_WAIT_REPLICAS": "1"}
        running.start_all("proxy", "usage-worker", "limits-sync", **environ)
        yield running


def ask(place, user):
    return place.post(user, chat_body(user)).status_code


def waiting(place):
    (proxy,) = place.proxies
    return proxy.metric("sentinel_spool_settlements")


def test_settlements_that_the_replica_lacks_wait_on_disk_and_requests_do_not_wait(place, setup):
    user = place.add_user()
    assert [ask(place, user) for _ in range(5)] == [200] * 5
    eventually(lambda: place.booked(user)["ai_requests"] == 5, within_s=10)
    assert waiting(place) == 0
    setup.replica.pause()
    try:
        assert [ask(place, user) for _ in range(20)] == [200] * 20
        eventually(lambda: place.usage(user)["ai_requests"]["used"] == 25, within_s=10)
        eventually(lambda: waiting(place) >= 20, within_s=10)
    finally:
        setup.replica.resume()
    eventually(lambda: waiting(place) == 0, within_s=15)
    charged = eventually(lambda: place.charged(user), within_s=5, until=lambda told: told["ai_requests"] == 25)
    eventually(lambda: place.booked(user), within_s=15, until=lambda told: told == charged)
    assert not any(one["reserved"] for one in place.usage(user).values())


def test_a_fail_over_to_a_replica_that_was_behind_loses_no_usage(place, setup):
    """The replica stands still while requests are settled; then the master dies, and the replica goes on as it was."""
    user = place.add_user({"ai_requests": 10_000})
    assert [ask(place, user) for _ in range(5)] == [200] * 5
    eventually(lambda: place.booked(user)["ai_requests"] == 5, within_s=10)
    setup.replica.pause()
    assert [ask(place, user) for _ in range(20)] == [200] * 20
    eventually(lambda: waiting(place) >= 20, within_s=10)
    setup.master.kill()
    setup.replica.resume()
    (proxy,) = place.proxies
    # Promoted, it has no replica of its own: what waits goes on waiting, and is in force all the same.
    used = {"ai_requests": 0}

    def settled():
        answer = place.http.get(f"{proxy.url}/v1/usage", headers=user.headers)
        if answer.status_code != 200:
            return False
        used.update({one["name"]: one["used"] for one in answer.json()["limits"]})
        return used["ai_requests"] >= 25

    eventually(settled, within_s=60)
    assert used["ai_requests"] == 25


@pytest.mark.soak
def test_a_switch_of_masters_under_load_loses_and_doubles_nothing(place, setup):
    """For some seconds both take themselves for the master; what only the old one was told is forgotten."""
    users = [place.add_user() for _ in range(4)]
    assert [ask(place, user) for user in users] == [200] * 4
    enough = threading.Event()

    def client(user):
        statuses = set()
        while not enough.is_set():
            statuses.add(ask(place, user))
        return statuses

    with ThreadPoolExecutor(len(users)) as clients:
        running = [clients.submit(client, user) for user in users]
        try:
            eventually(lambda: place.booked(users[0])["ai_requests"] > 20, within_s=10)
            setup.sentinel.ask("SENTINEL", "FAILOVER", "mymaster")
            eventually(lambda: "master_link_status:up" in setup.master.ask("INFO", "replication"), within_s=40)
            after = place.booked(users[0])["ai_requests"]
            eventually(lambda: place.booked(users[0])["ai_requests"] > after + 20, within_s=20)
        finally:
            enough.set()
        assert set().union(*(one.result() for one in running)) <= {200, 503}
    eventually(lambda: waiting(place) == 0, within_s=15)
    charged = [place.charged(user) for user in users]
    eventually(lambda: [place.booked(user) for user in users], within_s=15, until=lambda told: told == charged)
    for user, told in zip(users, charged, strict=True):
        assert {name: limit["used"] for name, limit in place.usage(user).items()} == told

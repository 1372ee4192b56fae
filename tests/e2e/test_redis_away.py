"""Redis away: `REDIS_FAIL_MODE` decides, nothing hangs, and what was used meanwhile is settled once when it is back."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from tests.support.system import System, chat_body, eventually

pytestmark = pytest.mark.xdist_group("e2e-redis-away")

LIMIT = 200
MODES = ("closed", "local", "open")


@pytest.fixture
def place(tmp_path):
    with System(tmp_path / "system", USAGE_FLUSH_SECONDS="0.5", LOG_LEVEL="warning") as running:
        running.start_all("usage-worker", "limits-sync")
        yield running


@pytest.fixture
def proxies(place):
    return {mode: place.start_all("proxy", REDIS_FAIL_MODE=mode, SPOOL_DIR=spool(place, mode))[0] for mode in MODES}


def spool(place, name):
    return str(place.folder / f"spool-{name}")


def ask(place, proxy, user, **fields):
    return place.post(user, chat_body(user, **fields), proxy=proxy)


def settled(place, user):
    """Waits until the gateway's books, Sentinel's and Zion's say the same; what they say."""

    def books():
        if place.http.get(f"{place.proxies[0].url}/v1/usage", headers=user.headers).status_code == 503:
            return None  # it has not found Redis again yet
        used = {name: limit["used"] for name, limit in place.usage(user).items()}
        return place.charged(user), used, place.booked(user)

    charged, _, _ = eventually(books, within_s=20, until=lambda told: told and told[0] == told[1] == told[2])
    assert not any(limit["reserved"] for limit in place.usage(user).values())
    return charged


def until_it_is_noticed(place, proxy):
    eventually(lambda: proxy.get("/health").json()["checks"]["redis"]["status"] != "ok", within_s=10)


def until_it_is_back(proxies):
    def all_are_well():
        return all(proxy.get("/health").json()["status"] == "healthy" for proxy in proxies)

    eventually(all_are_well, within_s=20)


def test_the_mode_decides_and_everything_is_settled_afterwards(place, proxies):
    users = {mode: place.add_user({"ai_requests": LIMIT}) for mode in MODES}
    stranger = place.add_user()
    for mode, proxy in proxies.items():
        assert ask(place, proxy, users[mode]).status_code == 200
    place.redis.pause()
    try:
        passed = {mode: [ask(place, proxy, users[mode]) for _ in range(30)] for mode, proxy in proxies.items()}
        (refused,) = {answer.status_code for answer in passed["closed"]}
        assert refused == 503
        assert all(int(answer.headers["retry-after"]) > 0 for answer in passed["closed"])
        assert all(answer.json()["error"]["code"] == "limits_unavailable" for answer in passed["closed"])
        admitted = [answer.status_code for answer in passed["local"]].count(200)
        assert admitted == (LIMIT - 1) // 10, "a tenth of what was last seen to be left"
        assert {answer.status_code for answer in passed["open"]} == {200}
        assert ask(place, proxies["local"], stranger).status_code == 503
        for mode, proxy in proxies.items():
            until_it_is_noticed(place, proxy)
            assert proxy.get("/health/live").status_code == 200
            assert proxy.get("/health/ready").status_code == (503 if mode == "closed" else 200)
        assert proxies["local"].metric("sentinel_local_overspend_bound_tokens") > 0
    finally:
        place.redis.resume()
    until_it_is_back(list(proxies.values()))
    assert settled(place, users["closed"])["ai_requests"] == 1
    assert settled(place, users["local"])["ai_requests"] == 20
    assert settled(place, users["open"])["ai_requests"] == 31


def test_no_request_hangs_and_the_log_stays_quiet_while_redis_stands_still(place, proxies):
    user = place.add_user()
    proxy = proxies["open"]
    assert ask(place, proxy, user).status_code == 200
    said = len(proxy.said.splitlines())
    place.redis.pause()
    began_s = time.monotonic()
    try:

        async def flood():
            async with httpx.AsyncClient(headers=user.headers, timeout=5) as http:  # 250 ms a command, and some

                async def client():
                    statuses = set()
                    while time.monotonic() < began_s + 3:
                        answer = await http.post(f"{proxy.url}/v1/chat/completions", json=chat_body(user))
                        statuses.add(answer.status_code)
                    return statuses

                return set().union(*await asyncio.gather(*(client() for _ in range(8))))

        assert asyncio.run(flood()) == {200}
        took_s = time.monotonic() - began_s
        lines = proxy.said.splitlines()[said:]
        assert len(lines) <= 4 * (took_s + 1), "a line a second and kind at most:\n" + "\n".join(lines)
    finally:
        place.redis.resume()
    until_it_is_back([proxy])
    assert settled(place, user)["ai_requests"] > 50


def test_what_a_killed_proxy_had_on_disk_is_settled_once_by_the_next(place):
    environ = {"REDIS_FAIL_MODE": "open", "SPOOL_DIR": spool(place, "kept")}
    (proxy,) = place.start_all("proxy", **environ)
    user = place.add_user()
    assert ask(place, proxy, user).status_code == 200
    place.redis.pause()
    try:
        for _ in range(25):
            assert ask(place, proxy, user).status_code == 200
        eventually(lambda: proxy.metric("sentinel_spool_settlements"), within_s=10, until=lambda n: n >= 25)
        proxy.kill()
    finally:
        place.redis.resume()
    place.start_all("proxy", **environ)
    assert settled(place, user)["ai_requests"] == 26


def test_a_redis_that_is_killed_comes_back_with_all_that_was_acknowledged(place, proxies):
    user = place.add_user()
    for _ in range(10):
        assert ask(place, proxies["local"], user).status_code == 200
    eventually(lambda: place.usage(user, proxies["local"])["ai_requests"]["used"] == 10, within_s=5)
    place.redis.kill()
    for _ in range(10):
        assert ask(place, proxies["open"], user).status_code in {200, 503}
    place.redis.start()
    until_it_is_back(list(proxies.values()))
    assert settled(place, user)["ai_requests"] >= 10

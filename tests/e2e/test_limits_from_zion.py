"""What Zion says of a user's limits is in force everywhere, soon; what makes no sense is not."""

from __future__ import annotations

import hashlib
import hmac
import json
import time

import httpx
import pytest

from tests.support.system import WEBHOOK_SECRET, System, eventually

BODY = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "say 2 tokens"}]}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Limits are fresh for two seconds; two proxies, two syncs."""
    with System(tmp_path_factory.mktemp("quick") / "system", CACHE_TTL_SECONDS="2") as running:
        running.start_all("proxy", "proxy", "usage-worker", "limits-sync", "limits-sync")
        yield running


def ask(proxy, user):
    return httpx.post(f"{proxy.url}/v1/chat/completions", json=BODY, headers=user.headers, timeout=20).status_code


def lower(system, user, limit):
    url = f"{system.zion.url}/admin/users/{user.external_id}"
    told = httpx.patch(url, json={"limits": {"ai_requests": limit}}, timeout=5)
    told.raise_for_status()


def until_refused(proxy, user, *, within_s):
    eventually(lambda: ask(proxy, user), within_s=within_s, until=lambda status: status == 429)


def test_a_lowered_limit_is_in_force_on_every_proxy_within_the_ttl_and_never_comes_back(quick):
    user = quick.add_user({"ai_requests": 1_000})
    assert ask(quick.proxies[0], user) == 200
    lower(quick, user, 1)
    for proxy in quick.proxies:
        until_refused(proxy, user, within_s=15)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        assert {ask(proxy, user) for proxy in quick.proxies} == {429}


def test_a_webhook_makes_it_so_at_once_and_counts_once(system):
    user = system.add_user({"ai_requests": 1_000})
    assert ask(system.proxies[0], user) == 200
    lower(system, user, 1)
    body = json.dumps({"externalId": user.external_id}).encode()
    stamp = str(int(time.time()))
    signature = hmac.new(WEBHOOK_SECRET.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
    headers = {"x-zion-timestamp": stamp, "x-zion-signature": f"sha256={signature}"}
    url = f"{system.proxies[0].url}/internal/invalidate"
    assert httpx.post(url, content=body, headers=headers).status_code == 202
    for proxy in system.proxies:
        until_refused(proxy, user, within_s=5)
    assert httpx.post(url, content=body, headers=headers).status_code == 401, "a replayed delivery"
    assert httpx.post(url, content=body).status_code == 401


def test_limits_that_make_no_sense_leave_the_last_good_ones(quick):
    user = quick.add_user({"ai_requests": 1_000})
    assert ask(quick.proxies[0], user) == 200
    quick.zion.post("/admin/faults", [{"kind": "malformed_limits", "route": "limits"}])
    try:
        syncs = [server for server in quick.processes if server.name.startswith("limits-sync")]
        eventually(lambda: sum(sync.metric("sentinel_limits_malformed_total") for sync in syncs), within_s=15)
        assert ask(quick.proxies[1], user) == 200
        assert quick.usage(user)["ai_requests"]["limit"] == 1_000
        assert any("make no sense" in sync.said for sync in syncs)
    finally:
        httpx.delete(quick.zion.url + "/admin/faults", timeout=5).raise_for_status()


def test_an_active_user_is_refreshed_about_once_a_ttl_and_never_by_a_request(quick):
    user = quick.add_user()
    assert ask(quick.proxies[0], user) == 200

    def gets():
        calls = quick.zion.get("/admin/calls").json()
        return calls["limits"]["users"].get(user.external_id, 0)

    before, began = gets(), time.monotonic()
    while time.monotonic() - began < 8:
        assert ask(quick.proxies[1], user) == 200
        time.sleep(0.1)
    took_s = time.monotonic() - began
    assert 2 <= gets() - before <= took_s / (0.7 * 2) + 1, "one per 80 % of the TTL, give or take the jitter"


def test_many_strangers_at_once_ask_zion_once_each(quick):
    user = quick.add_user()
    calls = quick.zion.get("/admin/calls").json()
    before = calls["limits"]["count"]

    import asyncio  # noqa: PLC0415 - for this one test

    async def all_at_once():
        async with httpx.AsyncClient(timeout=20, limits=httpx.Limits(max_connections=120)) as http:
            urls = [f"{proxy.url}/v1/chat/completions" for proxy in quick.proxies]
            posts = (http.post(urls[n % len(urls)], json=BODY, headers=user.headers) for n in range(100))
            return {answer.status_code for answer in await asyncio.gather(*posts)}

    assert asyncio.run(all_at_once()) == {200}
    told = quick.zion.get("/admin/calls").json()["limits"]["users"].get(user.external_id, 0)
    assert told <= 2
    assert quick.zion.get("/admin/calls").json()["limits"]["count"] >= before

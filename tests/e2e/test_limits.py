"""Limits hold over several proxies at once, whatever a request says of itself."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections import Counter
from typing import Any

import httpx
import openai
import pytest

from tests.support.system import WEBHOOK_SECRET, System, User, chat_body, eventually

pytestmark = pytest.mark.xdist_group("e2e-system")

MODEL = "openai/gpt-4o"


async def post_all(system: System, user: User, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """All at once, in turn to each of the proxies; streams are read to their end."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=user.headers, timeout=60, limits=limits) as client:
        urls = [f"{proxy.url}/v1/chat/completions" for proxy in system.proxies]
        assert len(urls) == 3
        return await asyncio.gather(*(client.post(urls[i % 3], json=body) for i, body in enumerate(bodies)))


def test_what_the_gateway_charged_is_what_zion_is_told(system):
    user = system.add_user()
    for index, proxy in enumerate(system.proxies):
        client = system.client(user, proxy)
        message = {"role": "user", "content": f"say {20 + index} tokens"}
        client.chat.completions.create(model=MODEL, messages=[message], user=user.external_id)
        stream = client.chat.completions.create(model=MODEL, messages=[message], user=user.external_id, stream=True)
        assert sum(bool(chunk.choices[0].delta.content) for chunk in stream) == 20 + index
    charged = system.charged(user)
    assert charged["ai_requests"] == 6
    assert charged["ai_output_tokens"] == 2 * (20 + 21 + 22)
    assert eventually(lambda: system.booked(user), within_s=5, until=lambda booked: booked == charged)


async def test_of_200_parallel_requests_at_a_limit_of_37_exactly_37_pass(system):
    user = system.add_user({"ai_requests": 37})
    answers = await post_all(system, user, [chat_body(user, "sim/late-300ms+tokens-3")] * 200)
    assert Counter(answer.status_code for answer in answers) == {200: 37, 429: 163}
    assert system.charged(user)["ai_requests"] == 37
    for refused in (answer for answer in answers if answer.status_code == 429):
        error = refused.json()["error"]
        assert error["code"] in {"rate_limit_exceeded", "insufficient_quota"}
        details = error["details"]
        assert (details["limit_name"], details["limit"], details["remaining"]) == ("ai_requests", 37, 0)
        assert details["used"] + details["reserved"] == 37
        assert (error["code"] == "rate_limit_exceeded") == (details["reserved"] > 0)
        assert refused.headers["x-ratelimit-resource"] == "ai_requests"
        assert refused.headers["x-ratelimit-limit"] == "37"
        assert refused.headers["x-ratelimit-remaining"] == "0"
        assert int(refused.headers["retry-after"]) > 0
    later = system.post(user, chat_body(user))
    assert later.json()["error"]["code"] == "insufficient_quota"
    assert later.headers["x-should-retry"] == "false"
    eventually(lambda: system.booked(user), within_s=5, until=lambda booked: booked == system.charged(user))


async def test_parallel_streams_never_get_more_output_than_the_limit_and_can_use_all_of_it(system):
    user = system.add_user({"ai_output_tokens": 1_000})
    bodies = [chat_body(user, "sim/slow-1ms+tokens-400", stream=True)] * 45
    answers = await post_all(system, user, bodies)
    assert {answer.status_code for answer in answers} == {200, 429}
    assert 0 < system.charged(user)["ai_output_tokens"] <= 1_000
    while (last := system.post(user, chat_body(user, "sim/tokens-400"))).status_code == 200:
        assert system.charged(user)["ai_output_tokens"] <= 1_000
    assert last.json()["error"]["details"]["limit_name"] == "ai_output_tokens"
    assert system.charged(user)["ai_output_tokens"] == 1_000
    eventually(lambda: system.booked(user), within_s=5, until=lambda booked: booked == system.charged(user))


def test_the_first_call_under_a_small_limit_without_max_tokens_is_answered(system):
    user = system.add_user({"ai_output_tokens": 100})
    answer = system.post(user, chat_body(user, "sim/tokens-5000"))
    assert answer.status_code == 200
    granted = int(answer.headers["x-sentinel-max-output-tokens"])
    assert answer.json()["usage"]["completion_tokens"] == granted <= 100
    assert system.charged(user)["ai_output_tokens"] == granted


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 1, "max_completion_tokens": 100_000},
        {"max_tokens": 100_000, "max_completion_tokens": 1},
        {"n": 7},
        {"n": 3, "max_completion_tokens": 400},
        {"max_tokens": 10_000},
    ],
    ids=str,
)
def test_no_way_of_asking_gets_more_output_than_is_left(system, fields):
    user = system.add_user({"ai_output_tokens": 500})
    for _ in range(20):
        if system.post(user, chat_body(user, "sim/tokens-2000", **fields)).status_code != 200:
            break
    used = system.charged(user)["ai_output_tokens"]
    assert 0 < used <= 500
    assert system.usage(user)["ai_output_tokens"]["used"] == used


def test_the_larger_of_two_caps_times_n_is_reserved_while_a_request_runs(system):
    user = system.add_user()
    body = chat_body(user, "sim/hang-mid-stream-3", stream=True, n=3, max_tokens=1, max_completion_tokens=700)
    url = f"{system.proxies[0].url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=user.headers, timeout=20) as answer:
        next(answer.iter_bytes())
        assert system.usage(user)["ai_output_tokens"]["reserved"] == 2_100


def test_requests_that_are_refused_or_fail_change_nothing(system):
    user = system.add_user({"ai_requests": 5, "ai_input_tokens": 50})
    before = system.usage(user)
    long = {"messages": [{"role": "user", "content": "word " * 500}]}
    refusals = [
        system.post(user, chat_body(user) | long),
        system.post(user, chat_body(user, "sim/status-400")),
        system.post(user, chat_body(user, "sim/status-500")),
        system.post(user, chat_body(user, "sim/status-429")),
        system.post(user, {"model": MODEL}),
    ]
    assert [refused.status_code for refused in refusals] == [429, 400, 500, 429, 400]
    assert refusals[0].json()["error"]["details"]["limit_name"] == "ai_input_tokens"
    assert eventually(lambda: system.usage(user), within_s=3, until=lambda usage: usage == before)


def test_a_flood_of_refusals_is_hardly_seen_by_redis(system):
    user = system.add_user({"ai_requests": 1})
    assert system.post(user, chat_body(user)).status_code == 200

    def asked():
        return sum(proxy.metric("sentinel_cache_hits_total", cache="limits", result="hit") for proxy in system.proxies)

    async def flood():
        async with httpx.AsyncClient(headers=user.headers, timeout=60) as client:

            async def one_after_the_other(url):
                for _ in range(150):
                    refused = await client.post(url, json=chat_body(user))
                    assert refused.status_code == 429
                    assert refused.json()["error"]["code"] == "insufficient_quota"
                    assert refused.headers["x-ratelimit-remaining-requests"] == "0"

            urls = [f"{proxy.url}/v1/chat/completions" for proxy in system.proxies]
            await asyncio.gather(*(one_after_the_other(url) for url in urls * 2))

    before, began_s = asked(), time.monotonic()
    asyncio.run(flood())
    # Each process remembers a denial for a tenth of a second; two requests may ask in its place.
    tenths = (time.monotonic() - began_s) / 0.1
    assert 0 < asked() - before <= 2 * len(system.proxies) * (tenths + 1)


def test_the_sdk_does_not_hammer_on_a_limit_that_waiting_does_not_cure(system):
    user = system.add_user({"ai_requests": 0})
    proxy = system.proxies[0]
    before = proxy.metric("sentinel_requests_total", status="429")
    with pytest.raises(openai.RateLimitError) as raised:
        system.client(user, proxy, max_retries=5).chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}]
        )
    assert raised.value.code == "insufficient_quota"
    assert proxy.metric("sentinel_requests_total", status="429") == before + 1


def test_every_path_counts_whatever_it_is(system):
    user = system.add_user()
    url = system.proxies[0].url
    calls = [
        ("POST", "moderations", {"json": {"model": "m", "input": "hello"}}),
        ("POST", "images/generations", {"json": {"model": "m", "prompt": "a cat", "user": user.external_id}}),
        ("POST", "audio/speech", {"json": {"model": "m", "input": "hello", "voice": "alloy"}}),
        ("POST", "files", {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "batch"}}),
        ("GET", "files", {}),
        ("POST", "completions", {"json": {"model": "m", "prompt": "hello", "user": user.external_id}}),
        ("POST", "embeddings", {"json": {"model": "m", "input": "hello", "user": user.external_id}}),
        ("POST", "responses", {"json": {"model": "m", "input": "hello", "user": user.external_id}}),
        ("POST", "something/new", {"json": {"any": "thing"}}),
        ("DELETE", "something/else", {}),
    ]
    with httpx.Client(headers=user.headers, timeout=20) as client:
        statuses = [client.request(method, f"{url}/v1/{path}", **body).status_code for method, path, body in calls]
        assert statuses == [200] * len(calls)
        for free in ("models", f"models/{MODEL}", "usage"):
            assert client.get(f"{url}/v1/{free}").status_code == 200
    used = eventually(
        lambda: {name: limit["used"] for name, limit in system.usage(user).items()},
        within_s=3,
        until=lambda used: used["ai_requests"] == len(calls),
    )
    charged = system.charged(user)
    assert charged["ai_output_tokens"] > 1_000, "the image's answer carries usage"
    assert used["ai_input_tokens"] == charged["ai_input_tokens"]
    assert used["ai_output_tokens"] == charged["ai_output_tokens"]


def _webhook(system: System, user: User, *, secret: str = WEBHOOK_SECRET, age_s: int = 0) -> httpx.Request:
    body = json.dumps({"externalId": user.external_id}).encode()
    timestamp = str(int(time.time()) - age_s)
    signature = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    headers = {"x-zion-timestamp": timestamp, "x-zion-signature": f"sha256={signature}"}
    return httpx.Request("POST", f"{system.proxies[0].url}/internal/invalidate", content=body, headers=headers)


def test_the_webhook_makes_a_changed_limit_effective_at_once(system):
    user = system.add_user({"ai_requests": 1})
    assert [system.post(user, chat_body(user)).status_code for _ in range(2)] == [200, 429]
    eventually(lambda: system.booked(user)["ai_requests"], within_s=5)
    httpx.patch(f"{system.zion.url}/admin/users/{user.external_id}", json={"limits": {"ai_requests": 3}})
    with httpx.Client() as client:
        delivery = _webhook(system, user)
        assert client.send(delivery).status_code == 202
        assert client.send(delivery).status_code == 401, "a replay"
        assert client.send(_webhook(system, user, secret="another")).status_code == 401
        assert client.send(_webhook(system, user, age_s=301)).status_code == 401
    eventually(lambda: system.usage(user)["ai_requests"]["limit"] == 3, within_s=5)
    assert [system.post(user, chat_body(user)).status_code for _ in range(3)] == [200, 200, 429]

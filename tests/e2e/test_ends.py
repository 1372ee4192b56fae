"""However a request, a client or a process ends, what was used is billed once, and what was promised comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest

from tests.support.system import Server, System, User, chat_body, eventually

pytestmark = pytest.mark.xdist_group("e2e-system")


@pytest.fixture
def own_proxy(system):
    """One more proxy, for the test to end."""
    (proxy,) = system.start_all("proxy")
    yield proxy
    proxy.kill()


def used(system: System, user: User) -> dict[str, int]:
    return {name: limit["used"] for name, limit in system.usage(user, system.proxies[0]).items()}


def nothing_reserved(system: System, user: User) -> bool:
    return not any(limit["reserved"] for limit in system.usage(user, system.proxies[0]).values())


def deltas(line: str) -> int:
    """How many choices of a chunk carry text."""
    if not line.startswith("data: {"):
        return 0
    return sum(bool(choice["delta"].get("content")) for choice in json.loads(line[6:]).get("choices", []))


async def read_stream(
    client: httpx.AsyncClient, proxy: Server, body: dict[str, Any], begun: asyncio.Semaphore
) -> list[str]:
    """All lines; `begun` is released with the first one."""
    lines: list[str] = []
    async with client.stream("POST", f"{proxy.url}/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not lines:
                begun.release()
            lines.append(line)
    return [line for line in lines if line]


async def test_sigterm_lets_50_streams_finish_and_bills_them(system, own_proxy):
    user = system.add_user()
    begun = asyncio.Semaphore(0)
    body = chat_body(user, "sim/slow-30ms+tokens-50", stream=True)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=user.headers, timeout=60, limits=limits) as client:
        streams = [asyncio.create_task(read_stream(client, own_proxy, body, begun)) for _ in range(50)]
        for _ in streams:
            await begun.acquire()
        own_proxy.signal(15)
        finished = await asyncio.gather(*streams)
    assert [sum(deltas(line) for line in lines) for lines in finished] == [50] * 50
    assert {lines[-1] for lines in finished} == {"data: [DONE]"}
    assert await asyncio.to_thread(own_proxy.wait, within_s=20) == 0
    charged = system.charged(user)
    assert (charged["ai_requests"], charged["ai_output_tokens"]) == (50, 2_500)
    assert used(system, user) == charged
    assert nothing_reserved(system, user)
    eventually(lambda: system.booked(user), within_s=5, until=lambda booked: booked == charged)


def test_a_proxy_killed_in_mid_stream_gives_the_quota_back_and_what_is_known_is_billed(system, own_proxy):
    user = system.add_user({"ai_output_tokens": 20_000})
    body = chat_body(user, "sim/slow-20ms+tokens-3000", stream=True)
    url = f"{own_proxy.url}/v1/chat/completions"
    with (
        contextlib.suppress(httpx.TransportError),
        system.http.stream("POST", url, json=body, headers=user.headers) as answer,
    ):
        for seen, _ in enumerate(answer.iter_lines()):
            if seen == 250:
                own_proxy.kill()
    assert not nothing_reserved(system, user)
    eventually(lambda: nothing_reserved(system, user), within_s=8)
    charged = eventually(lambda: system.charged(user), within_s=5, until=lambda charged: charged["ai_requests"])
    billed = used(system, user)
    assert billed["ai_requests"] == 1
    assert billed["ai_input_tokens"] == charged["ai_input_tokens"]
    assert 40 <= billed["ai_output_tokens"] <= charged["ai_output_tokens"]
    eventually(lambda: system.booked(user), within_s=5, until=lambda booked: booked == billed)


@pytest.mark.parametrize("model", ["sim/slow-20ms+tokens-40", "sim/slow-20ms+tokens-40+no-usage"])
def test_a_stream_that_the_client_leaves_before_the_usage_is_billed(system, model):
    user = system.add_user()
    url = f"{system.proxies[1].url}/v1/chat/completions"
    body = chat_body(user, model, stream=True, stream_options={"include_usage": False})
    read = 0
    with system.http.stream("POST", url, json=body, headers=user.headers) as answer:
        for line in answer.iter_lines():
            read += deltas(line)
            if read == 38:
                break
    eventually(lambda: used(system, user)["ai_requests"] == 1, within_s=5)
    assert used(system, user) == system.charged(user)
    assert used(system, user)["ai_output_tokens"] == 40


def test_what_had_streamed_before_the_upstream_broke_is_billed_and_the_client_is_told(system):
    user = system.add_user()
    answer = system.post(user, chat_body(user, "sim/cut-20+tokens-50", stream=True))
    lines = [line for line in answer.text.splitlines() if line]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "upstream_unreachable")
    seen = sum(deltas(line) for line in lines)
    assert seen > 10
    eventually(lambda: used(system, user)["ai_requests"] == 1, within_s=3)
    assert used(system, user)["ai_output_tokens"] == seen
    assert used(system, user) == system.charged(user)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_an_answer_holds_nothing_for_long(system, stream):
    (proxy,) = system.start_all("proxy", UPSTREAM_IDLE_TIMEOUT_SECONDS="1")
    try:
        user = system.add_user({"ai_requests": 3})
        url, body = f"{proxy.url}/v1/chat/completions", chat_body(user, "sim/hang", stream=stream)
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                system.http.post(url, json=body, headers=user.headers, timeout=0.2)
        assert system.post(user, chat_body(user)).json()["error"]["code"] == "rate_limit_exceeded"
        eventually(lambda: nothing_reserved(system, user), within_s=5)
        assert system.post(user, chat_body(user)).status_code == 200
    finally:
        proxy.kill()


def test_after_50_upstream_time_outs_the_next_call_is_answered(system):
    (proxy,) = system.start_all("proxy", UPSTREAM_IDLE_TIMEOUT_SECONDS="0.3", UPSTREAM_MAX_CONNECTIONS="20")
    try:
        user = system.add_user({"ai_requests": 51})

        async def time_outs() -> list[int]:
            async with httpx.AsyncClient(headers=user.headers, timeout=60) as client:
                calls = [
                    client.post(f"{proxy.url}/v1/chat/completions", json=chat_body(user, "sim/hang")) for _ in range(50)
                ]
                return [answer.status_code for answer in await asyncio.gather(*calls)]

        assert set(asyncio.run(time_outs())) == {504}
        assert system.post(user, chat_body(user), proxy=proxy).status_code == 200
        assert used(system, user)["ai_requests"] == 1
    finally:
        proxy.kill()

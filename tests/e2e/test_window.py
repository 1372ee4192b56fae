"""The sliding window as clients meet it, over three proxies: no true window holds more than the limit."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from tests.support.system import System, chat_body

pytestmark = pytest.mark.xdist_group("e2e-window")

LIMIT, WINDOW_S = 12, 2


@pytest.fixture(scope="module")
def proxies(tmp_path_factory):
    environ = {"RATE_LIMIT_REQUESTS": str(LIMIT), "RATE_LIMIT_WINDOW_SECONDS": str(WINDOW_S)}
    with System(tmp_path_factory.mktemp("window") / "system") as running:
        running.start_all("proxy", "proxy", "proxy", **environ)
        yield running


async def flood(system, user, seconds):
    """Requests as fast as they go over all proxies; of each that passed, when it was sent and answered."""
    passed: list[tuple[float, float, httpx.Response]] = []
    refused: list[tuple[float, float, httpx.Response]] = []
    until_s = time.monotonic() + seconds

    async def client(proxy, http):
        while time.monotonic() < until_s:
            sent_s = time.monotonic()
            answer = await http.post(f"{proxy.url}/v1/chat/completions", json=chat_body(user), headers=user.headers)
            (passed if answer.status_code == 200 else refused).append((sent_s, time.monotonic(), answer))

    async with httpx.AsyncClient(timeout=20) as http:
        await asyncio.gather(*(client(proxy, http) for proxy in system.proxies for _ in range(2)))
    return passed, refused


async def test_no_true_window_of_a_flood_holds_more_than_the_limit(proxies):
    user = proxies.add_user()
    passed, refused = await flood(proxies, user, 4 * WINDOW_S)
    assert {answer.status_code for _, _, answer in refused} == {429}
    for sent_s, _, _ in passed:
        # A request was admitted between its sending and its answer: these were so within one window, whatever the rest.
        within = sum(1 for s, a, _ in passed if s >= sent_s and a <= sent_s + WINDOW_S)
        assert within <= LIMIT
    # Restraint is at most a twelfth of the window: the limit is used, window after window.
    assert len(passed) >= LIMIT * 3


async def test_whoever_waits_as_told_passes(proxies):
    user = proxies.add_user()
    _, refused = await flood(proxies, user, 0.5)
    _, _, last = refused[-1]
    assert last.json()["error"]["details"]["limit_name"] == last.headers["x-ratelimit-resource"]
    assert last.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(last.headers["retry-after"]) <= WINDOW_S + 1
    await asyncio.sleep(int(last.headers["retry-after"]))
    assert proxies.post(user, chat_body(user)).status_code == 200

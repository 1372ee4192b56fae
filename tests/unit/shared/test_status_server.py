from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from datetime import datetime
from typing import Any

import httpx
import pytest

from sentinel_shared.errors import RedisUnavailable
from sentinel_shared.status_server import (
    Answer,
    CannotListen,
    Check,
    Health,
    StatusPages,
    StatusServer,
    listen,
    status_app,
)
from tests.unit.shared.clocks import ManualClock


class Part:
    """Something that a service needs, and that can be away."""

    def __init__(self, error: Exception | None = None, latency_ms: float | None = 1.5) -> None:
        self.error = error
        self.asked = 0
        self._latency_ms = latency_ms

    async def check(self) -> float | None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return self._latency_ms


def health_of(clock: ManualClock | None = None, **checks: Check) -> Health:
    return Health(
        checks, needed={"redis"}, version="1.2.3", clock=clock or ManualClock(), stats=lambda: {"queue_depth": 4}
    )


def pages_of(health: Health) -> StatusPages:
    return StatusPages(health, lambda: b"sentinel_up 1.0\n")


def body(answer: Answer) -> Any:
    return json.loads(answer.body)


async def test_health_has_the_shape_of_the_specification():
    clock = ManualClock()
    health = health_of(clock, redis=Part().check, zion=Part(latency_ms=20).check)
    clock.advance(12.5)
    answer = await pages_of(health).answer("GET", "/health")
    assert answer.status == 200
    document = body(answer)
    assert datetime.fromisoformat(document.pop("timestamp")).timestamp() == clock.unix_s()
    assert document == {
        "status": "healthy",
        "version": "1.2.3",
        "uptime_seconds": 12.5,
        "checks": {
            "redis": {"status": "healthy", "latency_ms": 1.5},
            "zion": {"status": "healthy", "latency_ms": 20},
        },
        "stats": {"queue_depth": 4},
    }


@pytest.mark.parametrize(
    ("redis", "zion", "status", "code", "ready"),
    [
        (None, None, "healthy", 200, 200),
        (None, RedisUnavailable("x"), "degraded", 200, 200),
        (RedisUnavailable("x"), None, "unhealthy", 503, 503),
        (RedisUnavailable("x"), OSError("x"), "unhealthy", 503, 503),
    ],
)
async def test_a_needed_part_away_is_unhealthy_and_not_ready_another_one_only_degrades(
    redis, zion, status, code, ready
):
    pages = pages_of(health_of(redis=Part(redis).check, zion=Part(zion).check))
    answer = await pages.answer("GET", "/health")
    assert (answer.status, body(answer)["status"]) == (code, status)
    assert (await pages.answer("GET", "/health/ready")).status == ready


async def test_not_ready_names_the_check_that_fails_and_never_what_it_said():
    pages = pages_of(health_of(redis=Part(RedisUnavailable("redis://:canary@host")).check, zion=Part().check))
    answer = await pages.answer("GET", "/health/ready")
    assert body(answer)["status"] == "not ready"
    assert body(answer)["checks"] == {"redis": {"status": "unhealthy", "latency_ms": 0.0, "error": "RedisUnavailable"}}
    assert b"canary" not in answer.body + (await pages.answer("GET", "/health")).body


async def test_a_draining_service_is_alive_and_not_ready_at_once():
    redis = Part()
    health = health_of(redis=redis.check)
    pages = pages_of(health)
    assert (await pages.answer("GET", "/health/ready")).status == 200
    health.draining = True
    answer = await pages.answer("GET", "/health/ready")
    assert (answer.status, body(answer)) == (503, {"status": "draining"})
    assert (await pages.answer("GET", "/health/live")).status == 200
    assert body(await pages.answer("GET", "/health"))["status"] == "degraded"


async def test_live_touches_nothing():
    redis = Part(RedisUnavailable("x"))
    answer = await pages_of(health_of(redis=redis.check)).answer("GET", "/health/live")
    assert (answer.status, redis.asked) == (200, 0)


async def test_a_thousand_probes_ask_each_part_once_until_the_answer_is_old():
    clock, redis = ManualClock(), Part()
    pages = pages_of(health_of(clock, redis=redis.check))
    paths = ["/health", "/health/ready"] * 500
    await asyncio.gather(*(pages.answer("GET", path) for path in paths))
    assert redis.asked == 1
    redis.error = RedisUnavailable("x")
    clock.advance(2)
    assert (await pages.answer("GET", "/health/ready")).status == 503
    assert redis.asked == 2


async def test_a_part_that_never_answers_fails_its_check_and_holds_up_nobody(monkeypatch):
    monkeypatch.setattr("sentinel_shared.status_server.CHECK_TIMEOUT_S", 0.02)

    async def hang() -> float:
        await asyncio.Event().wait()
        raise AssertionError

    async with asyncio.timeout(5):
        answer = await pages_of(health_of(redis=hang, zion=Part().check)).answer("GET", "/health/ready")
    assert body(answer)["checks"]["redis"]["error"] == "TimeoutError"


async def test_a_part_that_does_not_even_heed_its_cancellation_holds_up_nobody(monkeypatch):
    monkeypatch.setattr("sentinel_shared.status_server.CHECK_TIMEOUT_S", 0.02)
    clock, go_on = ManualClock(), asyncio.Event()

    async def deaf() -> float:
        while not go_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go_on.wait()
        raise OSError("too late for anybody")

    health = health_of(clock, redis=deaf)
    for _ in range(3):
        async with asyncio.timeout(5):
            answer = await pages_of(health).answer("GET", "/health/ready")
        assert body(answer)["checks"]["redis"]["error"] == "TimeoutError"
        clock.advance(2)
    go_on.set()
    await asyncio.sleep(0)


async def test_a_probe_that_is_given_up_leaves_the_next_one_its_turn():
    clock, redis, begun = ManualClock(), Part(), asyncio.Event()

    async def hang_once() -> float | None:
        if not begun.is_set():
            begun.set()
            await asyncio.Event().wait()
        return await redis.check()

    pages = pages_of(health_of(clock, redis=hang_once))
    probe = asyncio.create_task(pages.answer("GET", "/health/ready"))
    await begun.wait()
    probe.cancel()
    async with asyncio.timeout(5):
        assert (await pages.answer("GET", "/health/ready")).status == 200


async def test_whoever_watches_is_told_again_and_again_whether_the_service_is_ready():
    class Clock(ManualClock):
        async def sleep(self, duration_s: float) -> None:
            self.advance(duration_s)
            await asyncio.sleep(0)

    redis, told = Part(), asyncio.Queue[bool]()
    health = health_of(Clock(), redis=redis.check)

    async def until(ready: bool) -> None:
        while await told.get() is not ready:
            pass

    watching = asyncio.create_task(health.watch(told.put_nowait))
    async with asyncio.timeout(5):
        await until(ready=True)
        redis.error = RedisUnavailable("x")
        await until(ready=False)
        redis.error = None
        await until(ready=True)
        health.draining = True
        await until(ready=False)
    watching.cancel()


async def test_a_check_without_a_latency_of_its_own_is_measured():
    clock = ManualClock()

    async def slow() -> None:
        clock.advance(0.25)

    assert body(await pages_of(health_of(clock, redis=slow)).answer("GET", "/health"))["checks"]["redis"] == {
        "status": "healthy",
        "latency_ms": 250,
    }


async def test_an_unforeseen_failure_of_a_check_is_logged_and_still_an_answer(caplog):
    answer = await pages_of(health_of(redis=Part(KeyError("bug")).check)).answer("GET", "/health")
    assert body(answer)["checks"]["redis"]["error"] == "KeyError"
    assert "unforeseen" in caplog.text


async def over_asgi(method: str, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(status_app(pages_of(health_of(redis=Part().check))))
    async with httpx.AsyncClient(transport=transport, base_url="http://sentinel") as client:
        return await client.request(method, path)


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics"])
async def test_head_is_answered_as_get_is_without_the_body(path):
    got, head = await over_asgi("GET", path), await over_asgi("HEAD", path)
    assert head.content == b""
    assert head.status_code == got.status_code == 200
    assert head.headers["content-type"] == got.headers["content-type"]
    assert int(got.headers["content-length"]) == len(got.content)
    assert got.headers["cache-control"] == "no-store"


async def test_metrics_are_in_prometheus_text():
    response = await over_asgi("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert response.text == "sentinel_up 1.0\n"


@pytest.mark.parametrize("path", ["/", "/healthz", "/health/", "/v1/chat/completions"])
async def test_anything_else_is_a_404_in_json(path):
    response = await over_asgi("GET", path)
    assert response.status_code == 404
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


async def test_other_methods_are_a_405_that_says_which_do():
    response = await over_asgi("POST", "/health")
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, HEAD"


async def test_the_server_answers_on_its_port_until_it_is_left():
    health = health_of(redis=Part().check)
    async with (
        StatusServer(status_app(pages_of(health)), listen("127.0.0.1", 0)) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client,
    ):
        port = server.port
        assert (await client.get("/health/ready")).json() == {"status": "ready"}
        # A body after a HEAD would be taken for the next answer on the same connection.
        assert (await client.head("/health")).content == b""
        assert (await client.get("/metrics")).text == "sentinel_up 1.0\n"
        assert "server" not in (await client.get("/health/live")).headers
    listen("127.0.0.1", port).close()


async def test_a_server_that_is_left_at_once_leaves_nothing_behind():
    async with StatusServer(status_app(pages_of(health_of())), listen("127.0.0.1", 0)) as server:
        port = server.port
    listen("127.0.0.1", port).close()


def test_a_taken_port_is_one_clear_line():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen) as raised:
            listen("127.0.0.1", port)
    assert str(raised.value) == f"SENTINEL_PORT {port} is taken"


def test_an_address_of_another_machine_is_one_clear_line():
    with pytest.raises(CannotListen) as raised:
        listen("192.0.2.1", 0)
    assert str(raised.value) == "SENTINEL_HOST 192.0.2.1 is not an address of this machine"


def test_ipv6_is_listened_on_where_the_machine_has_it():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with listen("::1", 0) as listening:
        assert listening.family == socket.AF_INET6

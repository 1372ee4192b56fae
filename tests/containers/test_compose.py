"""docker-compose.yml as somebody runs it for the first time, but on ports of the test's own."""

from __future__ import annotations

import threading

import httpx
import openai
import pytest

from tests.containers.project import docker, inspected
from tests.support.system import LIMITS, eventually

SERVICES = ("proxy", "usage-worker", "limits-sync", "door")
ASK = {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


def add_user(system, external_id):
    """Somebody with plenty; the token."""
    told = {"externalId": external_id, "limits": dict.fromkeys(LIMITS, 100_000_000)}
    return httpx.post(f"http://127.0.0.1:{system.zion_port}/admin/users", json=told, timeout=5).json()["token"]


def booked(system, external_id):
    """The requests that Zion was told of."""
    books = httpx.get(f"http://127.0.0.1:{system.zion_port}/admin/books", timeout=5).json()
    return books["users"].get(external_id, {}).get("ai_requests", {}).get("applied", 0)


def test_the_sdk_works_on_the_one_port(client):
    answer = client().chat.completions.create(**ASK)
    assert answer.choices[0].message.content
    events = list(client().chat.completions.create(**ASK, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices)


def test_the_printed_line_is_for_this_port(system, demo):
    assert f"curl http://127.0.0.1:{system.port}/v1/chat/completions" in demo[1]


def test_a_stranger_is_refused(client):
    with pytest.raises(openai.AuthenticationError):
        client(api_key="made-up").chat.completions.create(**ASK)


def test_all_proxies_get_their_share(system, client):
    for _ in range(6):
        client().models.list()
    script = (
        "import urllib.request as u;"
        "print(sum(float(l.split()[-1]) for l in u.urlopen('http://127.0.0.1:8080/metrics').read().decode().splitlines()"
        " if l.startswith('sentinel_requests_total') and '/models' in l))"
    )
    shares = [float(docker("exec", one, "python", "-c", script)) for one in system.containers("proxy")]
    assert len(shares) == 3
    assert min(shares) >= 2.0


def test_containers_cannot_write_their_root_nor_gain_rights(system):
    for service in (*SERVICES, "zion", "gateway"):
        for container in system.containers(service):
            told = inspected(container)
            assert told["HostConfig"]["ReadonlyRootfs"], service
            assert told["HostConfig"]["CapDrop"] == ["ALL"], service
            assert told["Config"]["User"] == "10001:10001", service


def test_dead_letters_can_be_looked_at(system):
    worker = system.containers("usage-worker")[0]
    assert docker("exec", worker, "sentinel-usage-worker", "dead-letters", "list", "--json").strip() in {"", "[]"}


def test_a_rolling_restart_under_load_loses_no_request_and_no_usage(system, client):
    token = add_user(system, "restarts")
    answered, failed, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            # A connection for each request: an idle one may be closed at the very moment when it is used again.
            caller = client(api_key=token)
            try:
                answered.append(caller.chat.completions.create(**ASK))
            except openai.OpenAIError as error:
                failed.append(repr(error))
            finally:
                caller.close()

    callers = [threading.Thread(target=ask) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        for service in ("proxy", "usage-worker", "limits-sync", "redis"):
            for container in system.containers(service):
                docker("restart", "--time=40", container)
                eventually(system.unhealthy, within_s=60, until=lambda names: not names)
    finally:
        stop.set()
        for caller in callers:
            caller.join(timeout=60)
    assert not failed
    assert answered
    eventually(lambda: booked(system, "restarts"), within_s=30, until=lambda count: count >= len(answered))
    assert booked(system, "restarts") == len(answered)


def test_stopping_is_orderly(system):
    containers = [one for name in SERVICES for one in system.containers(name)]
    system.compose("stop")
    assert [inspected(one)["State"]["ExitCode"] for one in containers] == [0] * len(containers)

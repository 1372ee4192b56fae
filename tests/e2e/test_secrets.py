"""Who may come in, and what never comes out."""

from __future__ import annotations

import re
from typing import Any

import httpx
import openai
import pytest

from tests.support.system import GATEWAY_KEY, User, chat_body, eventually, stranger

pytestmark = pytest.mark.xdist_group("e2e-system")

CANARY = "canary-4f1d9c"


def test_prompts_and_tokens_are_in_no_log_no_error_no_metric_and_not_in_redis(system):
    (proxy,) = system.start_all("proxy", LOG_LEVEL="debug", UPSTREAM_IDLE_TIMEOUT_SECONDS="0.5", MAX_BODY_BYTES="20000")
    user = system.add_user({"ai_requests": 9}, external_id=None)
    url = f"{proxy.url}/v1"

    def told(model: str, **fields) -> dict[str, Any]:
        prompt = {"role": "user", "content": f"my secret is {CANARY}"}
        return chat_body(user, model, **fields) | {"messages": [prompt]}

    with pytest.raises(httpx.ReadTimeout):
        system.http.post(f"{url}/chat/completions", json=told("sim/hang"), headers=user.headers, timeout=0.1)
    answers = [
        system.post(user, told("sim/status-400"), proxy=proxy),
        system.post(user, told("sim/status-401"), proxy=proxy),
        system.post(user, told("sim/status-500"), proxy=proxy),
        system.post(user, told("sim/hang"), proxy=proxy),
        system.post(user, told("sim/hang-mid-stream", stream=True), proxy=proxy),
        system.post(user, told("sim/cut", stream=True), proxy=proxy),
        system.post(user, told("m", n=CANARY), proxy=proxy),
        system.post(user, told("m", max_tokens=[CANARY]), proxy=proxy),
        system.post(user, {"model": "m", "messages": CANARY}, proxy=proxy),
        system.post(user, {"model": [CANARY]}, proxy=proxy),
        system.post(user, told("m") | {"padding": CANARY * 3_000}, proxy=proxy),
        system.post(user, {"input": CANARY}, "moderations", proxy=proxy),
        system.http.post(f"{url}/chat/completions", content=f'{{"model": "m", "{CANARY}', headers=user.headers),
        system.http.post(f"{url}/chat/completions", content=f'"{CANARY}"', headers=user.headers),
        system.post(User("nobody", f"{CANARY}.{CANARY}.{CANARY}"), told("m"), proxy=proxy),
        system.post(stranger(CANARY), told("m"), proxy=proxy),
        *(system.post(user, told("sim/tokens-2"), proxy=proxy) for _ in range(9)),
    ]
    assert answers[-1].status_code == 429
    metrics = proxy.get("/metrics").text
    assert proxy.stop() == 0

    secrets = [CANARY, user.token, GATEWAY_KEY, user.token.rpartition(".")[2]]
    assert all(answer.status_code >= 400 for answer in answers[:4])
    for answer in answers:
        outside = answer.text + str(answer.headers)
        assert not [secret for secret in secrets if secret in outside], outside
    for process in system.processes:
        if process.name not in {"zion", "gateway"}:
            assert not [secret for secret in secrets if secret in process.said], process.name
    assert not [secret for secret in secrets if secret in metrics]
    stored = b"".join(path.read_bytes() for path in (system.folder / "redis").rglob("*") if path.is_file())
    assert user.external_id.encode() in stored
    assert not [secret for secret in secrets if secret.encode() in stored]


def test_the_clients_token_never_reaches_the_gateway_and_the_gateways_key_never_the_client(system):
    user = system.add_user()
    answers = [
        system.post(user, chat_body(user)),
        system.post(user, chat_body(user, stream=True)),
        system.post(user, {"input": "hello"}, "moderations"),
        system.http.get(f"{system.proxies[0].url}/v1/files", headers=user.headers | {"cookie": f"jwt={user.token}"}),
    ]
    assert not [answer for answer in answers if GATEWAY_KEY in answer.text + str(answer.headers)]
    requests = system.gateway.get("/admin/requests?last=20").json()["requests"]
    headers = [header for request in requests for header in request["headers"]]
    assert ["authorization", f"Bearer {GATEWAY_KEY}"] in headers
    assert not [value for _, value in headers if user.token in value]


def test_random_model_names_leave_the_metrics_as_many_as_they_were(system):
    user = system.add_user()
    proxy = system.proxies[0]

    def series() -> set[str]:
        lines = proxy.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if line.startswith("sentinel_")}

    def ask(first: int, count: int) -> None:
        for number in range(first, first + count):
            body = chat_body(user, f"made-up/model-{number}", stream=number % 2 == 0)
            assert system.post(user, body, proxy=proxy).status_code == 200
            assert system.http.get(f"{proxy.url}/v1/made-up-{number}", headers=user.headers).status_code == 200

    ask(0, 10)
    before = series()
    ask(10, 250)
    assert series() == before
    assert not re.search(r"made-up", "".join(before))


def test_no_token_or_a_bad_one_is_401_and_somebody_without_a_subscription_403(system):
    url = f"{system.proxies[0].url}/v1"
    told = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
    assert system.http.post(f"{url}/chat/completions", json=told).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        system.client(User("nobody", "no-token")).models.list()
    with pytest.raises(openai.AuthenticationError):
        system.client(stranger()).chat.completions.create(**told)
    unmetered = system.zion.post("/admin/users", {"id": "without-external-id"})
    with pytest.raises(openai.PermissionDeniedError):
        system.client(User("", unmetered["token"])).chat.completions.create(**told)


def test_a_revoked_token_is_refused_once_it_is_no_longer_trusted(system):
    (proxy,) = system.start_all("proxy", JWT_CACHE_TTL_SECONDS="1")
    try:
        user = system.add_user()
        assert system.post(user, chat_body(user), proxy=proxy).status_code == 200
        system.zion.post(f"/admin/users/{user.external_id}/revoke")
        refused = eventually(
            lambda: system.post(user, chat_body(user), proxy=proxy),
            within_s=5,
            until=lambda answer: answer.status_code != 200,
        )
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    finally:
        proxy.kill()

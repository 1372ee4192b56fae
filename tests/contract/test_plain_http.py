"""What those see who speak HTTP to Sentinel without an SDK: methods, origins, connections, sizes, packings."""

from __future__ import annotations

import gzip
import http.client
import json

import httpx
import pytest

from tests.support.system import chat_body, eventually

ORIGIN = "https://app.example"
PREFLIGHT = {"origin": ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "x-mine"}
PICTURE = {"model": "sim/gzip", "prompt": "a cat"}


@pytest.fixture(scope="module")
def small(system):
    """A proxy that takes little, and calls from one origin's pages."""
    (proxy,) = system.start_all("proxy", MAX_BODY_BYTES="100000", CORS_ALLOW_ORIGINS=ORIGIN)
    yield proxy
    proxy.stop()


@pytest.fixture
def ask(system, user):
    """`ask(method, path, ...)` as the user; to `proxy` if one is given."""

    def asked(method, path, *, proxy=None, **more):
        url = (proxy or system.proxies[0]).url
        headers = {**user.headers, **more.pop("headers", {})}
        return system.http.request(method, f"{url}/v1/{path}", headers=headers, **more)

    return asked


@pytest.mark.parametrize("path", ["models", "models/openai/gpt-4o", "usage", "echo"])
def test_a_head_is_a_get_without_its_body(ask, path):
    whole, head = ask("GET", path), ask("HEAD", path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


@pytest.mark.parametrize("path", ["models/openai/gpt-4o", "models/openai%2Fgpt-4o"])
def test_an_id_of_a_model_may_have_slashes_in_it(ask, path):
    assert ask("GET", path).json()["id"] == "openai/gpt-4o"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "chat/completions", "POST"),
        ("HEAD", "embeddings", "POST"),
        ("OPTIONS", "responses", "POST"),
        ("POST", "usage", "GET, HEAD"),
        ("DELETE", "models/openai/gpt-4o", "GET, HEAD"),
        ("TRACE", "files", "GET, HEAD, OPTIONS, POST, PUT, PATCH, DELETE"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(ask, method, path, allow):
    answer = ask(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    assert method == "HEAD" or answer.json()["error"]["code"] == "method_not_supported"


def test_pages_of_the_origins_allowed_may_call_and_read_the_limits(ask, small, user):
    preflight = httpx.options(f"{small.url}/v1/chat/completions", headers=PREFLIGHT)
    assert (preflight.status_code, preflight.content) == (204, b"")
    assert "content-length" not in preflight.headers
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "x-mine"
    for body in (chat_body(user), {}):
        answer = ask("POST", "chat/completions", proxy=small, json=body, headers={"origin": ORIGIN})
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["access-control-expose-headers"] == "*"


def test_pages_of_others_may_not(ask, system, small, user):
    for proxy, origin in ((small, "https://other.example"), (system.proxies[0], ORIGIN)):
        headers = {**PREFLIGHT, "origin": origin}
        assert httpx.options(f"{proxy.url}/v1/chat/completions", headers=headers).status_code == 405
        answer = ask("POST", "chat/completions", proxy=proxy, json=chat_body(user), headers={"origin": origin})
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_one_connection_serves_call_after_call_whatever_came_of_the_last(system, user):
    connection = http.client.HTTPConnection(system.proxies[0].url.removeprefix("http://"), timeout=10)
    headers = {**user.headers, "content-type": "application/json"}
    bodies = [chat_body(user), {}, chat_body(user, stream=True), chat_body(user, "sim/status-500"), chat_body(user)]
    statuses = []
    connection.connect()
    first = connection.sock
    for body in bodies:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        answer.read()
        statuses.append(answer.status)
    assert statuses == [200, 400, 200, 500, 200]
    assert connection.sock is first
    connection.close()


def test_a_request_id_is_kept_where_it_can_be_and_made_where_not(ask):
    assert ask("POST", "chat/completions", json={}, headers={"x-request-id": "mine-7"}).headers["x-request-id"] == (
        "mine-7"
    )
    for unfit in ("two words", "x" * 129):
        made = ask("GET", "models", headers={"x-request-id": unfit}).headers["x-request-id"]
        assert made
        assert made != unfit


@pytest.mark.parametrize("path", ["chat/completions", "files"])
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_told_the_limit(ask, small, path, announced):
    body = b"a" * 150_000
    answer = ask("POST", path, proxy=small, content=body if announced else iter([body[:70_000], body[70_000:]]))
    assert answer.status_code == 413
    assert "(100000 bytes)" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["chat/completions", "images/generations"])
def test_trouble_with_the_gateways_account_comes_with_the_callers_limits_and_stands_in_the_log(ask, system, path):
    body = {"model": "sim/status-402", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    answer = ask("POST", path, json=body)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (502, "false")
    assert answer.headers["x-ratelimit-resource"]
    assert "status 402" in system.proxies[0].said


def test_a_packed_answer_to_what_only_passes_through_would_hide_its_tokens(ask, system, user):
    answer = ask("POST", "images/generations", json=PICTURE, headers={"accept-encoding": "gzip"})
    tokens = answer.json()["usage"]["output_tokens"]
    used = eventually(
        lambda: system.usage(user)["ai_output_tokens"]["used"], within_s=5, until=lambda used: used >= tokens
    )
    assert used == tokens


def test_one_packed_body_after_another_is_refused_since_only_the_first_would_be_read(ask, user):
    packed = gzip.compress(json.dumps(chat_body(user)).encode())
    answer = ask("POST", "chat/completions", content=packed * 2, headers={"content-encoding": "gzip"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_content_encoding"


@pytest.mark.parametrize("limit", [1_280, None])
def test_the_largest_cap_of_the_most_choices_is_promised_exactly_what_there_is(system, limit):
    user = system.add_user({"ai_output_tokens": limit})
    body = chat_body(user, "sim/tokens-40", n=128, max_completion_tokens=2**53)
    answer = system.post(user, body)
    assert answer.status_code == 200, answer.text
    each = 40 if limit is None else 10
    assert answer.headers.get("x-sentinel-max-output-tokens") == (None if limit is None else "10")
    told = eventually(
        lambda: system.usage(user)["ai_output_tokens"], within_s=5, until=lambda told: told["used"] == 128 * each
    )
    assert told["reserved"] == 0


def test_a_stream_asks_everybody_on_the_way_not_to_hold_it_back_and_says_so_once(ask, user):
    headers = ask("POST", "chat/completions", json=chat_body(user, stream=True)).headers
    assert headers.get_list("cache-control") == ["no-cache"]
    assert headers.get_list("x-accel-buffering") == ["no"]

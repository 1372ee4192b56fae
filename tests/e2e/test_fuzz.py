"""Whatever comes in, the proxy answers in OpenAI's form, never with a 500 of its own, and goes on.

The process is real and so is the upstream's simulator; hypothesis makes up bodies, paths, headers and whole requests.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import zlib

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.system import System, chat_body, eventually

pytestmark = pytest.mark.xdist_group("e2e-fuzz")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "250"))
METERED = ("chat/completions", "completions", "embeddings", "responses")
OWN_ERRORS = {400, 401, 403, 404, 405, 411, 413, 415, 422, 429, 503}
JSON = {"content-type": "application/json"}
BASES: dict[str, dict[str, object]] = {
    "chat/completions": {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "hi"}]},
    "completions": {"model": "openai/gpt-4o", "prompt": "hi"},
    "embeddings": {"model": "openai/gpt-4o", "input": "hi"},
    "responses": {"model": "openai/gpt-4o", "input": "hi"},
}
FIELDS = (
    *("model", "messages", "prompt", "input", "max_tokens", "max_completion_tokens", "max_output_tokens", "n"),
    *("best_of", "stream", "stream_options", "tools", "functions", "response_format", "text", "instructions", "user"),
)

numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([2**53, 2**63, 2**64, -1, 0, 1e300, -0.0]))
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(["role", "content", "type", "text", "url"]), st.text()), inner),
    ),
    max_leaves=12,
)
headers = st.dictionaries(
    st.sampled_from(["content-type", "content-encoding", "accept", "accept-encoding", "expect", "x-request-id", "te"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters="\x7f"), max_size=30).map(
        lambda text: text.encode("latin-1")
    ),
)


def fuzzed(test):
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=slow)(test)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with System(tmp_path_factory.mktemp("fuzz") / "system", LOG_LEVEL="warning") as running:
        running.start_all("proxy", MAX_BODY_BYTES="100000", RATE_LIMIT_REQUESTS="0")
        yield running


@pytest.fixture(scope="module")
def user(place):
    return place.add_user()


@pytest.fixture(autouse=True)
def nothing_is_left(place, user):
    """The process lives, nothing is reserved, and no defect was logged."""
    yield
    (proxy,) = place.proxies
    eventually(lambda: not any(one["reserved"] for one in place.usage(user).values()), within_s=10)
    assert "Traceback" not in proxy.said
    assert place.post(user, chat_body(user)).status_code == 200


def check(answer):
    if answer.status_code == 200:
        return
    assert answer.status_code in OWN_ERRORS, (answer.status_code, answer.text)
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)


@fuzzed
@given(path=st.sampled_from(METERED), raw=st.one_of(st.binary(max_size=300), st.text(max_size=100)), extra=headers)
def test_any_bytes_as_a_body(place, user, path, raw, extra):
    check(place.http.post(f"{place.proxies[0].url}/v1/{path}", content=raw, headers={**JSON, **extra, **user.headers}))


@fuzzed
@given(path=st.sampled_from(METERED), changes=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3))
def test_a_good_body_with_members_changed(place, user, path, changes):
    body = json.dumps({**BASES[path], **changes})
    check(place.http.post(f"{place.proxies[0].url}/v1/{path}", content=body, headers=JSON | user.headers))


@fuzzed
@given(path=st.sampled_from(METERED), data=st.data())
def test_a_good_body_with_bytes_changed(place, user, path, data):
    raw = bytearray(json.dumps({**BASES[path], "max_tokens": 9, "stream": True, "n": 2}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    check(place.http.post(f"{place.proxies[0].url}/v1/{path}", content=bytes(raw), headers=JSON | user.headers))


@fuzzed
@given(raw=st.binary(max_size=200), path=st.binary(max_size=60), method=st.sampled_from([b"GET", b"POST", b"X", b""]))
def test_any_bytes_on_the_wire(place, user, raw, path, method):
    (proxy,) = place.proxies
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=10) as wire:
        head = b"%b /v1/%b HTTP/1.1\r\nhost: a\r\nconnection: close\r\nauthorization: Bearer %b\r\n" % (
            method,
            path,
            user.token.encode(),
        )
        wire.sendall(head + raw + b"\r\n\r\n")
        wire.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := wire.recv(65_536):
            answer += piece
    assert not answer.startswith(b"HTTP/1.1 5"), answer[:300]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_packed_body_is_unpacked_and_metered(place, user, encoding):
    before = place.usage(user)["ai_input_tokens"]["used"]
    plain = json.dumps(chat_body(user, messages=[{"role": "user", "content": "hello " * 50}])).encode()
    body = gzip.compress(plain) if encoding == "gzip" else zlib.compress(plain)
    url = f"{place.proxies[0].url}/v1/chat/completions"
    answer = place.http.post(url, content=body, headers={**JSON, **user.headers, "content-encoding": encoding})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] > 50
    eventually(lambda: place.usage(user)["ai_input_tokens"]["used"] > before + 50, within_s=5)


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("br", b"x", 415),
        ("gzip, gzip", b"x", 415),
        ("gzip", b"no gzip", 400),
        ("gzip", gzip.compress(b"{}" * 1_000)[:-9], 400),
        ("gzip", gzip.compress(b" " * 50_000_000), 413),
    ],
)
def test_what_cannot_be_unpacked_within_bounds_is_refused(place, user, encoding, body, status):
    url = f"{place.proxies[0].url}/v1/chat/completions"
    answer = place.http.post(url, content=body, headers={**JSON, **user.headers, "content-encoding": encoding})
    assert answer.status_code == status
    check(answer)


def test_hundreds_of_odd_requests_over_one_connection_leave_it_usable(place, user):
    with httpx.Client(headers=user.headers, timeout=10) as client:
        for number in range(200):
            path = ("models/a/b/c", "usage", "chat/completions", "no/such/thing", "..%2f..%2fetc")[number % 5]
            answer = client.request(
                ("GET", "HEAD", "OPTIONS", "PUT", "DELETE")[number // 40], f"{place.proxies[0].url}/v1/{path}"
            )
            assert answer.status_code < 500

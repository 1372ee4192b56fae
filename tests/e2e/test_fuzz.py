"""Whatever comes in, the proxy answers in OpenAI's form, never with a 500 of its own, and goes on.

The process is real and so is the upstream's simulator; hypothesis makes up bodies, paths, headers and whole requests.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import zlib
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.system import System, chat_body, eventually

pytestmark = pytest.mark.xdist_group("e2e-fuzz")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "250"))
METERED = ("chat/completions", "completions", "embeddings", "responses")
OWN_ERRORS = {400, 404, 405, 413, 415}
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


segments = st.one_of(
    st.sampled_from(["chat", "completions", "models", "openai", "gpt-4o", "files", "usage", "images", "generations"]),
    st.sampled_from(["..", ".", "", "%2e%2e", "%2f", "%00", "%ff", ";a=b", "health", "metrics", "internal", "docs"]),
    st.text(max_size=8).map(quote),
)
paths = st.tuples(st.sampled_from(["/v1/", "/v1/", "/"]), st.lists(segments, max_size=5).map("/".join)).map("".join)
methods = st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])


# As many as a suite has time for; `make soak` has more.
AMOUNTS = pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(20 * EXAMPLES, marks=pytest.mark.soak)])


def fuzz(examples):
    return settings(max_examples=examples, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


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


def posted(place, user, path, content, extra=()):
    headers = {**JSON, **dict(extra), **user.headers}
    return place.http.post(f"{place.proxies[0].url}/v1/{path}", content=content, headers=headers)


def on_the_wire(place, sent, *, whole=True):
    """What comes back until the other side closes; unless it is a `whole` request, no more follows it."""
    port = int(place.proxies[0].url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as wire:
        wire.sendall(sent)
        if not whole:
            wire.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := wire.recv(65_536):
            answer += piece
    return answer


@AMOUNTS
def test_any_bytes_as_a_body(place, user, examples):
    @fuzz(examples)
    @given(path=st.sampled_from(METERED), raw=st.one_of(st.binary(max_size=300), st.text(max_size=100)))
    def refused(path, raw):
        check(posted(place, user, path, raw))

    refused()


@AMOUNTS
def test_any_headers_of_a_good_body(place, user, examples):
    @fuzz(examples)
    @given(path=st.sampled_from((*METERED, "images/generations")), extra=headers)
    def answered(path, extra):
        body = BASES.get(path, {"model": "sim/tokens-3", "prompt": "a cat"})
        check(posted(place, user, path, json.dumps(body), extra))

    answered()


@AMOUNTS
def test_a_good_body_with_members_changed(place, user, examples):
    changed = st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3)

    @fuzz(examples)
    @given(path=st.sampled_from(METERED), changes=changed)
    def answered(path, changes):
        check(posted(place, user, path, json.dumps({**BASES[path], **changes})))

    answered()


@AMOUNTS
def test_a_good_body_with_bytes_changed(place, user, examples):
    @fuzz(examples)
    @given(
        path=st.sampled_from(METERED), changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4)
    )
    def answered(path, changes):
        raw = bytearray(json.dumps({**BASES[path], "max_tokens": 9, "stream": True, "n": 2}).encode())
        for at, byte in changes:
            raw[at % len(raw)] = byte
        check(posted(place, user, path, bytes(raw)))

    answered()


@AMOUNTS
def test_any_method_on_any_path(place, user, examples):
    @fuzz(examples)
    @given(method=methods, path=paths, body=st.sampled_from([b"", b"{}", json.dumps(BASES["responses"]).encode()]))
    def answered(method, path, body):
        head = f"{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\nauthorization: Bearer {user.token}\r\n"
        answer = on_the_wire(place, head.encode() + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        told, _, content = answer.partition(b"\r\n\r\n")
        status = int(told.split()[1])
        assert status < 300 or status in OWN_ERRORS, answer[:300]
        if status >= 400 and method != "HEAD":
            assert isinstance(json.loads(content)["error"]["message"], str)

    answered()


@AMOUNTS
def test_any_bytes_on_the_wire(place, user, examples):
    @fuzz(examples)
    @given(
        raw=st.binary(max_size=200), line=st.sampled_from([b"", b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"])
    )
    def told_apart(raw, line):
        answer = on_the_wire(place, line + raw + b"\r\n\r\n", whole=False)
        assert answer[:12] in {b"", b"HTTP/1.1 400", b"HTTP/1.1 401", b"HTTP/1.1 404", b"HTTP/1.1 405"}

    told_apart()


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

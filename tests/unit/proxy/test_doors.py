"""Small decisions at the door: tokens, signatures, paths, what is shown of an account."""

from __future__ import annotations

import base64
import hmac
import json
from hashlib import sha256

import pytest

from sentinel_proxy.auth import TOKEN_BYTES_MAX, bearer_token, expiry_s
from sentinel_proxy.errors import ApiError
from sentinel_proxy.passthrough import upstream_path
from sentinel_proxy.routes import signed


def jwt(claims):
    encoded = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"eyJhbGciOiJIUzI1NiJ9.{encoded}.c2ln"


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer ", b"Basic abc", b"abc"])
def test_no_token_is_a_challenge(header):
    with pytest.raises(ApiError) as refused:
        bearer_token(header)
    assert refused.value.status == 401
    assert dict(refused.value.headers)["www-authenticate"] == 'Bearer realm="sentinel"'


@pytest.mark.parametrize("token", [b"a" * (TOKEN_BYTES_MAX + 1), "tokén".encode(), b"two words"])
def test_what_cannot_be_a_token_is_refused_unasked(token):
    with pytest.raises(ApiError) as refused:
        bearer_token(b"Bearer " + token)
    assert 'error="invalid_token"' in dict(refused.value.headers)["www-authenticate"]


def test_the_scheme_may_be_written_in_any_case():
    assert bearer_token(b"bearer  abc ") == b"abc"


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (jwt({"exp": 17}), 17.0),
        (jwt({"exp": 17.5}), 17.5),
        (jwt({}), None),
        (jwt({"exp": "soon"}), None),
        (jwt({"exp": True}), None),
        (jwt({"exp": float("nan")}), None),
        (jwt([1]), None),
        ("opaque", None),
        ("a.!!.c", None),
        ("a.e30.c.d", None),
    ],
)
def test_the_expiry_is_read_from_what_is_a_jwt(token, expected):
    assert expiry_s(token) == expected


def test_only_a_fresh_and_genuine_signature_passes():
    body, timestamp = b'{"externalId":"a"}', "1000"
    good = "sha256=" + hmac.new(b"secret", b"1000." + body, sha256).hexdigest()
    assert signed(body, timestamp, good, secret="secret", now_s=1_300)
    assert signed(body, timestamp, good.upper(), secret="secret", now_s=700)
    assert not signed(body, timestamp, good, secret="secret", now_s=1_301)
    assert not signed(body, timestamp, good, secret="other", now_s=1_000)
    assert not signed(body + b" ", timestamp, good, secret="secret", now_s=1_000)
    assert not signed(body, "1001", good, secret="secret", now_s=1_000)
    assert not signed(body, "x", good, secret="secret", now_s=1_000)
    assert not signed(body, "", "", secret="secret", now_s=1_000)
    assert not signed(body, timestamp, "sha256=é", secret="secret", now_s=1_000)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/files", "/files"),
        ("/v1/files/file-1/content", "/files/file-1/content"),
        ("/v1/models/openai/gpt-4o", "/models/openai/gpt-4o"),
        ("/v1/files/a b%", "/files/a%20b%25"),
        ("/v1/files/../chat/completions", None),
        ("/v1/..", None),
        ("/v1/./files", None),
        ("/v1/files\\..\\x", None),
        ("/v1/files?x=1", None),
        ("/v1/files#x", None),
        ("/v2/files", None),
    ],
)
def test_no_path_leaves_the_upstreams_base(path, expected):
    assert upstream_path(path) == expected

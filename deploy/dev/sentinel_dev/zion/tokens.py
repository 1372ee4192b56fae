"""Demo JWTs, HS256: enough of RFC 7519 for a simulator, nothing beyond the standard library and msgspec."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from typing import Any, Final

import msgspec

_HEADER: Final = b'{"alg":"HS256","typ":"JWT"}'


class BadToken(Exception):
    """Not a token of this secret, or past its `exp`; the message says which."""


def make_token(external_id: str, secret: str, exp: float) -> str:
    """A token that says its bearer is `external_id`, valid until `exp` (Unix seconds)."""
    claims = msgspec.json.encode({"sub": external_id, "exp": int(exp)})
    signed = _encode(_HEADER) + b"." + _encode(claims)
    return (signed + b"." + _encode(_signature(signed, secret))).decode()


def read_token(token: str, secret: str, now_s: float) -> str:
    """The subject of a valid token; raises BadToken."""
    signed, _, signature = token.encode("utf-8", "surrogateescape").rpartition(b".")
    head, _, claims = signed.partition(b".")
    header = _object(head)
    if header.get("alg") != "HS256" or not hmac.compare_digest(_decode(signature), _signature(signed, secret)):
        raise BadToken("Invalid token")
    told = _object(claims)
    subject, exp = told.get("sub"), told.get("exp")
    if not isinstance(subject, str) or isinstance(exp, bool) or not isinstance(exp, int | float):
        raise BadToken("Invalid token")
    if exp <= now_s:
        raise BadToken("Token expired")
    return subject


def _signature(signed: bytes, secret: str) -> bytes:
    return hmac.digest(secret.encode(), signed, hashlib.sha256)


def _encode(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def _decode(text: bytes) -> bytes:
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadToken("Invalid token") from error


def _object(part: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(_decode(part))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadToken("Invalid token") from error
    if not isinstance(value, dict):
        raise BadToken("Invalid token")
    return value

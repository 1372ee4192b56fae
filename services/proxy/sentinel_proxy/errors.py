"""What a caller is told when something is refused or fails: OpenAI's envelope, rendered in one place.

The official SDKs choose their exception by the status and decide by `Retry-After` and `x-should-retry` whether to
try again; `type` and `code` are what callers' own code looks at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, Literal

import msgspec

from sentinel_shared.errors import (
    RedisFull,
    RedisRefused,
    RedisUnavailable,
    SentinelError,
    UnknownUser,
    ZionRefusedKey,
    ZionRefusedToken,
    ZionUnavailable,
)

RETRY_HOPELESS_AFTER_S: Final = 60.0
"""The SDKs are told not to retry by themselves what cannot succeed within this."""

_INVALID_REQUEST: Final = "invalid_request_error"
_SERVER_ERROR: Final = "server_error"
_NO_RETRY: Final = ("x-should-retry", "false")
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitDetails:
    """The limit that binds, as `error.details` shows it; `reset_at` in Unix seconds, None if it never resets."""

    limit_name: str
    limit: int
    used: int
    reserved: int
    remaining: int
    reset_at: int | None


class ApiError(SentinelError):
    """An answer that is no success. The message is shown to the caller: no secret, prompt or inner name goes in it."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type: str,  # noqa: A002 - the envelope's word
        code: str | None = None,
        param: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
        details: LimitDetails | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = int(status)
        self.type = type
        self.code = code
        self.param = param
        self.headers = tuple(headers)
        self.details = details


def invalid_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400; `param` names the field at fault."""
    return ApiError(message, status=HTTPStatus.BAD_REQUEST, type=_INVALID_REQUEST, code=code, param=param)


def missing_token() -> ApiError:
    """401: no `Authorization: Bearer` at all."""
    return _unauthorized(
        "You didn't provide an API key. Provide your token in an Authorization header using Bearer auth "
        "(i.e. Authorization: Bearer YOUR_TOKEN).",
        code="missing_api_key",
        challenge='Bearer realm="sentinel"',
    )


def invalid_token() -> ApiError:
    """401: a token that is malformed, revoked or expired."""
    return _unauthorized(
        "Incorrect API key provided: the token is not valid or has expired.",
        code="invalid_api_key",
        challenge='Bearer realm="sentinel", error="invalid_token"',
    )


def _unauthorized(message: str, *, code: str, challenge: str) -> ApiError:
    return ApiError(
        message,
        status=HTTPStatus.UNAUTHORIZED,
        type=_INVALID_REQUEST,
        code=code,
        headers=[("www-authenticate", challenge)],
    )


def user_not_metered() -> ApiError:
    """403: a genuine caller whom Zion does not know as somebody with a subscription."""
    return ApiError(
        "Your account has no AI subscription.",
        status=HTTPStatus.FORBIDDEN,
        type="permission_error",
        code="user_not_metered",
    )


def unknown_url(method: str, path: str) -> ApiError:
    """404: no such route."""
    return ApiError(f"Invalid URL ({method} {path})", status=HTTPStatus.NOT_FOUND, type=_INVALID_REQUEST)


def method_not_allowed(method: str, path: str, *, allowed: Iterable[str]) -> ApiError:
    """405: the route exists, for other methods."""
    return ApiError(
        f"Not allowed to {method} on {path}",
        status=HTTPStatus.METHOD_NOT_ALLOWED,
        type=_INVALID_REQUEST,
        code="method_not_supported",
        headers=[("allow", ", ".join(allowed))],
    )


def unknown_model(model: str) -> ApiError:
    """404: no such model."""
    return ApiError(
        f"The model '{model}' does not exist or you do not have access to it.",
        status=HTTPStatus.NOT_FOUND,
        type=_INVALID_REQUEST,
        code="model_not_found",
        param="model",
    )


def body_too_large(max_bytes: int) -> ApiError:
    """413."""
    return ApiError(
        f"Maximum content size limit ({max_bytes} bytes) exceeded",
        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        type=_INVALID_REQUEST,
        code="request_too_large",
    )


def unknown_encoding(encoding: str) -> ApiError:
    """415: a body that is packed in a way that cannot be read, so that it cannot be metered either."""
    return ApiError(
        f"The body of your request is encoded as '{encoding[:64]}'. Send it as it is, or with gzip or deflate.",
        status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        type=_INVALID_REQUEST,
        code="unsupported_content_encoding",
    )


def over_limit(
    details: LimitDetails,
    *,
    code: Literal["rate_limit_exceeded", "insufficient_quota"],
    retry_after_s: float | None,
) -> ApiError:
    """429. `rate_limit_exceeded` passes by itself soon; `insufficient_quota` is the subscription's own limit.

    `retry_after_s` None: waiting never helps.
    """
    quota = code == "insufficient_quota"
    kind = "tokens" if details.limit_name.endswith("tokens") else "requests"
    return ApiError(
        f"You exceeded your current quota of {details.limit_name}: limit {details.limit}, used {details.used}, "
        f"reserved {details.reserved}."
        if quota
        else f"Rate limit reached for {details.limit_name}: limit {details.limit}, used {details.used}, "
        f"reserved {details.reserved}. Please try again later.",
        status=HTTPStatus.TOO_MANY_REQUESTS,
        type=code if quota else kind,
        code=code,
        headers=_retry_headers(retry_after_s),
        details=details,
    )


def upstream_rejected() -> ApiError:
    """502: the upstream refused the gateway's own account, which no caller can cure by trying again."""
    return ApiError(
        "The AI gateway rejected the request for a reason that is not yours.",
        status=HTTPStatus.BAD_GATEWAY,
        type=_SERVER_ERROR,
        code="upstream_rejected",
        headers=[_NO_RETRY],
    )


def upstream_unreachable(message: str = "The AI gateway could not be reached.") -> ApiError:
    """502: no connection, or one that broke before its answer; mid-stream, one that broke in its answer."""
    return ApiError(message, status=HTTPStatus.BAD_GATEWAY, type=_SERVER_ERROR, code="upstream_unreachable")


def upstream_timeout() -> ApiError:
    """504: the upstream was silent for too long."""
    return ApiError(
        "The AI gateway did not answer in time.",
        status=HTTPStatus.GATEWAY_TIMEOUT,
        type=_SERVER_ERROR,
        code="upstream_timeout",
    )


def unavailable(message: str, *, code: str = "service_unavailable", retry_after_s: float = 1.0) -> ApiError:
    """503: this cannot be decided or done now; it can soon."""
    return ApiError(
        message,
        status=HTTPStatus.SERVICE_UNAVAILABLE,
        type=_SERVER_ERROR,
        code=code,
        headers=_retry_headers(retry_after_s),
    )


def internal_error() -> ApiError:
    """500: a defect; the log knows more."""
    return ApiError(
        "The server had an error while processing your request.",
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
        type=_SERVER_ERROR,
        code="internal_error",
    )


def as_api_error(error: BaseException) -> ApiError:
    """What a caller is told about anything that was raised; what was not foreseen is a 500 without particulars."""
    match error:
        case ApiError():
            return error
        case ZionRefusedToken():
            return invalid_token()
        case UnknownUser():
            return user_not_metered()
        case ZionUnavailable():
            return unavailable(
                "Your limits cannot be checked at the moment.",
                code="limits_unavailable",
                retry_after_s=error.retry_after_s or 1.0,
            )
        case RedisUnavailable() | RedisFull() | RedisRefused() | ZionRefusedKey():
            return unavailable("Your limits cannot be checked at the moment.", code="limits_unavailable")
        case _:
            return internal_error()


def render(error: ApiError, *, headers: Iterable[tuple[bytes, bytes]] = ()) -> tuple[int, Headers, bytes]:
    """The whole answer: status, headers (those of the error, then `headers`), body."""
    body = msgspec.json.encode({"error": _envelope(error)})
    rendered = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    rendered += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in error.headers]
    rendered += headers
    return error.status, rendered, body


def render_event(error: ApiError, *, named: bool = False) -> bytes:
    """The same as an event, for a stream whose status is out already; to be sent between two events.

    `named` is the form of the responses API: an `event: error` whose data has a type of its own.
    """
    envelope = _envelope(error)
    if not named:
        return b"data: %b\n\n" % msgspec.json.encode({"error": envelope})
    # The reference shows the fields flat, the service sends them nested, and the SDKs raise on the nested ones.
    flat = {"type": "error", "code": error.code, "message": error.message, "param": error.param, "error": envelope}
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode(flat)


def _envelope(error: ApiError) -> dict[str, object]:
    envelope: dict[str, object] = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    if error.details is not None:
        envelope["details"] = error.details
    return envelope


def _retry_headers(retry_after_s: float | None) -> list[tuple[str, str]]:
    if retry_after_s is None or not math.isfinite(retry_after_s):
        return [_NO_RETRY]
    # Whole seconds, rounded up: a caller who comes back early is refused again.
    headers = [("retry-after", str(max(1, math.ceil(retry_after_s))))]
    return [*headers, _NO_RETRY] if retry_after_s > RETRY_HOPELESS_AFTER_S else headers

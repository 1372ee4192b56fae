"""Refusals and failures reach the official SDK as the exceptions its users catch, with OpenAI's envelope."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from sentinel_proxy import errors
from sentinel_proxy.errors import ApiError, LimitDetails, as_api_error, over_limit, render, render_event, unavailable
from sentinel_shared.errors import (
    RedisFull,
    RedisOutcomeUnknown,
    RedisRefused,
    RedisUnavailable,
    UnknownUser,
    ZionRefusedKey,
    ZionRefusedToken,
    ZionUnavailable,
)

DETAILS = LimitDetails(
    limit_name="ai_output_tokens", limit=1_000, used=900, reserved=100, remaining=0, reset_at=1_900_000_000
)


def answer_of(error: ApiError) -> tuple[int, dict[str, str], dict[str, Any]]:
    status, headers, body = render(error)
    return status, {name.decode(): value.decode() for name, value in headers}, json.loads(body)["error"]


def sdk_calls(error: ApiError, **options: Any) -> tuple[openai.APIError, int]:
    """What the SDK raises when it is answered with `error`, and how often it asked."""
    calls = 0

    def answer(_request: httpx2.Request) -> httpx2.Response:
        nonlocal calls
        calls += 1
        status, headers, body = render(error)
        return httpx2.Response(status, headers=headers, content=body)

    transport = httpx2.MockTransport(answer)
    with (
        openai.DefaultHttpxClient(transport=transport) as http,
        openai.OpenAI(api_key="k", base_url="http://sentinel.test/v1", http_client=http, **options) as client,
        pytest.raises(openai.APIError) as raised,
    ):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    return raised.value, calls


@pytest.mark.parametrize(
    ("error", "sdk_class", "status", "kind", "code"),
    [
        (errors.invalid_request("m", param="n"), openai.BadRequestError, 400, "invalid_request_error", None),
        (errors.missing_token(), openai.AuthenticationError, 401, "invalid_request_error", "missing_api_key"),
        (errors.invalid_token(), openai.AuthenticationError, 401, "invalid_request_error", "invalid_api_key"),
        (errors.user_not_metered(), openai.PermissionDeniedError, 403, "permission_error", "user_not_metered"),
        (errors.unknown_url("GET", "/v2"), openai.NotFoundError, 404, "invalid_request_error", None),
        (errors.unknown_model("m"), openai.NotFoundError, 404, "invalid_request_error", "model_not_found"),
        (errors.body_too_large(9), openai.APIStatusError, 413, "invalid_request_error", "request_too_large"),
        (
            over_limit(DETAILS, code="rate_limit_exceeded", retry_after_s=2),
            openai.RateLimitError,
            429,
            "tokens",
            "rate_limit_exceeded",
        ),
        (
            over_limit(DETAILS, code="insufficient_quota", retry_after_s=None),
            openai.RateLimitError,
            429,
            "insufficient_quota",
            "insufficient_quota",
        ),
        (errors.internal_error(), openai.InternalServerError, 500, "server_error", "internal_error"),
        (errors.upstream_rejected(), openai.InternalServerError, 502, "server_error", "upstream_rejected"),
        (errors.upstream_unreachable(), openai.InternalServerError, 502, "server_error", "upstream_unreachable"),
        (unavailable("Busy."), openai.InternalServerError, 503, "server_error", "service_unavailable"),
        (errors.upstream_timeout(), openai.InternalServerError, 504, "server_error", "upstream_timeout"),
    ],
)
def test_each_error_is_the_sdk_s_own_exception(
    error: ApiError, sdk_class: type[openai.APIStatusError], status: int, kind: str, code: str | None
) -> None:
    raised, _ = sdk_calls(error, max_retries=0)
    assert type(raised) is sdk_class
    assert raised.status_code == status
    assert (raised.type, raised.code, raised.param) == (kind, code, error.param)
    assert error.message in raised.message


@pytest.mark.parametrize(
    "error",
    [
        over_limit(DETAILS, code="insufficient_quota", retry_after_s=86_400),
        over_limit(DETAILS, code="insufficient_quota", retry_after_s=60.5),
        over_limit(DETAILS, code="insufficient_quota", retry_after_s=None),
        errors.upstream_rejected(),
    ],
)
def test_the_sdk_asks_once_where_waiting_cannot_help(error: ApiError) -> None:
    _, calls = sdk_calls(error, max_retries=5)
    assert calls == 1


@pytest.mark.parametrize(
    ("wait_s", "retry_after", "should_retry"),
    [
        (0.0, "1", None),
        (0.2, "1", None),
        (1.2, "2", None),
        (60.0, "60", None),
        (60.1, "61", "false"),
        (86_400.0, "86400", "false"),
        (None, None, "false"),
        (float("inf"), None, "false"),
    ],
)
def test_retry_after_is_in_whole_seconds_and_never_too_early(
    wait_s: float | None, retry_after: str | None, should_retry: str | None
) -> None:
    _, headers, _ = answer_of(over_limit(DETAILS, code="rate_limit_exceeded", retry_after_s=wait_s))
    assert headers.get("retry-after") == retry_after
    assert headers.get("x-should-retry") == should_retry


def test_a_429_says_which_limit_binds_and_how_far() -> None:
    _, _, error = answer_of(over_limit(DETAILS, code="insufficient_quota", retry_after_s=5))
    assert error["details"] == {
        "limit_name": "ai_output_tokens",
        "limit": 1_000,
        "used": 900,
        "reserved": 100,
        "remaining": 0,
        "reset_at": 1_900_000_000,
    }
    assert "ai_output_tokens" in error["message"]


def test_a_rate_limit_s_type_tells_requests_from_tokens_as_openai_does() -> None:
    requests = LimitDetails(limit_name="ai_requests", limit=1, used=1, reserved=0, remaining=0, reset_at=None)
    assert over_limit(requests, code="rate_limit_exceeded", retry_after_s=1).type == "requests"
    assert over_limit(DETAILS, code="rate_limit_exceeded", retry_after_s=1).type == "tokens"


def test_the_envelope_has_openai_s_four_fields_and_details_only_where_there_are_some() -> None:
    _, headers, error = answer_of(errors.invalid_request("Wrong é", param="n", code="invalid_type"))
    assert error == {"message": "Wrong é", "type": "invalid_request_error", "param": "n", "code": "invalid_type"}
    assert headers["content-type"] == "application/json"


def test_content_length_counts_bytes_and_further_headers_are_added() -> None:
    status, headers, body = render(errors.invalid_request("é"), headers=[(b"x-request-id", b"r1")])
    assert status == 400
    assert (b"content-length", b"%d" % len(body)) in headers
    assert headers[-1] == (b"x-request-id", b"r1")


def test_a_401_challenges_and_says_invalid_token_only_of_a_token() -> None:
    assert answer_of(errors.missing_token())[1]["www-authenticate"] == 'Bearer realm="sentinel"'
    assert 'error="invalid_token"' in answer_of(errors.invalid_token())[1]["www-authenticate"]


def test_a_405_names_what_is_allowed() -> None:
    status, headers, _ = answer_of(errors.method_not_allowed("PUT", "/v1/models", allowed=["GET", "HEAD"]))
    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("raised", "status", "retry_after"),
    [
        (errors.body_too_large(5), 413, None),
        (ZionRefusedToken("x"), 401, None),
        (UnknownUser("x"), 403, None),
        (ZionUnavailable("x", retry_after_s=7.5), 503, "8"),
        (ZionUnavailable("x"), 503, "1"),
        (ZionRefusedKey("x"), 503, "1"),
        (RedisUnavailable("x"), 503, "1"),
        (RedisOutcomeUnknown("x"), 503, "1"),
        (RedisFull("x"), 503, "1"),
        (RedisRefused("x"), 503, "1"),
        (RuntimeError("x"), 500, None),
    ],
)
def test_whatever_is_raised_has_one_answer(raised: Exception, status: int, retry_after: str | None) -> None:
    answered, headers, _ = answer_of(as_api_error(raised))
    assert (answered, headers.get("retry-after")) == (status, retry_after)


@pytest.mark.parametrize("foreign", [RuntimeError, RedisRefused, ZionRefusedKey, ZionUnavailable, UnknownUser])
def test_an_inner_error_s_words_do_not_reach_the_caller(foreign: Callable[[str], Exception]) -> None:
    assert b"canary-secret" not in render(as_api_error(foreign("canary-secret")))[2]


@pytest.mark.parametrize("named", [False, True])
def test_an_error_in_mid_stream_is_raised_by_the_sdk(named: bool) -> None:
    def answer(_request: httpx2.Request) -> httpx2.Response:
        event = render_event(errors.upstream_unreachable("Broken."), named=named)
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=event)

    with (
        openai.DefaultHttpxClient(transport=httpx2.MockTransport(answer)) as http,
        openai.OpenAI(api_key="k", base_url="http://sentinel.test/v1", http_client=http) as client,
    ):
        stream: Any = (
            client.responses.create(model="m", input="hi", stream=True)
            if named
            else client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], stream=True)
        )
        with pytest.raises(openai.APIError) as raised:
            list(stream)
    assert raised.value.message == "Broken."
    assert raised.value.code == "upstream_unreachable"


def test_an_error_event_is_one_whole_event() -> None:
    plain, named = (render_event(errors.invalid_request("a\nb\r\n\n"), named=named) for named in (False, True))
    assert plain.count(b"\n") == 2
    assert plain.endswith(b"\n\n")
    assert named.startswith(b"event: error\ndata: ")
    assert named.count(b"\n") == 3
    assert json.loads(named.split(b"data: ")[1])["type"] == "error"

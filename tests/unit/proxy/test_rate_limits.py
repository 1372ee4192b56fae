"""What a decision looks like from outside."""

from __future__ import annotations

import pytest

from sentinel_proxy.rate_limits import denial, limit_headers
from sentinel_shared.accounts import Decision, WindowPolicy

NOW_MS = 1_795_459_000_123
OFF = WindowPolicy(60_000, 0, 0)
HUNDRED = WindowPolicy(60_000, 100, 0)
UNLIMITED = (-1, 5, 0, 0)
ABSENT = (-2, 0, 0, 0)


def decision(*, limits=(UNLIMITED,) * 3, binding=0, wait_ms=0, window_requests=0, window_tokens=0, age_ms=1_200):
    admitted = 0 if binding else 1
    flat = [number for limit in limits for number in limit]
    return Decision([admitted, -1, binding, wait_ms, NOW_MS, 0, age_ms, *flat, window_requests, window_tokens])


def headers_of(a_decision, window=OFF):
    return {name.decode(): value.decode() for name, value in limit_headers(a_decision, window)}


def test_nothing_limited_shows_only_the_age_of_the_limits():
    assert headers_of(decision(limits=(UNLIMITED, ABSENT, UNLIMITED))) == {"x-sentinel-limits-age": "1"}


def test_the_limit_with_the_smallest_share_left_is_the_one_named():
    limits = ((1_000, 10, 0, 1_795_478_400), (1_000, 100, 850, 1_796_083_200), (10_000, 0, 0, 0))
    shown = headers_of(decision(limits=limits, window_requests=3), HUNDRED)
    assert shown["x-ratelimit-resource"] == "ai_input_tokens"
    assert shown["x-ratelimit-limit"] == "1000"
    assert shown["x-ratelimit-remaining"] == "50"
    assert shown["x-ratelimit-reset"] == "1796083200"


def test_openais_own_headers_show_the_tightest_of_requests_and_of_tokens():
    limits = ((1_000, 10, 0, 0), (1_000, 100, 850, NOW_MS // 1000 + 360), UNLIMITED)
    shown = headers_of(decision(limits=limits, window_requests=3), HUNDRED)
    assert shown["x-ratelimit-limit-requests"] == "100"
    assert shown["x-ratelimit-remaining-requests"] == "97"
    assert shown["x-ratelimit-remaining-tokens"] == "50"
    assert shown["x-ratelimit-reset-tokens"] == "6m0s"


def test_a_lifetime_limit_has_no_reset():
    shown = headers_of(decision(limits=((10, 1, 0, 0), UNLIMITED, UNLIMITED)))
    assert "x-ratelimit-reset" not in shown
    assert "x-ratelimit-reset-requests" not in shown


def test_a_limit_that_zion_has_lowered_below_what_is_used_shows_no_negative_remainder():
    assert headers_of(decision(limits=((10, 15, 0, 0), UNLIMITED, UNLIMITED)))["x-ratelimit-remaining"] == "0"


@pytest.mark.parametrize(
    ("binding", "code", "name"),
    [
        (1, "insufficient_quota", "ai_requests"),
        (2, "insufficient_quota", "ai_input_tokens"),
        (3, "insufficient_quota", "ai_output_tokens"),
        (11, "rate_limit_exceeded", "ai_requests"),
        (13, "rate_limit_exceeded", "ai_output_tokens"),
        (4, "rate_limit_exceeded", "requests_per_window"),
        (5, "rate_limit_exceeded", "tokens_per_window"),
    ],
)
def test_a_denial_names_the_limit_that_bound(binding, code, name):
    limits = ((7, 7, 0, 1_795_478_400),) * 3
    window = WindowPolicy(60_000, 7, 7)
    error = denial(decision(limits=limits, binding=binding, wait_ms=5_000, window_requests=7, window_tokens=7), window)
    assert error.status == 429
    assert error.code == code
    assert error.details is not None
    assert error.details.limit_name == name
    assert error.details.limit == 7
    assert error.details.remaining == 0
    assert dict(error.headers)["retry-after"] == "5"


def test_the_limit_that_denied_is_the_one_in_the_headers():
    limits = ((100, 99, 0, 0), (10, 4, 0, 0), UNLIMITED)
    assert headers_of(decision(limits=limits, binding=2, wait_ms=-1))["x-ratelimit-resource"] == "ai_input_tokens"


def test_waiting_for_a_lifetime_limit_is_not_suggested():
    error = denial(decision(limits=((1, 1, 0, 0), UNLIMITED, UNLIMITED), binding=1, wait_ms=-1), OFF)
    assert dict(error.headers) == {"x-should-retry": "false"}
    assert error.details is not None
    assert error.details.reset_at is None


def test_waiting_for_more_than_a_minute_is_not_left_to_the_sdks():
    error = denial(decision(limits=((1, 1, 0, 9), UNLIMITED, UNLIMITED), binding=1, wait_ms=61_000), OFF)
    assert dict(error.headers)["x-should-retry"] == "false"

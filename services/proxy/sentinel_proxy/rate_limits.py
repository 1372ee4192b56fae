"""What a decision looks like from outside: the rate-limit headers, and the 429. Pure."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Final, TypeAlias

from sentinel_proxy.errors import ApiError, LimitDetails, over_limit
from sentinel_shared.accounts import Binding, Decision, WindowPolicy
from sentinel_shared.contracts import LIMIT_NAMES
from sentinel_shared.units import format_openai_duration

Headers = list[tuple[bytes, bytes]]

_WINDOW_REQUESTS: Final = "requests_per_window"
_WINDOW_TOKENS: Final = "tokens_per_window"
_BUSY: Final = 10
_WINDOWS: Final = frozenset({Binding.WINDOW_REQUESTS, Binding.WINDOW_TOKENS})
_REQUESTS: Final = (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests")
_TOKENS: Final = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")
_REMAINING: Final = itemgetter(4)


_Gauge: TypeAlias = tuple[str, int, int, int, int, int]
"""One limit that is on: name, limit, used, reserved, remaining, when it resets in Unix seconds (0: never)."""


def limit_headers(decision: Decision, window: WindowPolicy) -> Headers:
    """`X-RateLimit-*` of the limit that binds first, OpenAI's own for requests and tokens, and the limits' age."""
    requests, tokens = _gauges(decision, window)
    headers: Headers = [(b"x-sentinel-limits-age", b"%d" % (decision.limits_age_ms // 1000))]
    gauges = requests + tokens
    if not gauges:
        return headers
    name, limit, _, _, remaining, reset_s = (
        _first_to_bind(gauges) if decision.admitted else _bound_by(decision.binding, gauges)
    )
    headers += (
        (b"x-ratelimit-limit", b"%d" % limit),
        (b"x-ratelimit-remaining", b"%d" % remaining),
        (b"x-ratelimit-resource", name.encode()),
    )
    if reset_s:
        headers.append((b"x-ratelimit-reset", b"%d" % reset_s))
    now_s = decision.now_ms / 1000
    if requests:
        _add_openai(headers, _REQUESTS, requests, now_s)
    if tokens:
        _add_openai(headers, _TOKENS, tokens, now_s)
    return headers


def denial(decision: Decision, window: WindowPolicy) -> ApiError:
    """The 429: `insufficient_quota` for a subscription's limit that is used up, else `rate_limit_exceeded`."""
    requests, tokens = _gauges(decision, window)
    name, limit, used, reserved, remaining, reset_s = _bound_by(decision.binding, requests + tokens)
    wait_ms = decision.wait_ms
    return over_limit(
        LimitDetails(
            limit_name=name,
            limit=limit,
            used=used,
            reserved=reserved,
            remaining=remaining,
            reset_at=reset_s or None,
        ),
        code="insufficient_quota" if decision.binding <= Binding.OUTPUT_TOKENS else "rate_limit_exceeded",
        retry_after_s=None if wait_ms < 0 else wait_ms / 1000,
    )


def binding_name(binding: Binding) -> str:
    """The limit's name, as headers, details and metrics have it."""
    if binding == Binding.WINDOW_REQUESTS:
        return _WINDOW_REQUESTS
    if binding == Binding.WINDOW_TOKENS:
        return _WINDOW_TOKENS
    return LIMIT_NAMES[binding % _BUSY - 1] if binding else ""


def _gauges(decision: Decision, window: WindowPolicy) -> tuple[list[_Gauge], list[_Gauge]]:
    """Those of requests, those of tokens."""
    requests: list[_Gauge] = []
    tokens: list[_Gauge] = []
    gauges = requests
    for index, name in enumerate(LIMIT_NAMES):
        limit, used, reserved, end_s = decision.limit(index)
        if limit >= 0:
            gauges.append((name, limit, used, reserved, max(0, limit - used - reserved), end_s))
        gauges = tokens
    wait_ms = window.window_ms if decision.admitted or decision.binding not in _WINDOWS else decision.wait_ms
    reset_s = -(-(decision.now_ms + wait_ms) // 1000)
    if window.requests:
        used = decision.window_requests
        requests.append((_WINDOW_REQUESTS, window.requests, used, 0, max(0, window.requests - used), reset_s))
    if window.tokens:
        used = decision.window_tokens
        tokens.append((_WINDOW_TOKENS, window.tokens, used, 0, max(0, window.tokens - used), reset_s))
    return requests, tokens


def _bound_by(binding: Binding, gauges: list[_Gauge]) -> _Gauge:
    """The script that denies names a limit that is on."""
    name = binding_name(binding)
    return next(gauge for gauge in gauges if gauge[0] == name)


def _first_to_bind(gauges: list[_Gauge]) -> _Gauge:
    first, least = gauges[0], math.inf
    for gauge in gauges:
        share = gauge[4] / gauge[1] if gauge[1] else 0.0
        if share < least:
            first, least = gauge, share
    return first


def _add_openai(headers: Headers, names: tuple[bytes, bytes, bytes], gauges: list[_Gauge], now_s: float) -> None:
    """The tightest of them."""
    _, limit, _, _, remaining, reset_s = min(gauges, key=_REMAINING) if len(gauges) > 1 else gauges[0]
    headers.append((names[0], b"%d" % limit))
    headers.append((names[1], b"%d" % remaining))
    if reset_s:
        headers.append((names[2], format_openai_duration(reset_s - now_s).encode()))

"""What a decision looks like from outside: the rate-limit headers, and the 429. Pure."""

from __future__ import annotations

from operator import itemgetter
from typing import Final, NamedTuple

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


class _Gauge(NamedTuple):
    """One limit that is on: `reset_s` in Unix seconds, 0 if it never resets."""

    name: str
    limit: int
    used: int
    reserved: int
    remaining: int
    reset_s: int


def limit_headers(decision: Decision, window: WindowPolicy) -> Headers:
    """`X-RateLimit-*` of the limit that binds first, OpenAI's own for requests and tokens, and the limits' age."""
    requests, tokens = _gauges(decision, window)
    headers: Headers = [(b"x-sentinel-limits-age", b"%d" % (decision.limits_age_ms // 1000))]
    gauges = requests + tokens
    if not gauges:
        return headers
    binding = _bound_by(decision.binding, gauges) if decision.binding else _first_to_bind(gauges)
    headers += (
        (b"x-ratelimit-limit", b"%d" % binding.limit),
        (b"x-ratelimit-remaining", b"%d" % binding.remaining),
        (b"x-ratelimit-resource", binding.name.encode()),
    )
    if binding.reset_s:
        headers.append((b"x-ratelimit-reset", b"%d" % binding.reset_s))
    now_s = decision.now_ms / 1000
    if requests:
        _add_openai(headers, _REQUESTS, _tightest(requests), now_s)
    if tokens:
        _add_openai(headers, _TOKENS, _tightest(tokens), now_s)
    return headers


def denial(decision: Decision, window: WindowPolicy) -> ApiError:
    """The 429: `insufficient_quota` for a subscription's limit that is used up, else `rate_limit_exceeded`."""
    requests, tokens = _gauges(decision, window)
    gauge = _bound_by(decision.binding, requests + tokens)
    wait_ms = decision.wait_ms
    return over_limit(
        LimitDetails(
            limit_name=gauge.name,
            limit=gauge.limit,
            used=gauge.used,
            reserved=gauge.reserved,
            remaining=gauge.remaining,
            reset_at=gauge.reset_s or None,
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
    for index, name in enumerate(LIMIT_NAMES):
        limit, used, reserved, end_s = decision.limit(index)
        if limit >= 0:
            gauge = _Gauge(name, limit, used, reserved, max(0, limit - used - reserved), end_s)
            (tokens if index else requests).append(gauge)
    wait_ms = decision.wait_ms if decision.binding in _WINDOWS else window.window_ms
    reset_s = -(-(decision.now_ms + wait_ms) // 1000)
    for limit, used, window_name, gauges in (
        (window.requests, decision.window_requests, _WINDOW_REQUESTS, requests),
        (window.tokens, decision.window_tokens, _WINDOW_TOKENS, tokens),
    ):
        if limit:
            gauges.append(_Gauge(window_name, limit, used, 0, max(0, limit - used), reset_s))
    return requests, tokens


def _bound_by(binding: Binding, gauges: list[_Gauge]) -> _Gauge:
    """The script that denies names a limit that is on."""
    name = binding_name(binding)
    return next(gauge for gauge in gauges if gauge.name == name)


def _first_to_bind(gauges: list[_Gauge]) -> _Gauge:
    return min(gauges, key=lambda gauge: gauge.remaining / gauge.limit if gauge.limit else 0.0)


def _tightest(gauges: list[_Gauge]) -> _Gauge:
    return min(gauges, key=_REMAINING) if len(gauges) > 1 else gauges[0]


def _add_openai(headers: Headers, names: tuple[bytes, bytes, bytes], gauge: _Gauge, now_s: float) -> None:
    headers.append((names[0], b"%d" % gauge.limit))
    headers.append((names[1], b"%d" % gauge.remaining))
    if gauge.reset_s:
        headers.append((names[2], format_openai_duration(gauge.reset_s - now_s).encode()))

"""What a decision looks like from outside: the rate-limit headers, and the 429. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sentinel_proxy.errors import ApiError, LimitDetails, over_limit
from sentinel_shared.accounts import Binding, Decision, WindowPolicy
from sentinel_shared.contracts import LIMIT_NAMES
from sentinel_shared.units import format_openai_duration

Headers = list[tuple[bytes, bytes]]

_WINDOW_REQUESTS: Final = "requests_per_window"
_WINDOW_TOKENS: Final = "tokens_per_window"
_BUSY: Final = 10


@dataclass(frozen=True, slots=True)
class _Gauge:
    """One limit that is on: `reset_s` in Unix seconds, None if it never resets."""

    name: str
    limit: int
    used: int
    reserved: int
    reset_s: int | None

    @property
    def remaining(self) -> int:
        return max(0, self.limit - self.used - self.reserved)


def limit_headers(decision: Decision, window: WindowPolicy) -> Headers:
    """`X-RateLimit-*` of the limit that binds first, OpenAI's own for requests and tokens, and the limits' age."""
    requests, tokens = _gauges(decision, window)
    headers: Headers = [(b"x-sentinel-limits-age", b"%d" % (decision.limits_age_ms // 1000))]
    gauges = requests + tokens
    if not gauges:
        return headers
    binding = _bound_by(decision.binding, gauges) or min(gauges, key=_share_left)
    headers += [
        (b"x-ratelimit-limit", b"%d" % binding.limit),
        (b"x-ratelimit-remaining", b"%d" % binding.remaining),
        (b"x-ratelimit-resource", binding.name.encode()),
    ]
    if binding.reset_s is not None:
        headers.append((b"x-ratelimit-reset", b"%d" % binding.reset_s))
    for kind, some in ((b"requests", requests), (b"tokens", tokens)):
        if some:
            tightest = min(some, key=_remaining)
            headers += [
                (b"x-ratelimit-limit-" + kind, b"%d" % tightest.limit),
                (b"x-ratelimit-remaining-" + kind, b"%d" % tightest.remaining),
            ]
            if tightest.reset_s is not None:
                wait_s = tightest.reset_s - decision.now_ms / 1000
                headers.append((b"x-ratelimit-reset-" + kind, format_openai_duration(wait_s).encode()))
    return headers


def denial(decision: Decision, window: WindowPolicy) -> ApiError:
    """The 429: `insufficient_quota` for a subscription's limit that is used up, else `rate_limit_exceeded`."""
    requests, tokens = _gauges(decision, window)
    gauge = _bound_by(decision.binding, requests + tokens)
    if gauge is None:  # a script that denies names a limit that is on
        raise AssertionError(f"no limit is on for binding {decision.binding}")
    wait_ms = decision.wait_ms
    return over_limit(
        LimitDetails(
            limit_name=gauge.name,
            limit=gauge.limit,
            used=gauge.used,
            reserved=gauge.reserved,
            remaining=gauge.remaining,
            reset_at=gauge.reset_s,
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
            (tokens if index else requests).append(_Gauge(name, limit, used, reserved, end_s or None))
    wait_ms = (
        decision.wait_ms if decision.binding in {Binding.WINDOW_REQUESTS, Binding.WINDOW_TOKENS} else window.window_ms
    )
    reset_s = -(-(decision.now_ms + wait_ms) // 1000)
    if window.requests:
        requests.append(_Gauge(_WINDOW_REQUESTS, window.requests, decision.window_requests, 0, reset_s))
    if window.tokens:
        tokens.append(_Gauge(_WINDOW_TOKENS, window.tokens, decision.window_tokens, 0, reset_s))
    return requests, tokens


def _bound_by(binding: Binding, gauges: list[_Gauge]) -> _Gauge | None:
    name = binding_name(binding)
    return next((gauge for gauge in gauges if gauge.name == name), None)


def _share_left(gauge: _Gauge) -> float:
    return gauge.remaining / gauge.limit if gauge.limit else 0.0


def _remaining(gauge: _Gauge) -> int:
    return gauge.remaining

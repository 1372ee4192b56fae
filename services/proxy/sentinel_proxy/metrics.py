"""The proxy's metrics, and the label children that the hot path uses, looked up once."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sentinel_shared.metrics import BoundedLabel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_OVERHEAD_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 3)
_RATIOS: Final = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01, 1.05, 1.1, 1.2, 1.5, 2, 3)


class ProxyMetrics:
    """All of them, in one registry. `models` are the model names that may become label values."""

    def __init__(self, registry: CollectorRegistry, *, models: Iterable[str]) -> None:
        self.registry = registry
        self.model_label = BoundedLabel(models)
        self._requests = Counter(
            "sentinel_requests_total", "Requests answered", ["status", "model", "endpoint"], registry=registry
        )
        self._duration = Histogram(
            "sentinel_request_duration_seconds",
            "From the request's first byte to the answer's last",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._overhead = Histogram(
            "sentinel_overhead_seconds",
            "Sentinel's own part of it: all but waiting for the upstream and the client",
            ["endpoint"],
            buckets=_OVERHEAD_SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "sentinel_time_to_first_token_seconds",
            "From the request's first byte to the first event of a stream",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter("sentinel_tokens_processed_total", "Tokens settled", ["type"], registry=registry)
        self._cache = Counter("sentinel_cache_hits_total", "Look-ups in caches", ["cache", "result"], registry=registry)
        self._decisions = Counter(
            "sentinel_limit_decisions_total",
            "Admissions, and refusals by the limit that bound",
            ["decision", "limit_name"],
            registry=registry,
        )
        self.estimate_ratio = Histogram(
            "sentinel_token_estimate_ratio",
            "The upstream's count of input tokens over Sentinel's own",
            ["family"],
            buckets=_RATIOS,
            registry=registry,
        )
        self._events = Counter(
            "sentinel_usage_events_total", "Settlements by what became of them", ["outcome"], registry=registry
        )
        self.tokenizer_fallbacks = Counter(
            "sentinel_tokenizer_fallbacks_total", "Lengths that stood in for counts", ["reason"], registry=registry
        )
        self.upstream_errors = Counter(
            "sentinel_upstream_errors_total", "Failures of the upstream", ["kind"], registry=registry
        )
        self.overshoot_tokens = Counter(
            "sentinel_output_overshoot_tokens_total", "Output beyond what was granted", registry=registry
        )
        self.local_admissions = Counter(
            "sentinel_admissions_without_redis_total",
            "Requests admitted while Redis was away",
            ["mode"],
            registry=registry,
        )
        self.overspend_bound_tokens = Gauge(
            "sentinel_local_overspend_bound_tokens",
            "The most that this process may have admitted beyond the limits while Redis was away",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.ready = Gauge(
            "sentinel_ready", "1 while this process can do its work", registry=registry, multiprocess_mode="livemin"
        )
        self.inflight = Gauge(
            "sentinel_inflight_requests", "Requests running", registry=registry, multiprocess_mode="livesum"
        )
        self.spool_waiting = Gauge(
            "sentinel_spool_settlements", "Settlements waiting on disk", registry=registry, multiprocess_mode="livesum"
        )
        self.limits_refreshes = Counter(
            "sentinel_limits_refreshes_total", "Refreshes that the proxy made itself", ["result"], registry=registry
        )
        self.breaker_open = Gauge(
            "sentinel_breaker_open",
            "1 while the breaker towards it is not closed",
            ["dependency"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        # There from the start: `increase` misses the first of a series that begins with it, and these wake people.
        for status in (401, 402, 403):
            self.upstream_errors.labels(f"rejected_{status}")
        self._events.labels("reservation_lost")
        # Bounded: statuses, known models and endpoints are few.
        self.request = _remembered(self._requests.labels)
        self.duration = _remembered(self._duration.labels)
        self.overhead = _remembered(self._overhead.labels)
        self.first_token = _remembered(self._first_token.labels)
        self.cache = _remembered(self._cache.labels)
        self.decision = _remembered(self._decisions.labels)
        self.event = _remembered(self._events.labels)
        self.input_tokens = self._tokens.labels("input")
        self.output_tokens = self._tokens.labels("output")


def _remembered(labels: Callable[..., Any]) -> Callable[..., Any]:
    return lru_cache(maxsize=4096)(labels)

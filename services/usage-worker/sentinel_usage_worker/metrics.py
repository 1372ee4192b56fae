"""The usage worker's metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class WorkerMetrics:
    """All of them, in one registry. `stats` are those that `/health` shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.ready = Gauge("sentinel_ready", "1 while this process can do its work", registry=registry)
        self.queue_depth = Gauge("sentinel_usage_queue_depth", "Users whose usage waits", registry=registry)
        self.oldest_age = Gauge(
            "sentinel_usage_oldest_age_seconds", "Age of the oldest usage that Zion was not told", registry=registry
        )
        self.open_batches = Gauge("sentinel_usage_open_batches", "Batches whose fate is open", registry=registry)
        self.dead_letters = Gauge("sentinel_usage_dead_letters", "What Zion refused for good", registry=registry)
        self.reservations = Gauge("sentinel_usage_reservations", "Requests that hold a lease", registry=registry)
        self.unaccounted = Gauge(
            "sentinel_usage_unaccounted_tokens",
            "Settled, but neither sent, dropped nor waiting: not 0 for long means lost or doubled; NaN: not computed",
            registry=registry,
        )
        self.batch_items = Histogram(
            "sentinel_usage_batch_items", "Items of a batch", buckets=(1, 3, 10, 30, 100, 300, 1000), registry=registry
        )
        self.flush_seconds = Histogram("sentinel_usage_flush_seconds", "Zion's part of a batch", registry=registry)
        self.lag_seconds = Histogram(
            "sentinel_usage_lag_seconds",
            "From a batch's claim until Zion's word on it was booked",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1_000, 10_000),
            registry=registry,
        )
        self.flushes = Counter(
            "sentinel_usage_flushes_total", "Batches by what became of them", ["result"], registry=registry
        )
        self.increments = Counter(
            "sentinel_usage_increments_total", "Items by Zion's word", ["result"], registry=registry
        )
        self.reaped = Counter("sentinel_usage_reaped_total", "Reservations whose proxy died", registry=registry)
        self.breaker_open = Gauge(
            "sentinel_breaker_open", "1 while the breaker towards it is not closed", ["dependency"], registry=registry
        )
        self.key_refused = Counter("sentinel_zion_key_refused_total", "Zion refused Sentinel's key", registry=registry)

    def stats(self) -> dict[str, float]:
        """For people: what waits, and how it goes."""
        shown = {
            "users_waiting": self.queue_depth,
            "oldest_age_seconds": self.oldest_age,
            "open_batches": self.open_batches,
            "dead_letters": self.dead_letters,
        }
        return {name: next(iter(gauge.collect())).samples[0].value for name, gauge in shown.items()}

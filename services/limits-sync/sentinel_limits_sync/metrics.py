"""The limits sync's metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class SyncMetrics:
    """All of them, in one registry. `stats` are those that `/health` shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.ready = Gauge("sentinel_ready", "1 while this process can do its work", registry=registry)
        self.refreshes = Counter(
            "sentinel_limits_refreshes_total", "Refreshes by what became of them", ["result"], registry=registry
        )
        self.refresh_seconds = Histogram(
            "sentinel_limits_refresh_seconds", "From asking Zion to the commit", registry=registry
        )
        self.running = Gauge("sentinel_limits_refreshes_running", "Refreshes under way", registry=registry)
        self.users = Gauge("sentinel_limits_users", "Users whose limits are kept fresh", registry=registry)
        self.lateness = Gauge(
            "sentinel_limits_lateness_seconds",
            "How long the limits that are most overdue have been due: above the lead time users wait or go stale",
            registry=registry,
        )
        self.malformed = Counter(
            "sentinel_limits_malformed_total",
            "Answers of Zion that made no sense; the last good ones stay",
            registry=registry,
        )
        self.breaker_open = Gauge(
            "sentinel_breaker_open", "1 while the breaker towards it is not closed", ["dependency"], registry=registry
        )

    def stats(self) -> dict[str, float]:
        """For people: how much there is to do, and how it goes."""
        shown = {"users": self.users, "refreshes_running": self.running, "lateness_seconds": self.lateness}
        return {name: next(iter(gauge.collect())).samples[0].value for name, gauge in shown.items()}

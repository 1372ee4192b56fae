"""What `sentinel-usage-worker` is told by its environment."""

from __future__ import annotations

from dataclasses import dataclass

from sentinel_shared.settings import ON_OR_OFF, PORT, REDIS_URL, CommonSettings, decimal, optional, whole


@dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    """The usage worker's settings; None is "not set"."""

    port: int = optional("SENTINEL_PORT", PORT, "8081")
    usage_flush_s: float = optional("USAGE_FLUSH_SECONDS", decimal("seconds", 0, 300), "2")
    usage_batch_items: int = optional("USAGE_BATCH_ITEMS", whole("items", 1, 1_000), "1000")
    zion_idempotency: bool = optional("ZION_IDEMPOTENCY", ON_OR_OFF, "on")
    own_arq_redis_url: str | None = optional("ARQ_REDIS_URL", REDIS_URL)

    @property
    def arq_redis_url(self) -> str:
        """Where arq keeps its own few keys: `ARQ_REDIS_URL`, else `REDIS_URL`; never a cluster."""
        return self.own_arq_redis_url or self.redis_url

    def contradictions(self) -> dict[str, str]:
        if not self.arq_redis_url.startswith("redis+cluster:"):
            return {}
        seen = "must be another Redis" if self.own_arq_redis_url else "is not set; it must be a Redis of its own"
        return {"ARQ_REDIS_URL": f"ARQ_REDIS_URL {seen}, for arq cannot use redis+cluster://"}

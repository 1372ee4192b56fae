"""What `sentinel-proxy` is told by its environment."""

# ruff: noqa: RUF009 -- the table calls `required` and `optional`, which return dataclass fields
from __future__ import annotations

import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sentinel_shared.settings import (
    FILE,
    FOLDER,
    HTTP_URL,
    ON_OR_OFF,
    ORIGINS,
    SECRET,
    CommonSettings,
    Secret,
    computed,
    decimal,
    one_of,
    optional,
    required,
    whole,
)


class QuotaMode(StrEnum):
    """`strict`: the output a request was granted is also its cap upstream; `soft`: never capped."""

    STRICT = "strict"
    SOFT = "soft"


class RedisFailMode(StrEnum):
    """What Redis being away means for a request: 503, a bounded local share, or let through."""

    CLOSED = "closed"
    LOCAL = "local"
    OPEN = "open"


def _temp_spool() -> Path:
    return Path(tempfile.gettempdir()) / "sentinel-spool"


@dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    """The proxy's settings; None is "not set"."""

    gateway_api_key: Secret = required("VERCEL_AI_GATEWAY_API_KEY", SECRET)
    gateway_url: str = optional("VERCEL_AI_GATEWAY_URL", HTTP_URL, "https://gateway.ai.vercel.com/v1")
    workers: int = optional("SENTINEL_WORKERS", whole("processes", 1, 256), "1")
    jwt_cache_ttl_s: int = optional("JWT_CACHE_TTL_SECONDS", whole("seconds", 1, 86_400), "300")

    rate_limit_requests: int = optional("RATE_LIMIT_REQUESTS", whole("requests", 0, 1_000_000_000), "100")
    rate_limit_tokens: int = optional("RATE_LIMIT_TOKENS", whole("tokens", 0, 1_000_000_000_000), "0")
    rate_limit_window_s: int = optional("RATE_LIMIT_WINDOW_SECONDS", whole("seconds", 1, 86_400), "60")
    quota_mode: QuotaMode = optional("QUOTA_MODE", one_of(QuotaMode), "strict")
    default_max_output_tokens: int = optional("DEFAULT_MAX_OUTPUT_TOKENS", whole("tokens", 1, 10_000_000), "32768")
    reservation_lease_s: int = optional("RESERVATION_LEASE_SECONDS", whole("seconds", 1, 3_600), "60")
    redis_fail_mode: RedisFailMode = optional("REDIS_FAIL_MODE", one_of(RedisFailMode), "local")
    spool_dir: Path = computed("SPOOL_DIR", FOLDER, _temp_spool, "a temp folder")
    token_calibration: bool = optional("TOKEN_CALIBRATION", ON_OR_OFF, "on")

    upstream_connect_timeout_s: float = optional("UPSTREAM_CONNECT_TIMEOUT_SECONDS", decimal("seconds", 0.05, 300), "5")
    upstream_idle_timeout_s: float = optional("UPSTREAM_IDLE_TIMEOUT_SECONDS", decimal("seconds", 0.05, 3_600), "120")
    upstream_max_connections: int = optional("UPSTREAM_MAX_CONNECTIONS", whole("connections", 1, 100_000), "1000")
    upstream_ca_file: Path | None = optional("UPSTREAM_CA_FILE", FILE)
    max_inflight_requests: int = optional("MAX_INFLIGHT_REQUESTS", whole("requests", 1, 100_000), "1000")
    max_body_bytes: int = optional("MAX_BODY_BYTES", whole("bytes", 1, 1_073_741_824), "20971520")
    disconnect_drain_s: float = optional("DISCONNECT_DRAIN_SECONDS", decimal("seconds", 0, 3_600), "30")
    cors_allow_origins: tuple[str, ...] | None = optional("CORS_ALLOW_ORIGINS", ORIGINS)

    webhook_secret: Secret | None = optional("WEBHOOK_SECRET", SECRET)
    admin_api_key: Secret | None = optional("ADMIN_API_KEY", SECRET)

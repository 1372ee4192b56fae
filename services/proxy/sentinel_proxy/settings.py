"""What `sentinel-proxy` is told by its environment."""

# ruff: noqa: RUF009 -- the table calls `required` and `optional`, which return dataclass fields
from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from sentinel_shared.settings import (
    FILE,
    FOLDER,
    HTTP_URL,
    ON_OR_OFF,
    ORIGINS,
    SECRET,
    CommonSettings,
    Secret,
    Takes,
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


class TracesSampler(StrEnum):
    """Which requests are traced: `parentbased_...` does as the client's own trace says where it has one."""

    ALWAYS_ON = "always_on"
    ALWAYS_OFF = "always_off"
    TRACEIDRATIO = "traceidratio"
    PARENTBASED_ALWAYS_ON = "parentbased_always_on"
    PARENTBASED_ALWAYS_OFF = "parentbased_always_off"
    PARENTBASED_TRACEIDRATIO = "parentbased_traceidratio"


class RedisFailMode(StrEnum):
    """What Redis being away means for a request: 503, a bounded local share, or let through."""

    CLOSED = "closed"
    LOCAL = "local"
    OPEN = "open"


def _temp_spool() -> Path:
    return Path(tempfile.gettempdir()) / "sentinel-spool"


def _headers(text: str) -> tuple[tuple[str, str], ...]:
    headers = []
    for header in text.split(","):
        name, _, value = (part.strip() for part in header.partition("="))
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) or not re.fullmatch(r"[ -~]+", unquote(value)):
            raise ValueError
        headers.append((name, unquote(value)))
    return tuple(headers)


def _name(text: str) -> str:
    if not re.fullmatch(r"[ -~]{1,100}", text):
        raise ValueError
    return text


_HEADERS: Final = Takes("HTTP headers: name=value, comma separated, values percent-encoded", _headers, secret=True)
_NAME: Final = Takes("a name of at most 100 ASCII characters", _name)


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

    otlp_endpoint: str | None = optional("OTEL_EXPORTER_OTLP_ENDPOINT", HTTP_URL)
    otlp_traces_endpoint: str | None = optional("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", HTTP_URL)
    otlp_headers: tuple[tuple[str, str], ...] | None = optional("OTEL_EXPORTER_OTLP_HEADERS", _HEADERS)
    otlp_certificate: Path | None = optional("OTEL_EXPORTER_OTLP_CERTIFICATE", FILE)
    otel_service_name: str = optional("OTEL_SERVICE_NAME", _NAME, "sentinel-proxy")
    otel_traces_sampler: TracesSampler = optional("OTEL_TRACES_SAMPLER", one_of(TracesSampler), "parentbased_always_on")
    otel_traces_sampler_arg: float = optional("OTEL_TRACES_SAMPLER_ARG", decimal("traces in one", 0, 1), "1")

    @property
    def traces_url(self) -> str | None:
        """Where traces go; None: nowhere, there are none."""
        if self.otlp_traces_endpoint is not None:
            return self.otlp_traces_endpoint
        return None if self.otlp_endpoint is None else f"{self.otlp_endpoint}/v1/traces"

"""What `sentinel-limits-sync` is told by its environment."""

from __future__ import annotations

from dataclasses import dataclass

from sentinel_shared.settings import PORT, CommonSettings, optional, whole


@dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    """The limits sync's settings: the common ones, its own port, and more calls to Zion at one time."""

    # Waiting calls are cheap, and a Zion that takes seconds must not make users stale.
    zion_max_concurrency: int = optional("ZION_MAX_CONCURRENCY", whole("requests", 2, 1_000), "512")
    port: int = optional("SENTINEL_PORT", PORT, "8082")

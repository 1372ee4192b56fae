"""What `sentinel-limits-sync` is told by its environment."""

from __future__ import annotations

from dataclasses import dataclass

from sentinel_shared.settings import PORT, CommonSettings, optional


@dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    """The limits sync's settings: the common ones, and its own port."""

    port: int = optional("SENTINEL_PORT", PORT, "8082")

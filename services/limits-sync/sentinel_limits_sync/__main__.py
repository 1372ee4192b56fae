"""`sentinel-limits-sync`: settings, then the service."""

from __future__ import annotations

import os

import uvloop

from sentinel_limits_sync import app
from sentinel_limits_sync.settings import Settings
from sentinel_shared.logging import configure_logging
from sentinel_shared.settings import run_service


def main() -> None:
    """The console script."""
    run_service(_run)


def _run() -> int:
    settings = Settings.from_env(os.environ)
    configure_logging("sentinel-limits-sync", settings.log_level, secrets=[settings.zion_api_key.reveal()])
    return uvloop.run(app.run(settings))


if __name__ == "__main__":
    main()

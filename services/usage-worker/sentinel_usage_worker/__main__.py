"""`sentinel-usage-worker`: the service, or `dead-letters` and one of its actions."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time

import uvloop

from sentinel_shared.logging import configure_logging
from sentinel_shared.settings import run_service
from sentinel_usage_worker import dead_letters, worker
from sentinel_usage_worker.settings import Settings


def main() -> None:
    """The console script."""
    run_service(_run)


def _run() -> int:
    options = dead_letters.parser().parse_args(sys.argv[1:])
    settings = Settings.from_env(os.environ)
    if options.command == "dead-letters":
        return asyncio.run(_dead_letters(settings, options))
    configure_logging("sentinel-usage-worker", settings.log_level, secrets=[settings.zion_api_key.reveal()])
    return uvloop.run(worker.run(settings))


async def _dead_letters(settings: Settings, options: argparse.Namespace) -> int:
    lane = await worker.connect(settings)
    try:
        return await dead_letters.run(worker.queue_of(settings, lane), options, now_s=time.time())
    finally:
        await lane.close()


if __name__ == "__main__":
    main()

"""`sentinel-proxy`: settings, the socket, and either one serving process or a family of them."""

from __future__ import annotations

import gc
import os
import socket
import sys
from typing import TYPE_CHECKING, Final

import uvicorn
import uvloop

from sentinel_proxy.app import SentinelApp, running
from sentinel_proxy.processes import SERVE_FD, Family
from sentinel_proxy.settings import Settings
from sentinel_shared.logging import configure_logging
from sentinel_shared.metrics import metrics_of_several_processes
from sentinel_shared.settings import run_service
from sentinel_shared.status_server import listen

if TYPE_CHECKING:
    from types import FrameType

_KEEP_ALIVE_S: Final = 75
"""Longer than the idle time-out of the usual load balancers, so that it is they who close."""


def main() -> None:
    """The console script."""
    run_service(_run)


def _run() -> int:
    settings = Settings.from_env(os.environ)
    secrets = [settings.zion_api_key, settings.gateway_api_key, settings.webhook_secret, settings.admin_api_key]
    configure_logging(
        "sentinel-proxy", settings.log_level, secrets=[secret.reveal() for secret in secrets if secret is not None]
    )
    if len(sys.argv) == 3 and sys.argv[1] == SERVE_FD:
        return uvloop.run(_serve(settings, socket.socket(fileno=int(sys.argv[2]))))
    listening = listen(settings.host, settings.port)
    if settings.workers == 1:
        return uvloop.run(_serve(settings, listening))
    with metrics_of_several_processes(os.environ):
        return Family(listening, os.environ, workers=settings.workers, grace_s=settings.shutdown_grace_s).run()


async def _serve(settings: Settings, listening: socket.socket) -> int:
    async with running(settings) as app:
        _collect_rarely()
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.shutdown_grace_s,
        )
        await _Server(config, app).serve(sockets=[listening])
    return 0


def _collect_rarely() -> None:
    """What has been loaded by now stays: no collection need walk it again. 3 % of a request's CPU, more of its p99."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


class _Server(uvicorn.Server):
    """Ends with 0 on a signal, and is not ready from that moment on."""

    def __init__(self, config: uvicorn.Config, app: SentinelApp) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for SIGTERM and SIGINT."""
        self._app.health.draining = True
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # it would raise the signal again when done, and end with its code


if __name__ == "__main__":
    main()

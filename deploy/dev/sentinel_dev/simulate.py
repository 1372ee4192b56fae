"""Runs a simulator as a process: `python -m sentinel_dev.simulate zion|gateway --port N`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn

from sentinel_dev.gateway import Gateway, create_gateway
from sentinel_dev.zion import DEMO_API_KEY, DEMO_SECRET, Zion, create_zion

GRACE_S = 10


class _Server(uvicorn.Server):
    """On SIGTERM, what hangs hangs up and what is slow hurries, so that all ends by itself."""

    def __init__(self, config: uvicorn.Config, app: Zion | Gateway) -> None:
        super().__init__(config)
        self._app = app

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own would raise the signal again afterwards: an orderly stop must exit 0.
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.closing.set()
        await super().shutdown(sockets)


async def serve(app: Zion | Gateway, sockets: list[socket.socket]) -> None:
    """Serves on sockets that listen, until SIGTERM or SIGINT."""
    config = uvicorn.Config(
        app,
        loop="none",
        http="httptools",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    await _Server(config, app).serve(sockets)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line once it listens; 2 for an address that cannot be had."""
    options = _options(arguments)
    if options.simulator == "zion":
        app: Zion | Gateway = create_zion(
            secret=options.secret, api_key=options.api_key, honour_keys=not options.ignore_idempotency_keys
        )
    else:
        app = create_gateway(
            key=options.key,
            base_path=options.base_path,
            exact=not options.bench,
            keep_requests=100 if options.bench else 10_000,
        )
    try:
        listener = socket.create_server((options.host, options.port), backlog=2_048)
    except OSError as error:
        print(f"{options.simulator}: cannot listen on {options.host}:{options.port}: {error}", file=sys.stderr)
        return 2
    host, port = listener.getsockname()[:2]
    print(f"simulated {options.simulator} on http://{host}:{port}", flush=True)
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(serve(app, [listener]))
    return 0


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop  # noqa: PLC0415  where there is none, asyncio's own loop serves as well
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sentinel_dev.simulate", description=__doc__)
    simulators = parser.add_subparsers(dest="simulator", required=True)
    zion = simulators.add_parser("zion", help="the governance API")
    zion.add_argument("--secret", default=DEMO_SECRET, help="signs the demo tokens")
    zion.add_argument("--api-key", default=DEMO_API_KEY, help="what x-api-key must be")
    zion.add_argument("--ignore-idempotency-keys", action="store_true", help="apply a repeated key again")
    gateway = simulators.add_parser("gateway", help="the OpenAI-compatible gateway")
    gateway.add_argument("--key", default=None, help="the bearer key to ask for; none: anyone may")
    gateway.add_argument("--base-path", default="/v1")
    gateway.add_argument("--bench", action="store_true", help="count by length and remember little: for benchmarks")
    for simulator in (zion, gateway):
        simulator.add_argument("--host", default="127.0.0.1")
        simulator.add_argument("--port", type=int, default=0, help="0: any free one, printed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

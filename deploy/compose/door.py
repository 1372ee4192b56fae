"""One address before any number of proxies: each connection goes to the next one that takes it.

For docker-compose.yml, where scaled containers cannot share a host port. It knows TCP, not HTTP, so streams pass as
they are; a proxy that drains has stopped listening and is passed over. On SIGTERM no connection is taken any more, and
those that are open may end.
"""

# ruff: noqa: INP001 -- run as a file, a part of no package
from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Final

_CONNECT_TIMEOUT_S: Final = 1.0
_CHUNK_BYTES: Final = 65_536
_GRACE_S: Final = 25.0


class Door:
    """Relays connections to whatever addresses `host` has at the moment."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._turns = itertools.count()
        self._open: set[asyncio.Task[None]] = set()

    async def welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection; with no proxy there it is closed."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 -- a stream's callback runs in a task
        self._open.add(task)
        try:
            inner = await self._proxy()
            if inner is not None:
                try:
                    await asyncio.gather(_relay(reader, inner[1]), _relay(inner[0], writer))
                finally:
                    await _close(inner[1])
        finally:
            await _close(writer)
            self._open.discard(task)

    async def drain(self, grace_s: float) -> None:
        """Until no connection is open, `grace_s` at most."""
        if self._open:
            await asyncio.wait(self._open, timeout=grace_s)

    async def _proxy(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError:
            return None
        addresses = sorted({address[4][0] for address in found})
        first = next(self._turns) % len(addresses)
        for address in addresses[first:] + addresses[:first]:
            with contextlib.suppress(OSError):  # TimeoutError is one of them
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    return await asyncio.open_connection(str(address), self._port)
        return None


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the reader's side ends; then the writer's is told so. A reset of either ends both."""
    with contextlib.suppress(OSError):
        while chunk := await reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        return
    writer.transport.abort()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def run(listen_host: str, listen_port: int, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    door = Door(host, port)
    server = await asyncio.start_server(door.welcome, listen_host, listen_port, backlog=1024)
    taken = server.sockets[0].getsockname()
    print(f"door on {taken[0]}:{taken[1]}, to {host}:{port}", flush=True)  # noqa: T201 -- its one line for the log
    await stopping.wait()
    server.close()
    await door.drain(_GRACE_S)


def main(arguments: Sequence[str]) -> None:
    """`door.py [--listen HOST:PORT] HOST:PORT`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", default="0.0.0.0:8080", metavar="HOST:PORT")
    parser.add_argument("proxies", metavar="HOST:PORT", help="a name with the addresses of all proxies")
    options = parser.parse_args(arguments)
    listen_host, _, listen_port = options.listen.rpartition(":")
    host, _, port = options.proxies.rpartition(":")
    asyncio.run(run(listen_host, int(listen_port), host, int(port)))


if __name__ == "__main__":
    main(sys.argv[1:])

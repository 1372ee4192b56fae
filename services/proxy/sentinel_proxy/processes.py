"""Several processes of one proxy: one listening socket, one child per process, a new one for each that dies."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from types import FrameType

SERVE_FD: Final = "--serve-fd"
_RESTART_PAUSE_S: Final = 1.0
_POLL_S: Final = 0.1
_KILL_MARGIN_S: Final = 10.0

_log: Final = logging.getLogger(__name__)


class Family:
    """The children of this process. `run` returns the exit code for the whole."""

    def __init__(self, listening: socket.socket, environ: Mapping[str, str], *, workers: int, grace_s: float) -> None:
        self._listening = listening
        self._environ = dict(environ)
        self._workers = workers
        self._grace_s = grace_s
        self._children: list[subprocess.Popen[bytes]] = []
        self._ending = False

    def run(self) -> int:
        """Until SIGTERM or SIGINT; a child that cannot start at all (exit 1 or 2 at once) ends the family."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._children = [self._spawn() for _ in range(self._workers)]
        started_s = time.monotonic()
        code = 0
        while not self._ending:
            time.sleep(_POLL_S)
            for at, child in enumerate(self._children):
                if child.poll() is not None and not self._ending:
                    if child.returncode in {1, 2} and time.monotonic() - started_s < 10:
                        code, self._ending = child.returncode, True
                        break
                    _log.error("a proxy process ended with %s, a new one is started", child.returncode)
                    time.sleep(_RESTART_PAUSE_S)
                    self._children[at] = self._spawn()
        return max(code, self._end())

    def _spawn(self) -> subprocess.Popen[bytes]:
        fd = self._listening.fileno()
        return subprocess.Popen(  # noqa: S603 - this very program
            [sys.executable, "-m", "sentinel_proxy", SERVE_FD, str(fd)], pass_fds=[fd], env=self._environ
        )

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._ending = True

    def _end(self) -> int:
        self._listening.close()
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        deadline_s = time.monotonic() + self._grace_s + _KILL_MARGIN_S
        worst = 0
        for child in self._children:
            try:
                worst = max(worst, abs(child.wait(timeout=max(0.1, deadline_s - time.monotonic()))))
            except subprocess.TimeoutExpired:
                child.kill()
                worst = 1
        return worst

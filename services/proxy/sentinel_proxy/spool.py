"""Where settlements wait on disk while Redis is away: append-only files of JSON lines, replayed later.

Each process writes its own file and holds a lock on it; a file whose lock is free belonged to a process that died, and
whoever finds it replays it.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import msgspec

from sentinel_shared.accounts import Settlement
from sentinel_shared.errors import SentinelError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

_SUFFIX: Final = ".spool"


class SpoolUnusable(SentinelError):
    """The spool's folder cannot be written; the message names `SPOOL_DIR`."""


class _Line(msgspec.Struct, omit_defaults=True):
    """One settlement, or (with `replayed_s` alone) the mark that all lines before it were sent to Redis then."""

    settlement: Settlement | None = None
    attempted_s: float | None = None
    replayed_s: float | None = None


_decode: Final = msgspec.json.Decoder(_Line).decode
_encode: Final = msgspec.json.Encoder().encode


class Spool:
    """The file of one process, opened with the first settlement that has to wait. Small files: it blocks.

    `ledger` names the Redis that the settlements belong to: proxies of another one may share the folder.
    """

    def __init__(self, folder: Path, *, ledger: str = "ledger") -> None:
        self._folder = folder
        self._ledger = ledger
        self._fd: int | None = None
        self._path: Path | None = None
        self.waiting = 0
        """Settlements in this process's file."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f"{uuid4().hex}.probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise SpoolUnusable(f"SPOOL_DIR {folder} cannot be written: {error.strerror}") from error

    def put(self, settlement: Settlement, *, attempted_s: float | None) -> None:
        """Keep it, so that the death of this process does not lose it; `sync` makes it outlive the machine's.

        `attempted_s` is when it was sent to Redis without an answer (Unix s), None: never. Raises OSError when the
        disk refuses.
        """
        self._append(_Line(settlement=settlement, attempted_s=attempted_s))
        self.waiting += 1

    def sync(self) -> None:
        """Force what was kept to the disk itself. Blocks: call it in a thread."""
        if self._fd is not None:
            os.fsync(self._fd)

    async def replay(self, settle: Callable[[Settlement], Awaitable[object]], *, now_s: float) -> int:
        """Settle all that waits here and in the files of dead processes; how many there were.

        What `settle` raises ends the replay; everything stays for the next one, and has effect once.
        """
        replayed = 0
        if self.waiting:
            self._append(_Line(replayed_s=now_s))
            replayed = self.waiting
            await _settle_all(self._own().read_bytes(), settle, now_s=now_s)
            self._close(remove=self.waiting == replayed)
        for path in sorted(self._folder.glob(f"{self._ledger}-*{_SUFFIX}")):
            if path != self._path:
                replayed += await _adopt(path, settle, now_s=now_s)
        return replayed

    def close(self) -> None:
        """Leave the file to whoever comes next."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _own(self) -> Path:
        if self._path is None:
            self._path = self._folder / f"{self._ledger}-{uuid4().hex}{_SUFFIX}"
        return self._path

    def _append(self, line: _Line) -> None:
        if self._fd is None:
            self._fd = os.open(self._own(), os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(self._fd, _encode(line) + b"\n")

    def _close(self, *, remove: bool) -> None:
        if remove:
            self._own().unlink(missing_ok=True)
            self.close()
            self._path = None
            self.waiting = 0


async def _adopt(path: Path, settle: Callable[[Settlement], Awaitable[object]], *, now_s: float) -> int:
    try:
        fd = os.open(path, os.O_APPEND | os.O_RDWR)
    except FileNotFoundError:
        return 0  # another process was faster
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return 0  # its writer lives
    try:
        content = os.read(fd, os.fstat(fd).st_size)
        # A torn last line ends here; the mark starts on a line of its own.
        os.write(fd, b"\n" + _encode(_Line(replayed_s=now_s)) + b"\n")
        os.fsync(fd)
        replayed = await _settle_all(content, settle, now_s=now_s)
        _unlink(path)
    finally:
        os.close(fd)
    return replayed


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


async def _settle_all(content: bytes, settle: Callable[[Settlement], Awaitable[object]], *, now_s: float) -> int:
    settlements = _settlements(content.split(b"\n"), now_s=now_s)
    for settlement in settlements:
        await settle(settlement)
    return len(settlements)


def _settlements(lines: Iterable[bytes], *, now_s: float) -> list[Settlement]:
    """What waits, each with the age of its first attempt that may have reached Redis."""
    waiting: list[tuple[Settlement, float | None]] = []
    for text in lines:
        try:
            line = _decode(text)
        except msgspec.DecodeError:
            continue  # empty, or torn by a crash while it was written: never confirmed to anyone
        if line.settlement is not None:
            waiting.append((line.settlement, line.attempted_s))
        elif line.replayed_s is not None and line.replayed_s < now_s:
            waiting = [(s, line.replayed_s if at is None else min(at, line.replayed_s)) for s, at in waiting]
    return [replace(s, attempt_age_ms=0 if at is None else max(0, int((now_s - at) * 1000))) for s, at in waiting]


def ledger_name(redis_url: str) -> str:
    """The same for all proxies of one Redis, whatever their credentials; fit for a file name."""
    scheme, _, rest = redis_url.partition("://")
    return sha256(f"{scheme}://{rest.rpartition('@')[2]}".encode()).hexdigest()[:12]

"""Where settlements wait on disk while Redis is away: append-only files of JSON lines, replayed later.

Each process writes its own file and holds a lock on it; a file whose lock is free was left for replay, or belonged to a
process that died, and whoever finds it replays it.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from hashlib import sha256
from typing import TYPE_CHECKING, Final, cast
from uuid import uuid4

import msgspec
from msgspec.structs import replace

from sentinel_shared.accounts import Settlement
from sentinel_shared.errors import RedisRefused, SentinelError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from pathlib import Path

    Settle = Callable[[Settlement], Awaitable[object]]

_SUFFIX: Final = ".spool"
_FILE_SETTLEMENTS: Final = 1_000
"""A file that holds more is left: what is read at once stays small, however long Redis is away."""
_TOGETHER: Final = 32
"""Settled at once: more would keep requests waiting in Redis, fewer would wait for each reply in turn."""


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
    """The files of one process, the first made with the first settlement that has to wait.

    `ledger` names the Redis that the settlements belong to: proxies of another one may share the folder.
    """

    def __init__(self, folder: Path, *, ledger: str = "ledger") -> None:
        self._folder = folder
        self._ledger = ledger
        self._file: _File | None = None
        self._left: dict[Path, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f"{uuid4().hex}.probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise SpoolUnusable(f"SPOOL_DIR {folder} cannot be written: {error.strerror}") from error

    @property
    def waiting(self) -> int:
        """Settlements in this process's files."""
        return sum(self._left.values()) + (self._file.settlements if self._file else 0)

    def put(self, settlement: Settlement, *, attempted_s: float | None) -> None:
        """Keep it, so that the death of this process does not lose it; `sync` makes it outlive the machine's.

        `attempted_s` is when it was sent to Redis without an answer (Unix s), None: never. Raises OSError when the
        disk refuses.
        """
        if self._file is None:
            self._file = _File(self._folder / f"{self._ledger}-{uuid4().hex}{_SUFFIX}")
        self._file.append(_Line(settlement=settlement, attempted_s=attempted_s))
        self._file.settlements += 1

    async def sync(self) -> None:
        """Force what was kept to the disk itself. A long file is left for `replay`. Raises OSError."""
        file = self._file
        if file is None:
            return
        if file.settlements >= _FILE_SETTLEMENTS:
            self._leave()
        try:
            await asyncio.to_thread(os.fsync, file.fd)
        finally:
            if file is not self._file:
                file.close()

    async def replay(self, settle: Settle, reach: Callable[[], Awaitable[None]], *, now_s: float) -> int:
        """Settle all that waits here and in the files of dead processes; how many there were.

        `reach` raises while Redis is away: no attempt is noted where none was made, so that what Redis never saw may
        wait as long as it takes. What `settle` raises ends the replay; that file and the later ones stay, and have
        effect once. But a settlement that Redis refuses does not hold up others: RedisRefused comes at the end.
        """
        own = self._file
        left = sorted(path for path in self._folder.glob(f"{self._ledger}-*{_SUFFIX}") if not own or path != own.path)
        if left or own:
            await reach()
        replayed, refused = 0, None
        try:
            for path in (*left, *([own.path] if own else [])):
                if own and path == own.path and own is self._file:
                    self._leave().close()
                try:
                    replayed += await _adopt(path, settle, now_s=now_s)
                except RedisRefused as error:
                    refused = error
        finally:
            self._left = {path: count for path, count in self._left.items() if path.exists()}
        if refused is not None:
            raise refused
        return replayed

    def close(self) -> None:
        """Leave what waits to whoever comes next."""
        if self._file is not None:
            self._leave().close()

    def _leave(self) -> _File:
        file = cast("_File", self._file)
        self._left[file.path] = file.settlements
        self._file = None
        return file


class _File:
    """A file that this process writes and has locked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settlements = 0
        unnamed = path.with_suffix(".new")
        self.fd = os.open(unnamed, os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY, 0o600)
        try:
            # Locked before it has a name that others look for.
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unnamed.rename(path)
        except OSError:
            self.close()
            raise

    def append(self, line: _Line) -> None:
        _write(self.fd, line)

    def close(self) -> None:
        os.close(self.fd)


def _write(fd: int, line: _Line) -> None:
    # Each begins a line of its own, so that one torn by a crash or a full disk takes no other with it.
    text = b"\n" + _encode(line)
    if os.write(fd, text) < len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def _adopt(path: Path, settle: Settle, *, now_s: float) -> int:
    try:
        fd = os.open(path, os.O_APPEND | os.O_RDWR)
    except FileNotFoundError:
        return 0  # another process was faster
    try:
        if not _locked(fd):
            return 0  # its writer lives, or another process is at it
        content = os.read(fd, os.fstat(fd).st_size)
        settlements, marked = _settlements(content.split(b"\n"), now_s=now_s)
        if not marked:
            _write(fd, _Line(replayed_s=now_s))
            await asyncio.to_thread(os.fsync, fd)
        await _settle_all(settlements, settle)
        _remove(path)
    finally:
        os.close(fd)
    return len(settlements)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _settle_all(settlements: list[Settlement], settle: Settle) -> None:
    refused: list[RedisRefused] = []
    for at in range(0, len(settlements), _TOGETHER):
        together = settlements[at : at + _TOGETHER]
        for outcome in await asyncio.gather(*map(settle, together), return_exceptions=True):
            if isinstance(outcome, RedisRefused):
                refused.append(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
    if refused:
        raise refused[0]


def _settlements(lines: Iterable[bytes], *, now_s: float) -> tuple[list[Settlement], bool]:
    """What waits, each with the age of its first attempt that may have reached Redis; whether a mark is the last."""
    waiting: list[tuple[Settlement, float | None]] = []
    marked = True
    for text in lines:
        try:
            line = _decode(text)
        except msgspec.DecodeError:
            continue  # empty, or torn while it was written: never confirmed to anyone
        if line.settlement is not None:
            waiting.append((line.settlement, line.attempted_s))
            marked = False
        elif line.replayed_s is not None:
            waiting = [(s, line.replayed_s if at is None else min(at, line.replayed_s)) for s, at in waiting]
            marked = True
    aged = [replace(s, attempt_age_ms=0 if at is None else max(1, int((now_s - at) * 1000))) for s, at in waiting]
    return aged, marked


def ledger_name(redis_url: str) -> str:
    """The same for all proxies of one Redis, whatever their credentials; fit for a file name."""
    scheme, _, rest = redis_url.partition("://")
    return sha256(f"{scheme}://{rest.rpartition('@')[2]}".encode()).hexdigest()[:12]

"""One connection to one Redis server: commands of a tick in one write, replies matched strictly in order."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, cast

import hiredis

from sentinel_shared.errors import RedisOutcomeUnknown, RedisUnavailable, SentinelError
from sentinel_shared.redis_lane.replies import Reply
from sentinel_shared.redis_lane.script import Script

Part: TypeAlias = bytes | str | int

pack: Final = cast("Callable[[tuple[Part, ...]], bytes]", hiredis.pack_command)

_INCOMPLETE: Final = object()
ASKING: Final = pack((b"ASKING",))
_LAST_LOOK_S: Final = 0.02
_TIMER_SLACK_S: Final = 0.001  # uvloop rounds timers to milliseconds and may be that much early

now_s: Final = time.monotonic
"""What deadlines are made of. Not the loop's time, which uvloop rounds, and reads once a tick."""


@dataclass(slots=True)
class LaneStats:
    """Counts since `RedisLane.connect`."""

    reconnects: int = 0
    timeouts: int = 0
    """Time ran out, for a connection with its written commands or for a command that could not be sent."""
    overflows: int = 0
    """Commands refused because too much was waiting already."""
    script_misses: int = 0
    """Scripts that Redis had forgotten."""
    redirects: int = 0
    """Commands that a cluster sent elsewhere, or later."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one connection may hold: commands without a reply, and bytes that the socket has not taken yet."""

    command_timeout_s: float
    max_outstanding: int
    max_unsent_bytes: int


class Command:
    """A packed command and the future that its reply goes to. Without a `key` it is never sent elsewhere."""

    __slots__ = ("deadline", "future", "hops", "key", "packed", "parts", "script")

    def __init__(
        self,
        future: asyncio.Future[Reply],
        deadline: float,
        parts: tuple[Part, ...],
        key: bytes | str | None = None,
        script: Script | None = None,
    ) -> None:
        self.future = future
        self.deadline = deadline
        self.parts = parts
        self.packed = pack(parts)
        self.key = key
        self.script = script
        self.hops = 0

    def fail(self, error: SentinelError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Connection(asyncio.Protocol):
    """Opening, ready, lost; never ready again once lost.

    While it opens, or while the socket takes no more, commands gather and wait, each within its own deadline.
    A cancelled command keeps its place, and its reply is thrown away: so a reply cannot reach another's caller.
    `on_error` gets every error reply; `on_lost` is called once, and only for a connection that had been ready.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        bounds: Bounds,
        stats: LaneStats,
        on_error: Callable[[Connection, Command, hiredis.ReplyError], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._bounds = bounds
        self._stats = stats
        self._on_error = on_error
        self._on_lost = on_lost
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._unsent: list[Command] = []
        self._unsent_bytes = 0
        self._written: deque[Command] = deque()
        self._transport: asyncio.Transport | None = None
        self._closed = loop.create_future()
        self._opened = False
        self._paused = False
        self._flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._last_look = False
        self._retire_reason: str | None = None
        self._lost_reason: str | None = None

    @property
    def ready(self) -> bool:
        return self._opened and self._lost_reason is None

    # --- commands in ---

    def send(self, command: Command) -> None:
        """Queues `command` for this tick's write. What cannot be queued fails with RedisUnavailable at once."""
        if self._has_room_for(command):
            self._unsent.append(command)
            self._queued(command)

    def send_asking(self, command: Command) -> None:
        """As `send`, preceded by ASKING: the two travel, wait and fail as one, so that the flag hits no other."""
        command.packed = ASKING + command.packed
        if self._has_room_for(command):
            asking = Command(self._loop.create_future(), command.deadline, (b"ASKING",))
            asking.packed = b""  # its bytes are the beginning of the other's
            asking.future.cancel()  # nobody waits for its reply
            self._unsent += (asking, command)
            self._queued(command)

    def ask_now(self, commands: Sequence[tuple[Part, ...]]) -> list[asyncio.Future[Reply]]:
        """Writes `commands` ahead of all that waits for `open`; the caller bounds the wait for their replies."""
        asked = [Command(self._loop.create_future(), math.inf, parts) for parts in commands]
        if self._transport is None or self._lost_reason is not None:
            for command in asked:
                command.fail(RedisUnavailable(self._lost_reason or "not connected"))
        else:
            self._written.extend(asked)
            self._transport.write(b"".join([command.packed for command in asked]))
        return [command.future for command in asked]

    def _has_room_for(self, command: Command) -> bool:
        if self._lost_reason is not None:
            command.fail(RedisUnavailable(self._lost_reason))
            return False
        if (
            len(self._written) + len(self._unsent) >= self._bounds.max_outstanding
            or self._unsent_bytes + len(command.packed) > self._bounds.max_unsent_bytes
        ):
            self._stats.overflows += 1
            command.fail(RedisUnavailable("too many commands are waiting for Redis"))
            return False
        return True

    def _queued(self, command: Command) -> None:
        self._unsent_bytes += len(command.packed)
        if not self._flush_due:
            self._schedule_flush()
        if command.deadline < self._timer_at:
            self._arm(command.deadline)

    def _schedule_flush(self) -> None:
        if self._opened and not self._paused:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        unsent = self._unsent
        if not unsent or self._paused or self._transport is None:
            return
        self._unsent = []
        self._unsent_bytes = 0
        self._written.extend(unsent)
        self._transport.write(b"".join([command.packed for command in unsent]))

    # --- time: one timer for the connection, while anything is outstanding ---

    def _arm(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_later(deadline - _LAST_LOOK_S - now_s(), self._check_deadlines)

    def _check_deadlines(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        due = now_s() + _LAST_LOOK_S + _TIMER_SLACK_S
        timeout_ms = round(self._bounds.command_timeout_s * 1000)
        silent = any(command.deadline <= due for command in self._written)
        overdue = [command for command in self._unsent if command.deadline <= due]
        if (silent or overdue) and not self._last_look:
            # If it was this process that stood still, what is missing is at the door: let the loop turn first.
            self._last_look = True
            self._timer_at = -math.inf
            self._timer = self._loop.call_later(_LAST_LOOK_S, self._check_deadlines)
            return
        self._last_look = False
        if silent:
            # Its reply may yet come, so nothing more can be matched on this connection.
            self._stats.timeouts += 1
            self.lose(f"no reply within {timeout_ms} ms")
            return
        if overdue:
            self._stats.timeouts += len(overdue)
            self._unsent = [command for command in self._unsent if command.deadline > due]
            self._unsent_bytes = sum(len(command.packed) for command in self._unsent)
            for command in overdue:
                command.fail(RedisUnavailable(f"could not be sent within {timeout_ms} ms"))
        earliest = min((command.deadline for command in (*self._written, *self._unsent)), default=math.inf)
        if earliest < math.inf:
            self._arm(earliest)

    # --- life ---

    def open(self) -> bool:
        """The greeting is over: commands may go. False if the connection was lost meanwhile."""
        self._opened = self._lost_reason is None
        self._schedule_flush()
        return self._opened

    def retire(self, reason: str) -> None:
        """Called from `on_error`: lost as soon as the replies at hand have been given out."""
        self._retire_reason = reason

    def lose(self, reason: str) -> None:
        """Ends the connection. Unsent commands fail with RedisUnavailable, written ones with RedisOutcomeUnknown."""
        if self._lost_reason is not None:
            return
        self._lost_reason = reason
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        for command in self._written:
            command.fail(RedisOutcomeUnknown(f"{reason}; the command may or may not have been applied"))
        for command in self._unsent:
            command.fail(RedisUnavailable(reason))
        self._written.clear()
        self._unsent.clear()
        if self._opened:
            self._on_lost(reason)

    async def close(self, reason: str) -> None:
        """`lose`, and waits until the socket is gone."""
        self.lose(reason)
        if self._transport is not None:
            await self._closed

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._lost_reason is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(f"connection lost: {exc}" if exc else "connection closed by Redis")
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._schedule_flush()

    def data_received(self, data: bytes) -> None:
        if self._lost_reason is not None:
            return
        written = self._written
        gets = self._reader.gets
        try:
            self._reader.feed(data)
            while (reply := gets()) is not _INCOMPLETE:
                if not written:
                    self.lose("a reply that nobody asked for")
                    return
                command = written.popleft()
                if isinstance(reply, hiredis.ReplyError):
                    self._on_error(self, command, reply)
                elif not command.future.done():
                    command.future.set_result(reply)
        except hiredis.ProtocolError as error:
            self.lose(f"not Redis's protocol: {error}")
            return
        if self._retire_reason is not None:
            self.lose(self._retire_reason)

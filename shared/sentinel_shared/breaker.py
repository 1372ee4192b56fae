"""What stands between Sentinel and a Zion in trouble: a circuit breaker, and a budget of calls at one time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Final

from sentinel_shared.clock import Clock

WINDOW_S: Final = 10
CALLS_MIN: Final = 20
FAILURE_SHARE: Final = 0.5
BACKOFF_MIN_S: Final = 0.5
# One probe in five seconds burdens nobody, and what piled up meanwhile starts to drain soon after Zion's return.
BACKOFF_MAX_S: Final = 5.0


class BreakerState(StrEnum):
    """`closed` lets all through, `open` nothing, `half_open` one probe."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class _Second:
    at_s: int
    calls: int = 0
    failures: int = 0


class Breaker:
    """Opens when half of at least 20 calls within 10 s have failed; then one probe at a time, after a back-off.

    The back-off is jittered to 50-100 % and doubles from 0.5 s to at most 5 s with each probe that fails. No I/O, no
    tasks: who is allowed must `record` how it went, or `abandon` when it never came to know.
    """

    def __init__(self, clock: Clock, random: Random) -> None:
        self._clock = clock
        self._random = random
        self._window: deque[_Second] = deque()
        self._state = BreakerState.CLOSED
        self._backoff_s = BACKOFF_MIN_S
        self._probe_at_s = 0.0

    @property
    def state(self) -> BreakerState:
        """For metrics and health; an open breaker becomes half-open only when somebody asks to be let through."""
        return self._state

    @property
    def retry_after_s(self) -> float:
        """How long until the next probe may go; 0 when closed or overdue."""
        if self._state is BreakerState.CLOSED:
            return 0.0
        return max(0.0, self._probe_at_s - self._clock.monotonic_s())

    def allow(self) -> bool:
        """Whether a call may go out now. Half-open, the one who is told True is the probe."""
        if self._state is BreakerState.CLOSED:
            return True
        if self._state is BreakerState.OPEN and self._clock.monotonic_s() >= self._probe_at_s:
            self._state = BreakerState.HALF_OPEN
            return True
        return False

    def record(self, *, success: bool) -> None:
        """How a call that was allowed went.

        Half-open, a straggler from before the opening is heard like the probe: it saw the same Zion.
        """
        if self._state is BreakerState.CLOSED:
            calls, failures = self._count(success=success)
            if calls >= CALLS_MIN and failures >= FAILURE_SHARE * calls:
                self._open()
        elif self._state is BreakerState.HALF_OPEN:
            if success:
                self._close()
            else:
                self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)
                self._open()

    def abandon(self) -> None:
        """A call that was allowed ended without a verdict (cancelled, or never sent): the next one may probe."""
        if self._state is BreakerState.HALF_OPEN:
            self._state = BreakerState.OPEN

    def trip(self) -> None:
        """Opens at once, at the longest back-off: Zion has said that it will refuse every further call."""
        self._backoff_s = BACKOFF_MAX_S
        self._open()

    def _count(self, *, success: bool) -> tuple[int, int]:
        now_s = int(self._clock.monotonic_s())
        if not self._window or self._window[-1].at_s != now_s:
            self._window.append(_Second(now_s))
        self._window[-1].calls += 1
        self._window[-1].failures += not success
        while self._window[0].at_s <= now_s - WINDOW_S:
            self._window.popleft()
        return sum(second.calls for second in self._window), sum(second.failures for second in self._window)

    def _open(self) -> None:
        self._state = BreakerState.OPEN
        self._probe_at_s = self._clock.monotonic_s() + self._backoff_s * self._random.uniform(0.5, 1.0)

    def _close(self) -> None:
        self._state = BreakerState.CLOSED
        self._backoff_s = BACKOFF_MIN_S
        self._window.clear()


class ZionBudget:
    """At most `slots` calls to Zion at one time, `kept` of them never given to background refreshes.

    So whoever waits for an answer (a cold miss) finds those free, however much the background has to refresh.
    """

    def __init__(self, slots: int, *, kept: int) -> None:
        if not 0 <= kept < slots:
            raise ValueError("at least one slot must be left for the background")
        self.slots = slots
        self._all = asyncio.Semaphore(slots)
        self._background = asyncio.Semaphore(slots - kept)

    @asynccontextmanager
    async def slot(self, *, background: bool = False) -> AsyncIterator[None]:
        """Waits for a free slot and holds it; for how long to wait is the caller's to say."""
        async with AsyncExitStack() as held:
            if background:
                await held.enter_async_context(self._background)
            await held.enter_async_context(self._all)
            yield

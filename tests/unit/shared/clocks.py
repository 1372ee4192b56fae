"""A clock that stands still until a test moves it."""

from __future__ import annotations


class ManualClock:
    """Unix time and monotonic time go together; a sleep moves both at once."""

    def __init__(self, unix_s: float = 1_767_225_600.0) -> None:
        self._unix_s = unix_s
        self._monotonic_s = 1_000.0

    def unix_s(self) -> float:
        return self._unix_s

    def monotonic_s(self) -> float:
        return self._monotonic_s

    async def sleep(self, duration_s: float) -> None:
        self.advance(duration_s)

    def advance(self, duration_s: float) -> None:
        self._unix_s += duration_s
        self._monotonic_s += duration_s

"""A user's limits from Zion into the account: one way for cold misses, refreshes ahead of expiry and webhooks."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from sentinel_shared.accounts import Accounts, CommitOutcome, Freshness
from sentinel_shared.errors import RedisUnavailable, UnknownUser

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentinel_shared.clock import Clock
    from sentinel_shared.directory import Directory
    from sentinel_shared.zion_client import ZionClient

REFRESH_AHEAD: Final = 0.8
JITTER: Final = 0.1
_LATE_JITTER: Final = 0.02
_WEIGHT_UP: Final = 0.3
_WEIGHT_DOWN: Final = 0.1
_ROUND_S: Final = 0.2
"""limits-sync looks every 200 ms who is due, and Redis takes its time."""


class LimitsRefresher:
    """Asks Zion and commits. Used by the proxy (cold misses, limits past their freshness) and by limits-sync."""

    def __init__(
        self,
        accounts: Accounts,
        directory: Directory,
        zion: ZionClient,
        *,
        freshness: Freshness,
        clock: Clock,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._accounts = accounts
        self._directory = directory
        self._zion = zion
        self._freshness = freshness
        self._clock = clock
        self._uniform = uniform
        self._latency_s: float | None = None

    async def refresh(self, external_id: str, *, background: bool) -> CommitOutcome:
        """Ask Zion once and commit its answer; OVERTAKEN means that someone else has just committed a newer one.

        `background` refreshes leave the slots towards Zion that are kept for callers who wait.

        Raises UnknownUser (remembered for all replicas), ZionUnavailable, ZionRefusedKey, and the lane's errors.
        """
        start = await self._accounts.refresh_begin(external_id)
        asked_s = self._clock.monotonic_s()
        try:
            limits = await self._zion.limits(external_id, background=background)
        except UnknownUser:
            await self._note_unknown(external_id)
            raise
        self._latency_s = smoothed_s(self._latency_s, self._clock.monotonic_s() - asked_s)
        fresh_s = self._freshness.fresh_ms / 1000
        return await self._accounts.refresh_commit(
            external_id=external_id,
            start=start,
            limits=limits,
            freshness=self._freshness,
            next_refresh_s=next_refresh_s(fresh_s, latency_s=self._latency_s, uniform=self._uniform()),
            now_s=self._clock.unix_s(),
        )

    async def _note_unknown(self, external_id: str) -> None:
        try:
            await self._directory.note_unknown(external_id)
        except RedisUnavailable:
            return  # the next request asks Zion again


def smoothed_s(known_s: float | None, seen_s: float) -> float:
    """How long Zion takes, after one more call. Up fast: an answer that comes too late is worse than one too early."""
    if known_s is None:
        return seen_s
    return known_s + (_WEIGHT_UP if seen_s > known_s else _WEIGHT_DOWN) * (seen_s - known_s)


def next_refresh_s(fresh_s: float, *, latency_s: float, uniform: float) -> float:
    """When to refresh limits that are fresh for `fresh_s`: at 80 % +- 10 %, so that users spread out.

    Earlier where Zion takes so long (`latency_s`) that its answer would come too late. `uniform` is in [0, 1).
    """
    usual_s = fresh_s * (REFRESH_AHEAD + JITTER * (2 * uniform - 1))
    in_time_s = fresh_s * (1 - _LATE_JITTER * uniform) - 1.03 * latency_s - _ROUND_S
    return max(0.1 * fresh_s, min(usual_s, in_time_s))

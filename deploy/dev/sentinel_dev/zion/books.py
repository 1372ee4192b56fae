"""What a simulated Zion applied: an append-only ledger, totals per user and limit, and the keys it has seen."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from sentinel_dev.zion.periods import rfc3339
from sentinel_dev.zion.users import User

USER_NOT_FOUND: Final = "User not found"
LIMIT_NOT_FOUND: Final = "Limit not found"

_ENTRIES_MOST: Final = 200_000
_PERIODS_MOST: Final = 1_000
_ANSWERS_MOST_BYTES: Final = 64 * 1024 * 1024
_KEYS_MOST: Final = 200_000


@dataclass(slots=True)
class Total:
    """All that was ever applied to one limit of one user."""

    applied: int = 0
    increments: int = 0
    doubled: int = 0
    """Of `applied`: what came again under a key that had been applied already, because keys are not honoured."""
    periods: dict[str, int] = field(default_factory=dict)
    """By when the period began, "ever" where it never did; the oldest are forgotten, `applied` keeps them."""

    def add(self, amount: int, period: str, *, again: bool) -> None:
        self.applied += amount
        self.increments += 1
        self.doubled += amount if again else 0
        if period not in self.periods and len(self.periods) >= _PERIODS_MOST:
            del self.periods[next(iter(self.periods))]
        self.periods[period] = self.periods.get(period, 0) + amount


@dataclass(slots=True)
class _Seen:
    fingerprint: bytes
    status: int
    answer: bytes


@dataclass(slots=True)
class KeyCounts:
    """What became of Idempotency-Keys."""

    distinct: int = 0
    doubled: int = 0
    """Requests under a key that had been answered before."""
    suppressed: int = 0
    """Of those: answered again from what was stored, nothing applied."""
    conflicting: int = 0
    """Of those: with another body, refused."""
    missing: int = 0
    """Increments without a key."""


class KeyConflict(Exception):
    """A key came back with another route or body than it had."""


class Keys:
    """Answers by Idempotency-Key, the latest 200,000 and 64 MiB of them."""

    def __init__(self, *, honoured: bool) -> None:
        self.honoured = honoured
        self.counts = KeyCounts()
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._bytes = 0

    def answered(self, key: str, route: str, body: bytes) -> tuple[int, bytes] | None:
        """What was answered before, to be answered again. Raises KeyConflict; None = to be applied."""
        if not key:
            self.counts.missing += 1
            return None
        seen = self._seen.get(key)
        if seen is None:
            return None
        self.counts.doubled += 1
        if not self.honoured:
            return None
        if seen.fingerprint != _fingerprint(route, body):
            self.counts.conflicting += 1
            raise KeyConflict
        self.counts.suppressed += 1
        return seen.status, seen.answer

    def known(self, key: str) -> bool:
        return key in self._seen

    def remember(self, key: str, route: str, body: bytes, status: int, answer: bytes) -> None:
        if not key or key in self._seen:
            return
        self.counts.distinct += 1
        self._seen[key] = _Seen(_fingerprint(route, body), status, answer)
        self._bytes += len(answer)
        while len(self._seen) > _KEYS_MOST or self._bytes > _ANSWERS_MOST_BYTES:
            _, oldest = self._seen.popitem(last=False)
            self._bytes -= len(oldest.answer)


def _fingerprint(route: str, body: bytes) -> bytes:
    return hashlib.sha256(route.encode() + b"\n" + body).digest()


class Books:
    """Users by the subject of their tokens and by external id, and everything applied to them."""

    def __init__(self, now: Callable[[], float], *, honour_keys: bool) -> None:
        self.now = now
        self.users: dict[str, User] = {}
        self.by_external_id: dict[str, User] = {}
        self.totals: dict[tuple[str, str], Total] = {}
        self.entries: deque[dict[str, Any]] = deque(maxlen=_ENTRIES_MOST)
        self.entries_ever = 0
        self.keys = Keys(honoured=honour_keys)

    def put(self, user: User) -> None:
        """Adds a user, in the place of one with the same subject. Totals stay."""
        self.drop(user.subject)
        self.users[user.subject] = user
        if user.external_id is not None:
            self.by_external_id[user.external_id] = user

    def drop(self, subject: str) -> bool:
        """Forgets a user; whether there was one."""
        user = self.users.pop(subject, None)
        if user is not None and user.external_id is not None:
            self.by_external_id.pop(user.external_id, None)
        return user is not None

    def refusal(self, external_id: str, limit_name: str) -> str | None:
        """Why an increment can never be applied; None when it can."""
        user = self.by_external_id.get(external_id)
        if user is None:
            return USER_NOT_FOUND
        return None if limit_name in user.limits else LIMIT_NOT_FOUND

    def apply(self, external_id: str, limit_name: str, amount: int, key: str) -> dict[str, Any]:
        """Adds to a limit that `refusal` has nothing against, whatever its height; the limit after it."""
        now_s = self.now()
        limit = self.by_external_id[external_id].limits[limit_name]
        limit.roll_over(now_s)
        limit.used += amount
        period = "ever" if limit.period.start_s is None else rfc3339(limit.period.start_s)
        total = self.totals.setdefault((external_id, limit_name), Total())
        total.add(amount, period, again=bool(key) and self.keys.known(key))
        self.entries_ever += 1
        self.entries.append(
            {
                "at": now_s,
                "key": key,
                "externalId": external_id,
                "limitName": limit_name,
                "amount": amount,
                "newValue": limit.used,
                "period": period,
            }
        )
        return limit.shown()

    def shown(self) -> dict[str, Any]:
        """Totals as `{externalId: {limitName: {...}}}`, sums per limit, and what became of keys."""
        users: dict[str, dict[str, Any]] = {}
        sums: dict[str, int] = {}
        doubled: dict[str, int] = {}
        for (external_id, limit_name), total in self.totals.items():
            users.setdefault(external_id, {})[limit_name] = {
                "applied": total.applied,
                "increments": total.increments,
                "doubled": total.doubled,
                "periods": total.periods,
            }
            sums[limit_name] = sums.get(limit_name, 0) + total.applied
            doubled[limit_name] = doubled.get(limit_name, 0) + total.doubled
        return {"users": users, "applied": sums, "doubled": doubled, "keys": self.keys.counts}

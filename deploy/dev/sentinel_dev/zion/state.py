"""All that a simulated Zion remembers, shared by its contract's side and its /admin side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from sentinel_dev.faults import Faults
from sentinel_dev.zion.books import Books

CALLS_MOST: Final = 100_000
ROUTES: Final = ("me", "limits", "increment", "batch")
KINDS: Final = (
    "delay",
    "status",
    "refuse",
    "hang",
    "applied_then_silent",
    "partial",
    "garbage",
    "missing_items",
    "no_batch",
    "malformed_limits",
)


@dataclass(slots=True)
class Calls:
    """The calls of one route; the latest 100,000 with their times."""

    count: int = 0
    at: deque[float] = field(default_factory=lambda: deque(maxlen=CALLS_MOST))
    statuses: dict[int, int] = field(default_factory=dict)
    """0 = closed or left without an answer."""
    users: dict[str, int] = field(default_factory=dict)

    def shown(self) -> dict[str, object]:
        return {"count": self.count, "at": list(self.at), "statuses": self.statuses, "users": self.users}

    def count_user(self, user: str) -> None:
        if user in self.users or len(self.users) < CALLS_MOST:
            self.users[user] = self.users.get(user, 0) + 1


class State:
    """Books, calls and faults, until `reset`."""

    def __init__(self, *, secret: str, api_key: str, now: Callable[[], float], honour_keys: bool) -> None:
        self.secret = secret
        self.api_key = api_key
        self.now = now
        self.honour_keys = honour_keys
        self.faults = Faults(ROUTES, KINDS)
        self.books = Books(now, honour_keys=honour_keys)
        self.calls: dict[str, Calls] = {}

    def reset(self, *, honour_keys: bool | None = None) -> None:
        """As new: no users, no books, no faults; with `honour_keys` None, keys are treated as they were."""
        if honour_keys is not None:
            self.honour_keys = honour_keys
        self.books = Books(self.now, honour_keys=self.honour_keys)
        self.calls = {}
        self.faults.clear()

"""What the ledger is held against: a Zion with periods and idempotency keys, a reference decision, a clock of ours.

The scripts' only clock is Redis's TIME. `with_clock` returns a script whose TIME is read from the key CLOCK instead:
nothing else in it is touched, so that days pass in an example and every run of a seed is the same.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from sentinel_shared.accounts import Binding, Cost, LimitState, WindowPolicy
from sentinel_shared.contracts import LIMIT_NAMES, Increment, IncrementResult, LimitName, LimitSnapshot, ResetPeriod
from sentinel_shared.redis_lane import Script

CLOCK: Final = "test:clock"
_TIME: Final = b"redis.call('TIME')"
_TEST_TIME: Final = b"{string.match(redis.call('GET', '" + CLOCK.encode() + b"'), '^(%d+) (%d+)$')}"
DAY_S: Final = 86_400
EARLIER: Final = IncrementResult(applied=False, permanent=False, new_value=None, error="later")
NEVER: Final = IncrementResult(applied=False, permanent=True, new_value=None, error="unknown")


def with_clock(script: Script, *, replace: tuple[str, str] | None = None) -> Script:
    """`script` under the test's clock; `replace` takes a rule out: that text must stand in it, or the test is stale."""
    source = script.source
    if replace is not None:
        text, instead = (part.encode() for part in replace)
        assert text in source, f"{script.name} no longer says {replace[0]!r}: take out the rule as it stands now"
        source = source.replace(text, instead)
    return Script.of(script.name, source.replace(_TIME, _TEST_TIME))


@dataclass
class Book:
    """One limit of one user at Zion. `length_s` None: it never resets. What is counted, is counted per period."""

    limit: int | None
    period: ResetPeriod | None
    length_s: int | None
    absent: bool = False
    ours: Counter[int] = field(default_factory=Counter)
    others: Counter[int] = field(default_factory=Counter)

    def number(self, at_ms: int) -> int:
        """Which period `at_ms` is in."""
        return 0 if self.length_s is None else at_ms // (self.length_s * 1000)

    def end_s(self, at_ms: int) -> int | None:
        return None if self.length_s is None else (self.number(at_ms) + 1) * self.length_s

    def used(self, at_ms: int) -> int:
        return self.ours[self.number(at_ms)] + self.others[self.number(at_ms)]


@dataclass(frozen=True)
class Reading:
    """Zion's answer about a user's limits, and when it was true."""

    limits: list[LimitSnapshot]
    order: int
    at_ms: int


@dataclass(frozen=True)
class Applied:
    """What an idempotency key stands for: Zion's answer, and in which period it counted the amount."""

    result: IncrementResult
    period: int


@dataclass
class ModelZion:
    """Honours idempotency keys. Its clock is `lag_ms` behind: it turns to a new period that much too late."""

    books: dict[str, dict[LimitName, Book]]
    tells_new_value: bool
    lag_ms: int
    dice: random.Random
    readings: int = 0
    answers: dict[str, Applied] = field(default_factory=dict)
    rejected: dict[str, bool] = field(default_factory=dict)

    def read(self, user: str, now_ms: int) -> Reading:
        at_ms = now_ms - self.lag_ms
        self.readings += 1
        limits = []
        for name, book in self.books[user].items():
            if book.absent:
                continue
            end_s = book.end_s(at_ms)
            start_s = None if end_s is None or book.length_s is None else end_s - book.length_s
            limits.append(LimitSnapshot(name, book.limit, book.used(at_ms), book.period, start_s, end_s))
        return Reading(limits, self.readings, now_ms)

    def rejects(self, batch_id: str) -> bool:
        """Whether the batch as a whole is refused (400); the same batch gets the same answer."""
        return self.rejected.setdefault(batch_id, self.dice.random() < 0.25)

    def increment(self, key: str, item: Increment, now_ms: int) -> Applied:
        """One item under its key: counted once, however often it comes."""
        if key not in self.answers:
            self.answers[key] = self._apply(item, now_ms - self.lag_ms)
        return self.answers[key]

    def _apply(self, item: Increment, at_ms: int) -> Applied:
        fate = self.dice.random()
        book = self.books[item.external_id][item.limit_name]
        if fate >= 0.75:
            return Applied(EARLIER if fate < 0.88 else NEVER, book.number(at_ms))
        book.ours[book.number(at_ms)] += item.amount
        new_value = book.used(at_ms) if self.tells_new_value else None
        result = IncrementResult(applied=True, permanent=False, new_value=new_value, error=None)
        return Applied(result, book.number(at_ms))


def expected_decision(
    limits: dict[LimitName, LimitState], counted: tuple[int, int], policy: WindowPolicy, cost: Cost
) -> tuple[Binding, int]:
    """The binding limit (NONE: admitted) and the granted output, as the design's sentences say it.

    `counted` is what the window holds, requests and tokens.
    """
    wants_output = cost.output_wanted_tokens != 0
    rooms: list[int] = []
    for number, (name, least) in enumerate(
        zip(LIMIT_NAMES, (1, cost.input_tokens, cost.choices if wants_output else 0), strict=True), 1
    ):
        state = limits.get(name)
        if state is None or state.limit is None:
            continue
        if state.used + least > state.limit:
            return Binding(number), 0
        if state.used + state.reserved + least > state.limit:
            return Binding(10 + number), 0
        if name is LimitName.OUTPUT_TOKENS:
            rooms.append(state.limit - state.used - state.reserved)
    if policy.requests and counted[0] + 1 > policy.requests:
        return Binding.WINDOW_REQUESTS, 0
    if policy.tokens:
        room = policy.tokens - counted[1] - cost.input_tokens
        if room < (cost.choices if wants_output else 0):
            return Binding.WINDOW_TOKENS, 0
        rooms.append(room)
    return Binding.NONE, _grant(rooms, cost)


def _grant(rooms: Sequence[int], cost: Cost) -> int:
    if cost.output_wanted_tokens == 0:
        return 0
    if not rooms:
        return -1
    available = min(rooms)
    if cost.output_wanted_tokens > 0:
        granted = min(cost.output_wanted_tokens, available)
    elif available >= cost.model_max_output_tokens:
        granted = cost.model_max_output_tokens
    else:
        granted = max(available // 2, min(256, available))
    return max(granted // cost.choices * cost.choices, cost.choices)

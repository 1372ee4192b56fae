"""The users that a simulated Zion knows, their limits, and how a period's `used` starts again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from sentinel_dev.zion.periods import (
    ENDLESS,
    Period,
    ResetPeriod,
    between,
    calendar_period,
    seconds_period,
    written_period,
)

LIMITS: Final = {
    "ai_requests": ("AI requests", "requests"),
    "ai_input_tokens": ("AI input tokens", "tokens"),
    "ai_output_tokens": ("AI output tokens", "tokens"),
}
_PLAIN: Final = ("limit", "used", "reset_period", "seconds", "inclusive_end", "hide_period", "display_name", "unit")
_SECONDS_LEAST: Final = 0.1
_SECONDS_MOST: Final = 1e9


class LimitSpec(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What a test says of a limit; what it leaves out is kept, or the default for a new one."""

    limit: int | UnsetType | None = UNSET
    used: int | UnsetType = UNSET
    reset_period: ResetPeriod | UnsetType | None = UNSET
    """MONTHLY for a new limit, unless a period is given."""
    period_start: str | UnsetType | None = UNSET
    period_end: str | UnsetType | None = UNSET
    """A period in just these words; when it is over, the calendar's of `resetPeriod`, else one of the same length."""
    seconds: float | UnsetType | None = UNSET
    """A period of so many seconds, again and again, from now on."""
    inclusive_end: bool | UnsetType = UNSET
    """Write the calendar's ends as 23:59:59Z."""
    hide_period: bool | UnsetType = UNSET
    """Answer with `periodStart` and `periodEnd` null."""
    display_name: str | UnsetType = UNSET
    unit: str | UnsetType | None = UNSET


@dataclass(slots=True)
class Limit:
    """One limit of one user, in its present period."""

    name: str
    limit_id: str
    display_name: str
    unit: str | None
    limit: int | None = None
    used: int = 0
    reset_period: ResetPeriod | None = None
    period: Period = ENDLESS
    seconds: float | None = None
    anchor_s: float = 0.0
    inclusive_end: bool = False
    hide_period: bool = False
    periods_begun: int = 0

    def roll_over(self, now_s: float) -> None:
        """Starts the period that holds `now_s` with nothing used, if the present one is over."""
        if self.period.holds(now_s):
            return
        self.period = self._next_period(now_s)
        self.used = 0
        self.periods_begun += 1

    def _next_period(self, now_s: float) -> Period:
        if self.seconds is not None:
            return seconds_period(self.seconds, self.anchor_s, now_s)
        if self.reset_period is not None:
            return calendar_period(self.reset_period, now_s, inclusive_end=self.inclusive_end)
        start_s, end_s = self.period.start_s, self.period.end_s
        if start_s is None or end_s is None or end_s <= start_s:
            return ENDLESS
        over = seconds_period(end_s - start_s, start_s, now_s)
        return between(over.start_s or 0.0, over.end_s or 0.0, inclusive_end=self.inclusive_end)

    def apply(self, spec: LimitSpec, now_s: float) -> None:
        """Changes what the spec names; raises ValueError for a period that makes no sense."""
        for name in (
            "limit",
            "used",
            "reset_period",
            "seconds",
            "inclusive_end",
            "hide_period",
            "display_name",
            "unit",
        ):
            told = getattr(spec, name)
            if told is not UNSET:
                setattr(self, name, told)
        if self.seconds is not None and not _SECONDS_LEAST <= self.seconds <= _SECONDS_MOST:
            raise ValueError(f"seconds is not between {_SECONDS_LEAST} and {_SECONDS_MOST:g}")
        if spec.period_start is not UNSET or spec.period_end is not UNSET:
            start = None if spec.period_start is UNSET else spec.period_start
            end = None if spec.period_end is UNSET else spec.period_end
            self.period = written_period(start, end)
        elif spec.seconds is not UNSET and self.seconds is not None:
            self.anchor_s = math.floor(now_s)
            self.period = seconds_period(self.seconds, self.anchor_s, now_s)
        elif spec.reset_period is not UNSET or spec.inclusive_end is not UNSET or spec.seconds is not UNSET:
            self.period = calendar_period(self.reset_period, now_s, inclusive_end=self.inclusive_end)

    def shown(self) -> dict[str, Any]:
        """As Zion answers it."""
        return {
            "limitId": self.limit_id,
            "name": self.name,
            "displayName": self.display_name,
            "unit": self.unit,
            "limit": self.limit,
            "used": self.used,
            "remaining": None if self.limit is None else self.limit - self.used,
            "resetPeriod": self.reset_period,
            "periodStart": None if self.hide_period else self.period.start_text,
            "periodEnd": None if self.hide_period else self.period.end_text,
        }


@dataclass(slots=True)
class User:
    """`subject` is what the token says; `external_id` None is a user who cannot be metered."""

    subject: str
    external_id: str | None
    email: str
    name: str | None
    created_at: str
    revoked: bool = False
    limits: dict[str, Limit] = field(default_factory=dict)

    def set_limits(self, specs: dict[str, LimitSpec | int | None], now_s: float) -> None:
        """Changes the limits named, making those that are new; raises ValueError, and then changes none."""
        changed = dict(self.limits)
        for name, told in specs.items():
            spec = told if isinstance(told, LimitSpec) else LimitSpec(limit=told)
            if name in changed:
                changed[name] = replace(changed[name])
            else:
                changed[name] = self._new_limit(name)
                timeless = spec.seconds is not UNSET or spec.period_end is not UNSET or spec.period_start is not UNSET
                if spec.reset_period is UNSET and not timeless:
                    spec = msgspec.structs.replace(spec, reset_period="MONTHLY")
            changed[name].apply(spec, now_s)
        self.limits = changed

    def _new_limit(self, name: str) -> Limit:
        display_name, unit = LIMITS.get(name, (name, None))
        return Limit(name=name, limit_id=f"limit-{self.subject}-{name}", display_name=display_name, unit=unit)

    def rolled_over(self, now_s: float) -> list[Limit]:
        """All limits, in their present periods."""
        for limit in self.limits.values():
            limit.roll_over(now_s)
        return list(self.limits.values())

    def shown(self) -> dict[str, Any]:
        """As `users/me` answers."""
        told = {
            "id": f"user-{self.subject}",
            "email": self.email,
            "emailVerified": True,
            "createdAt": self.created_at,
            "name": self.name,
            "externalId": self.external_id,
        }
        return {key: value for key, value in told.items() if value is not None}

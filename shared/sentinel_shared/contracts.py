"""The shapes that cross a border: Zion's answers as Sentinel reads them, and what services hand each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class LimitName(StrEnum):
    """Zion's names of the limits that Sentinel enforces; any other is ignored."""

    REQUESTS = "ai_requests"
    INPUT_TOKENS = "ai_input_tokens"
    OUTPUT_TOKENS = "ai_output_tokens"


LIMIT_NAMES: Final = tuple(LimitName)
"""In the one order that scripts and replies use."""


class ResetPeriod(StrEnum):
    """When a limit's `used` goes back to 0, always at midnight UTC; `NEVER` is a lifetime limit."""

    DAILY = "DAILY"
    WEEKLY = "WEEKLY"
    MONTHLY = "MONTHLY"
    NEVER = "NEVER"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a valid token belongs to. `external_id` is None for a user who cannot be metered."""

    user_id: str
    external_id: str | None


@dataclass(frozen=True, slots=True)
class LimitSnapshot:
    """One limit as Zion last told it. Times are Unix seconds, UTC; `limit` None is unlimited, 0 denies."""

    name: LimitName
    limit: int | None
    used: int
    reset_period: ResetPeriod | None
    period_start_s: int | None
    period_end_s: int | None


@dataclass(frozen=True, slots=True)
class Increment:
    """One item of a batch: `amount` more of `limit_name` for the user `external_id`."""

    external_id: str
    limit_name: LimitName
    amount: int


@dataclass(frozen=True, slots=True)
class IncrementResult:
    """Zion's word on one item. `new_value` is its `used` afterwards, where it says so.

    `applied` False with `permanent` True will never work (unknown user or limit); with False it may later.
    """

    applied: bool
    permanent: bool
    new_value: int | None
    error: str | None

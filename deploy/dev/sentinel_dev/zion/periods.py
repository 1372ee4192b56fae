"""The periods of a limit: by the calendar (UTC), of some seconds, or as a test says; and how Zion writes them down."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

ResetPeriod = Literal["DAILY", "WEEKLY", "MONTHLY", "NEVER"]

_DAY_S: Final = 86_400
_MONDAY_S: Final = 4 * _DAY_S
_LAST_SECOND: Final = re.compile(r"T23:59:59(\.\d+)?Z$")


@dataclass(frozen=True, slots=True)
class Period:
    """From `start_s` up to, not including, `end_s` (Unix seconds; None = without bound), and how it is written."""

    start_s: float | None
    end_s: float | None
    start_text: str | None
    end_text: str | None

    def holds(self, now_s: float) -> bool:
        return self.end_s is None or now_s < self.end_s


ENDLESS: Final = Period(None, None, None, None)


def calendar_period(reset: ResetPeriod | None, now_s: float, *, inclusive_end: bool) -> Period:
    """The day, the week from Monday, or the month that holds `now_s`."""
    if reset == "DAILY":
        start_s = now_s // _DAY_S * _DAY_S
        return between(start_s, start_s + _DAY_S, inclusive_end=inclusive_end)
    if reset == "WEEKLY":
        start_s = (now_s - _MONDAY_S) // (7 * _DAY_S) * (7 * _DAY_S) + _MONDAY_S
        return between(start_s, start_s + 7 * _DAY_S, inclusive_end=inclusive_end)
    if reset == "MONTHLY":
        first = datetime.fromtimestamp(now_s, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        next_first = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
        return between(first.timestamp(), next_first.timestamp(), inclusive_end=inclusive_end)
    return ENDLESS


def seconds_period(length_s: float, anchor_s: float, now_s: float) -> Period:
    """The period that holds `now_s`, of those of `length_s` that follow each other from `anchor_s` on."""
    start_s = anchor_s + math.floor((now_s - anchor_s) / length_s) * length_s
    return between(start_s, start_s + length_s, inclusive_end=False)


def written_period(start: str | None, end: str | None) -> Period:
    """A period as a test wrote it, to be shown in just these words; raises ValueError for what is no date-time."""
    start_s = None if start is None else _instant_s(start)
    end_s = None if end is None else _instant_s(end)
    if end is not None and end_s is not None and _LAST_SECOND.search(end):
        end_s = math.floor(end_s) + 1
    return Period(start_s, end_s, start, end)


def between(start_s: float, end_s: float, *, inclusive_end: bool) -> Period:
    """`inclusive_end` writes the last second of the period, `23:59:59Z`, as some deployments do."""
    return Period(start_s, end_s, rfc3339(start_s), rfc3339(end_s - 1 if inclusive_end else end_s))


def rfc3339(unix_s: float) -> str:
    """In UTC, to the second; to the millisecond where that says more."""
    timespec = "seconds" if unix_s == int(unix_s) else "milliseconds"
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def _instant_s(text: str) -> float:
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None:
        raise ValueError(f"{text!r} does not say its time zone")
    return instant.timestamp()

"""Instants, periods and durations between the notations of Zion, of OpenAI and of Sentinel (Unix seconds, UTC)."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache
from typing import Final

from sentinel_shared.contracts import ResetPeriod

_DATE_TIME: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII
)
_DAY_S: Final = 86_400
# 1970-01-01 was a Thursday, the first Monday midnight came four days later.
_FIRST_MONDAY_S: Final = 4 * _DAY_S


def parse_rfc3339(text: str) -> float:
    """The instant of an RFC 3339 date-time; a leap second is the second after it.

    Raises ValueError for anything else: a date alone, or a time without its offset, leaves open when it is.
    """
    return _instant(_fields(text))


def format_rfc3339(unix_s: float) -> str:
    """The instant in UTC, to the millisecond: `2026-02-28T23:59:59.999Z`."""
    return f"{_to_the_second(math.floor(unix_s))}.{math.floor(unix_s % 1 * 1000):03d}Z"


@lru_cache(maxsize=8)
def _to_the_second(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def parse_period_start_s(text: str) -> int:
    """The first whole second of a period that begins at an RFC 3339 date-time; raises ValueError."""
    return math.floor(parse_rfc3339(text))


def parse_period_end_s(text: str) -> int:
    """The first whole second after a period that Zion says ends at an RFC 3339 date-time; raises ValueError.

    `23:59:59`, as written or in UTC, is how the end of a day is often put: the midnight after it is meant.
    """
    parts = _fields(text)
    end_s = _instant(parts)
    last_of_a_day = parts[3:6] == ("23", "59", "59") or math.floor(end_s) % _DAY_S == _DAY_S - 1
    return math.floor(end_s) + 1 if last_of_a_day else math.ceil(end_s)


def period_start_s(period: ResetPeriod | None, now_s: float) -> int | None:
    """The midnight UTC with which the period that holds `now_s` began; None for a period without resets."""
    match period:
        case ResetPeriod.DAILY:
            return math.floor(now_s / _DAY_S) * _DAY_S
        case ResetPeriod.WEEKLY:
            return math.floor((now_s - _FIRST_MONDAY_S) / (7 * _DAY_S)) * 7 * _DAY_S + _FIRST_MONDAY_S
        case ResetPeriod.MONTHLY:
            return int(_first_of_month(now_s).timestamp())
        case _:
            return None


def period_end_s(period: ResetPeriod | None, now_s: float) -> int | None:
    """The midnight UTC, always after `now_s`, at which the period that holds `now_s` is over; None without resets."""
    match period:
        case ResetPeriod.DAILY:
            return math.floor(now_s / _DAY_S) * _DAY_S + _DAY_S
        case ResetPeriod.WEEKLY:
            return math.floor((now_s - _FIRST_MONDAY_S) / (7 * _DAY_S) + 1) * 7 * _DAY_S + _FIRST_MONDAY_S
        case ResetPeriod.MONTHLY:
            in_the_next = _first_of_month(now_s) + timedelta(days=31)
            return int(in_the_next.replace(day=1).timestamp())
        case _:
            return None


def next_period_end_s(period: ResetPeriod | None, ended_s: float) -> int | None:
    """When the period is over that begins as another one ends at `ended_s`; None without resets."""
    return period_end_s(period, ended_s)


def format_openai_duration(duration_s: float) -> str:
    """A duration as OpenAI's reset headers write it: `120ms`, `1s`, `6m0s`, `1h2m3s`; below 0 is `0s`.

    To the millisecond below a second and to the second above it, always rounded up: who waits that long has waited
    long enough.
    """
    if duration_s <= 0:
        return "0s"
    duration_ms = math.ceil(duration_s * 1000)
    if duration_ms < 1000:
        return f"{duration_ms}ms"
    minutes, seconds = divmod(math.ceil(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{seconds}s"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def _fields(text: str) -> tuple[str | None, ...]:
    found = _DATE_TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"not an RFC 3339 date-time: {text[:40]!r}")
    return found.groups()


def _instant(parts: tuple[str | None, ...]) -> float:
    year, month, day, hour, minute, second = (int(part or 0) for part in parts[:6])
    fraction, sign, offset_hour, offset_minute = parts[6:]
    offset = timedelta(hours=int(offset_hour or 0), minutes=int(offset_minute or 0))
    zone = timezone(-offset if sign == "-" else offset)
    whole = datetime(year, month, day, hour, minute, min(second, 59), tzinfo=zone)
    if second > 60:
        raise ValueError(f"no such second: {second}")
    return whole.timestamp() + (second == 60) + float(f"0.{fraction or 0}")


def _first_of_month(now_s: float) -> datetime:
    return datetime.fromtimestamp(now_s, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)

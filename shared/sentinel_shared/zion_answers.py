"""What Zion's answers say: bytes in, contracts out. No I/O.

Every answer is `{"success": bool, "data": ...}`. One that cannot be read raises ZionUnavailable with its outcome
unknown: something has answered, but it is not certain that it was Zion, nor what it did.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

import msgspec

from sentinel_shared.contracts import LIMIT_NAMES, Caller, IncrementResult, LimitName, LimitSnapshot, ResetPeriod
from sentinel_shared.errors import MalformedLimits, ZionRejected, ZionUnavailable
from sentinel_shared.units import parse_period_end_s, parse_period_start_s, period_end_s, period_start_s

T = TypeVar("T")

# Larger numbers are not exact in Lua nor in most JSON readers; a limit beyond is as good as this one.
AMOUNT_MAX: Final = 2**53 - 1
_ERROR_CHARS_MAX: Final = 200

_PASSING: Final = re.compile(
    r"time ?d? ?out|temporar|unavailable|try again|retry|internal|database|deadlock|conflict|rate limit|too many"
)
_GONE: Final = re.compile(r"not found|does not exist|doesn ?t exist|no such|not exist")
_WRONG: Final = re.compile(r"unknown|invalid|not valid|unsupported|unrecogni[sz]ed")
_SUBJECT: Final = re.compile(r"user|limit|external id|amount|account|customer")
_ROUTE: Final = re.compile(r"route|endpoint|path|url|method|cannot post")


class _Wire(msgspec.Struct, rename="camel"):
    """A part of an answer: only the fields that are read; Zion may add others."""


class _Envelope(_Wire):
    success: bool
    data: msgspec.Raw = msgspec.Raw(b"null")


class _Me(_Wire):
    id: str | int
    external_id: str | None = None


class _Limits(_Wire):
    limits: list[msgspec.Raw]
    external_id: str | None = None


class _Named(_Wire):
    name: str


class _Limit(_Wire):
    limit: int | float | None
    used: int | float
    reset_period: str | None = None
    period_start: str | None = None
    period_end: str | None = None


class _Item(_Wire):
    external_id: str
    limit_name: str
    success: bool
    new_value: Any = None
    error: Any = None


class _Results(_Wire):
    results: list[_Item]


class _After(_Wire):
    name: Any = None
    used: Any = None


class SentItem(_Wire):
    """An item of a batch as it went out; the answer's items must name the same, in this order."""

    external_id: str
    limit_name: str


class _SentBatch(_Wire):
    increments: list[SentItem]


def read_caller(body: bytes) -> Caller:
    """Whose token it was. A user without an external id cannot be metered: `external_id` None."""
    me = _decode(_data(body), _Me)
    return Caller(user_id=str(me.id), external_id=me.external_id or None)


def read_limits(body: bytes, external_id: str, *, asked_at_s: float) -> tuple[LimitSnapshot, ...]:
    """Those of the three limits that Zion names, in their one order; what is absent is unlimited.

    A period without an end gets the calendar's, counted from when Zion was asked: should midnight have passed since,
    the account sees it over at once and asks again. A negative `used` counts as 0.

    Raises MalformedLimits, naming the limit and what is wrong with it.
    """
    try:
        answer = _decode(_data(body), _Limits)
    except ZionUnavailable as error:
        raise MalformedLimits(str(error)) from error
    if answer.external_id not in {None, external_id}:
        raise MalformedLimits("Zion answered with another user's limits")
    found: dict[LimitName, LimitSnapshot] = {}
    for raw in answer.limits:
        name = _known_name(raw)
        if name is None:
            continue
        if name in found:
            raise MalformedLimits(f"{name} is there twice")
        try:
            found[name] = _snapshot(name, msgspec.json.decode(raw, type=_Limit), asked_at_s)
        except (msgspec.MsgspecError, ValueError) as error:
            raise MalformedLimits(f"{name}: {error}") from error
    return tuple(found[name] for name in LIMIT_NAMES if name in found)


def read_sent(body: bytes, count: int) -> list[SentItem]:
    """The items of a frozen batch; raises ZionRejected when it does not hold `count` of them (nothing was sent)."""
    try:
        items = msgspec.json.decode(body, type=_SentBatch).increments
    except (msgspec.MsgspecError, ValueError) as error:
        raise ZionRejected(f"not sent, the batch itself is malformed: {error}", status=400) from error
    if len(items) != count:
        raise ZionRejected(f"not sent, the batch holds {len(items)} items, not {count}", status=400)
    return items


def read_increments(body: bytes, sent: list[SentItem]) -> list[IncrementResult]:
    """Zion's word on each item that was sent, in order; raises ZionUnavailable when they do not match."""
    results = _decode(_data(body), _Results).results
    if len(results) != len(sent):
        raise ZionUnavailable(f"Zion answered with {len(results)} results for {len(sent)} items")
    for index, (result, item) in enumerate(zip(results, sent, strict=True)):
        if (result.external_id, result.limit_name) != (item.external_id, item.limit_name):
            raise ZionUnavailable(f"Zion's result {index} is about another user or limit than what was sent")
    return [
        IncrementResult(applied=True, permanent=False, new_value=_amount_or_none(result.new_value), error=None)
        if result.success
        else refused(_one_line(result.error))
        for result in results
    ]


def read_increment(body: bytes, limit_name: LimitName) -> IncrementResult:
    """Zion's word on a single increment."""
    if not _envelope(body).success:
        return refused(error_text(body))
    try:
        after = msgspec.json.decode(_data(body), type=_After)
    except (msgspec.MsgspecError, ValueError):
        after = _After()
    new_value = _amount_or_none(after.used) if after.name == limit_name else None
    return IncrementResult(applied=True, permanent=False, new_value=new_value, error=None)


def refused(error: str) -> IncrementResult:
    """An item that Zion did not apply: for good (a dead letter), or to be sent again, by what the error says.

    For good: something is not found or does not exist, or a user, limit, external id or amount is unknown or
    invalid; unless the text also speaks of what passes, such as a time-out or a database. All else passes.
    """
    said = _words(error)
    for_good = _GONE.search(said) or (_WRONG.search(said) and _SUBJECT.search(said))
    return IncrementResult(
        applied=False, permanent=bool(for_good) and not _PASSING.search(said), new_value=None, error=error
    )


def is_about_the_user(body: bytes) -> bool:
    """Whether a 404 of the single increment means its user or limit, not that the route is missing.

    A missing route is mostly answered by a web framework, without Zion's envelope; within it, the text tells.
    """
    try:
        _envelope(body)
    except ZionUnavailable:
        return False
    return not _ROUTE.search(_words(error_text(body)))


def error_text(body: bytes) -> str:
    """What an answer gives as the error, in one bounded line; "" where it says nothing that can be read."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return ""
    if not isinstance(answer, dict):
        return ""
    return _one_line(answer.get("error") or answer.get("message") or answer.get("data"))


def _envelope(body: bytes) -> _Envelope:
    return _decode(body, _Envelope)


def _data(body: bytes) -> msgspec.Raw:
    envelope = _envelope(body)
    if not envelope.success:
        raise ZionUnavailable("Zion's answer is 200 and says that it failed")
    return envelope.data


def _decode(body: bytes | msgspec.Raw, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ZionUnavailable(f"Zion's answer makes no sense: {error}") from error


def _known_name(raw: msgspec.Raw) -> LimitName | None:
    try:
        return LimitName(msgspec.json.decode(raw, type=_Named).name)
    except msgspec.MsgspecError as error:
        raise MalformedLimits(f"a limit without a name: {error}") from error
    except ValueError:
        return None


def _snapshot(name: LimitName, told: _Limit, asked_at_s: float) -> LimitSnapshot:
    period = _reset_period(told)
    if period is ResetPeriod.NEVER:
        start_s, end_s = None, None
    else:
        start_s = parse_period_start_s(told.period_start) if told.period_start else period_start_s(period, asked_at_s)
        end_s = parse_period_end_s(told.period_end) if told.period_end else period_end_s(period, asked_at_s)
    if start_s is not None and end_s is not None and end_s <= start_s:
        raise ValueError("the period ends before it starts")
    unlimited = told.limit is None or told.limit < 0
    return LimitSnapshot(
        name=name,
        limit=None if unlimited else min(_whole("limit", told.limit), AMOUNT_MAX),
        used=max(_whole("used", told.used), 0),
        reset_period=period,
        period_start_s=start_s,
        period_end_s=end_s,
    )


def _reset_period(told: _Limit) -> ResetPeriod | None:
    if told.reset_period is None:
        return None
    try:
        return ResetPeriod(told.reset_period.upper())
    except ValueError:
        # A period of a kind that is not known yet still resets rightly by its own end.
        if told.period_end:
            return None
        raise ValueError(f"unknown resetPeriod {told.reset_period[:40]!r} without a periodEnd") from None


def _whole(field: str, number: float | None) -> int:
    if number is None or number != int(number):
        raise ValueError(f"{field} is not a whole number")
    return int(number)


def _amount_or_none(value: Any) -> int | None:
    # The ledger does without `newValue`, so one that makes no sense must not hold up the whole batch.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value == int(value) and 0 <= value <= AMOUNT_MAX else None


def _one_line(error: Any) -> str:
    if isinstance(error, dict):
        error = error.get("message") or error.get("error") or error.get("code")
    return " ".join(str(error).split())[:_ERROR_CHARS_MAX] if error else ""


def _words(text: str) -> str:
    # Codes such as USER_NOT_FOUND or invalidLimitName read like the sentences that other deployments write.
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", text)
    return re.sub(r"[^a-z0-9]+", " ", spaced.lower())

"""How a simulated Zion answers increments: validation, items that succeed or fail alone, keys that were seen before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from sentinel_dev.faults import Armed
from sentinel_dev.zion.books import Books, KeyConflict

T = TypeVar("T")

ITEMS_MOST: Final = 1_000
TRANSIENT: Final = "Temporarily unavailable, try again"
PERMANENT: Final = "User not found"
KEY_CONFLICT: Final = "Idempotency-Key was used for another request"


class Refused(Exception):
    """A request that is answered with an error, nothing of it applied."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Increment(msgspec.Struct, rename="camel"):
    external_id: str
    limit_name: str
    amount: int = 1


class _Batch(msgspec.Struct):
    increments: list[_Increment]


def success(data: Any) -> bytes:
    """Zion's envelope around what was asked for."""
    return msgspec.json.encode({"success": True, "data": data})


def failure(message: str) -> bytes:
    """Zion's envelope around what went wrong."""
    return msgspec.json.encode({"success": False, "data": None, "error": message})


def once(books: Books, key: str, route: str, body: bytes, apply: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
    """Applies, unless the key was answered before: then the same answer again. Raises Refused."""
    try:
        before = books.keys.answered(key, route, body)
    except KeyConflict as error:
        raise Refused(422, KEY_CONFLICT) from error
    if before is not None:
        return before
    status, answer = apply()
    books.keys.remember(key, route, body, status, answer)
    return status, answer


def increment(books: Books, body: bytes, key: str, partial: list[Armed]) -> tuple[int, bytes]:
    """The single increment: the limit after it; 404 for an unknown user or limit. Raises Refused."""
    item = _read(body, _Increment)
    _check_amount(item)
    fault = _fault(item, partial)
    if fault is not None:
        raise Refused(404 if fault == PERMANENT else 503, fault)
    refusal = books.refusal(item.external_id, item.limit_name)
    if refusal is not None:
        raise Refused(404, refusal)
    return 200, success(books.apply(item.external_id, item.limit_name, item.amount, key))


def batch_increment(books: Books, body: bytes, key: str, partial: list[Armed]) -> tuple[int, bytes]:
    """The batch: each item by itself, in order. Raises Refused when it is no batch at all."""
    items = _read(body, _Batch).increments
    if not items:
        raise Refused(400, "increments must not be empty")
    if len(items) > ITEMS_MOST:
        raise Refused(413, f"increments must not be more than {ITEMS_MOST}")
    for item in items:
        _check_amount(item)
    results = [_result(books, item, key, partial) for item in items]
    processed = sum(bool(result["success"]) for result in results)
    return 200, success({"processed": processed, "failed": len(results) - processed, "results": results})


def _result(books: Books, item: _Increment, key: str, partial: list[Armed]) -> dict[str, Any]:
    told: dict[str, Any] = {"externalId": item.external_id, "limitName": item.limit_name}
    error = _fault(item, partial) or books.refusal(item.external_id, item.limit_name)
    if error is not None:
        return {**told, "success": False, "error": error}
    after = books.apply(item.external_id, item.limit_name, item.amount, key)
    return {**told, "success": True, "newValue": after["used"], "limit": after["limit"]}


def _fault(item: _Increment, partial: list[Armed]) -> str | None:
    for armed in partial:
        rule = armed.rule
        about = rule.external_id in {None, item.external_id} and rule.limit_name in {None, item.limit_name}
        if about and armed.hits():
            return PERMANENT if rule.permanent else TRANSIENT
    return None


def _read(body: bytes, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Refused(400, f"Invalid request: {error}") from error


def _check_amount(item: _Increment) -> None:
    if item.amount < 1:
        raise Refused(400, "Invalid request: amount must be at least 1")

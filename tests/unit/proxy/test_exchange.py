"""The request as ASGI hands it in: its body within bounds, and its client's going."""

from __future__ import annotations

import asyncio

import pytest

from sentinel_proxy.errors import ApiError
from sentinel_proxy.exchange import ClientGone, Exchange

SCOPE = {"method": "POST", "path": "/v1/x", "query_string": b"", "headers": []}
GONE = {"type": "http.disconnect"}


def part(body, *, more=True):
    return {"type": "http.request", "body": body, "more_body": more}


def exchange_of(*messages):
    """An exchange whose client sends these, and then nothing more."""
    coming = iter(messages)

    async def receive():
        message = next(coming, None)
        return message if message is not None else await asyncio.get_running_loop().create_future()

    async def send(message):
        raise AssertionError(message)

    return Exchange(SCOPE, receive, send, fallback_id="made")


@pytest.mark.parametrize("sizes", [(101,), (100, 1), (60, 41), (0, 50, 51)])
async def test_a_body_over_the_limit_is_told_the_limit_however_it_is_cut(sizes):
    exchange = exchange_of(*(part(b"a" * size) for size in sizes), part(b"", more=False))
    with pytest.raises(ApiError, match=r"\(100 bytes\)") as refused:
        await exchange.body(max_bytes=100)
    assert refused.value.status == 413


async def test_a_body_of_just_the_limit_is_taken_in_one_piece():
    exchange = exchange_of(part(b"a" * 60), part(b"b" * 40, more=False))
    assert await exchange.body(max_bytes=100) == b"a" * 60 + b"b" * 40


@pytest.mark.parametrize("messages", [(GONE,), (part(b"half"), GONE)])
async def test_half_a_body_is_none(messages):
    with pytest.raises(ClientGone):
        await exchange_of(*messages).body(max_bytes=100)


async def test_a_client_that_leaves_once_its_request_has_been_read_is_noticed():
    exchange = exchange_of(part(b"{}", more=False), GONE)
    await exchange.body(max_bytes=100)
    noticed = asyncio.Event()
    exchange.when_gone(noticed.set)
    await asyncio.wait_for(noticed.wait(), 5)


async def test_one_that_leaves_after_its_answer_is_not():
    left = asyncio.Event()
    noticed = []

    async def receive():
        await left.wait()
        return GONE

    async def send(message):
        raise AssertionError(message)

    exchange = Exchange(SCOPE, receive, send, fallback_id="made")
    exchange.when_gone(lambda: noticed.append(True))
    exchange.forget_client()
    left.set()
    exchange.when_gone(lambda: noticed.append(False))
    while not noticed:
        await asyncio.sleep(0.01)
    assert noticed == [False]

"""One call of the simulated gateway: what was asked, and the ways to answer it as the model's name wants it."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from sentinel_dev.asgi import JSON, Exchange
from sentinel_dev.gateway.behaviour import Behaviour
from sentinel_dev.gateway.books import Request
from sentinel_dev.gateway.counting import Counter
from sentinel_dev.gateway.words import pieces

EMPTY: Final = msgspec.Raw(b"")
N_MOST: Final = 128
# A body from which on it is counted in a thread.
_THREAD_FROM_BYTES: Final = 16_384
_ENDLESS_BYTES: Final = 64 * 1024 * 1024
_GROUP_EVENTS: Final = 10

Event = tuple[str | None, bytes, int]
"""Its name if it has one, its data, and how many output tokens it carries."""


class Asked(msgspec.Struct):
    """What is read of a JSON body; all the rest is as good as not there."""

    model: Any = None
    stream: Any = False
    stream_options: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    user: Any = None
    messages: msgspec.Raw = EMPTY
    prompt: msgspec.Raw = EMPTY
    input: msgspec.Raw = EMPTY
    instructions: msgspec.Raw = EMPTY
    tools: msgspec.Raw = EMPTY
    tool_choice: Any = None
    response_format: msgspec.Raw = EMPTY
    text: msgspec.Raw = EMPTY
    encoding_format: Any = None
    dimensions: Any = None


class BadRequest(Exception):
    """To be answered with OpenAI's envelope."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's envelope, with the type that goes with the status."""
    kinds = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def whole(value: Any, param: str, most: int) -> int | None:
    """A positive whole number or None; raises BadRequest."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRequest(f"Invalid value for '{param}': expected a positive integer.", param)
    return min(value, most)


@dataclass(slots=True)
class Output:
    """What one choice says: `pieces` of a token each, and before them reasoning, or the call of a tool."""

    pieces: list[str]
    finish: str = "stop"
    reasoning: int = 0
    tool: str | None = None
    """The function whose arguments `pieces` are."""
    tool_tokens: int = 0
    """Of the function's name."""
    refusal: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def reasons(self) -> list[str]:
        return pieces(self.reasoning)

    @property
    def tokens(self) -> int:
        return len(self.pieces) + self.reasoning + self.tool_tokens


@dataclass(slots=True)
class Call:
    """What a handler works with."""

    exchange: Exchange
    request: Request
    asked: Asked
    behaviour: Behaviour
    counter: Counter
    id: str
    created: int

    @property
    def model(self) -> str:
        return str(self.asked.model)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", (self.request.id or self.id).encode("latin-1", "replace"))]

    async def count_input(self, told: msgspec.Raw, *extras: msgspec.Raw, chat: bool) -> int:
        """Charges the input: messages, with what belongs to them, or plain texts."""
        count = self.counter.chat if chat else self.counter.plain
        if self.counter.exact and len(self.request.body) > _THREAD_FROM_BYTES:
            tokens = await asyncio.to_thread(count, told, *extras)
        else:
            tokens = count(told, *extras)
        self.request.input_tokens = 0 if self.behaviour.usage == "zero" else tokens
        self.request.charged = True
        return self.request.input_tokens

    async def answer_json(self, value: Any, output_tokens: int) -> None:
        """The whole answer as JSON, late, compressed or broken as the behaviour wants; charged when it goes out."""
        behaviour = self.behaviour
        if behaviour.first_pause_s and await self.exchange.pause(behaviour.first_pause_s):
            return
        body = msgspec.json.encode(value)
        headers = self.headers
        if "gzip" in behaviour.flags and "gzip" in self.exchange.header(b"accept-encoding"):
            body = gzip.compress(body, 1)
            headers.append((b"content-encoding", b"gzip"))
        if behaviour.breaks is not None:
            await self.exchange.start(200, JSON, [*headers, (b"content-length", str(len(body)).encode())])
            await self.exchange.write(body[: len(body) // 2])
            await (self.exchange.hang() if behaviour.breaks == "hang" else self.exchange.hang_up())
            return
        self.request.generated = 0 if behaviour.usage == "zero" else output_tokens
        await self.exchange.answer(200, body, headers=headers)
        self.request.finished = True

    async def answer_stream(self, events: Iterable[Event], count: int, *, done: bool) -> None:
        """Server-sent events, `count` of them; each is charged once it is written."""
        behaviour, exchange = self.behaviour, self.exchange
        if behaviour.first_pause_s and await exchange.pause(behaviour.first_pause_s):
            return
        await exchange.start(200, b"text/event-stream; charset=utf-8", [(b"cache-control", b"no-cache"), *self.headers])
        stop_at = None if behaviour.breaks is None else behaviour.break_after
        if behaviour.breaks is not None and stop_at is None:
            stop_at = count // 2
        if not await self._write(events, stop_at):
            return
        if behaviour.breaks is not None:
            await self._break()
            return
        if done and "no-done" not in behaviour.flags:
            await exchange.write(behaviour.framed(b"[DONE]"))
        await exchange.end()
        self.request.finished = True

    async def _write(self, events: Iterable[Event], stop_at: int | None) -> bool:
        behaviour, exchange, request = self.behaviour, self.exchange, self.request
        group = _GROUP_EVENTS if "many-events-per-write" in behaviour.flags else 1
        free = behaviour.usage == "zero"
        waiting, waiting_tokens = b"", 0
        for index, (name, data, tokens) in enumerate(events):
            if index == stop_at:
                break
            waiting += behaviour.framed(data, name)
            waiting_tokens += 0 if free else tokens
            if (index + 1) % group:
                continue
            if await exchange.pause(behaviour.pause_s if index else 0):
                return False
            await self._out(waiting)
            request.generated += waiting_tokens
            waiting, waiting_tokens = b"", 0
        if waiting:
            await self._out(waiting)
            request.generated += waiting_tokens
        return not exchange.gone

    async def _out(self, data: bytes) -> None:
        if "one-byte" not in self.behaviour.flags:
            await self.exchange.write(data)
            return
        for at in range(len(data)):
            await self.exchange.write(data[at : at + 1])
            await asyncio.sleep(0)

    async def _break(self) -> None:
        exchange = self.exchange
        if self.behaviour.breaks == "error":
            error = error_body(500, "The server had an error while processing your request.", code="server_error")
            await exchange.write(self.behaviour.framed(msgspec.json.encode(error)))
            await exchange.end()
        elif self.behaviour.breaks == "hang":
            await exchange.hang()
        else:
            if self.behaviour.breaks == "endless-line":
                await self._endless_line()
            await exchange.hang_up()

    async def _endless_line(self) -> None:
        await self.exchange.write(b'data: {"endless": "')
        for _ in range(_ENDLESS_BYTES // 65_536):
            if await self.exchange.pause(0) or self.exchange.closing:
                return
            await self.exchange.write(b"a" * 65_536)
